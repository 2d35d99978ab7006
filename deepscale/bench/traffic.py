"""What the ranks send each other: bytes that really left this process, counted by the kernel, and the collectives that sent them.

`bytes_sent` asks the system for every TCP connection of this process (TCP_INFO), so nothing that the program believes about
itself is in it: gloo's headers are counted, as are the torch store's. NCCL's traffic over NVLink or InfiniBand is no TCP; there only
the collectives are known.
"""

import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SENT, SENT_AGAIN = 200, 208  # offsets of tcpi_bytes_sent and tcpi_bytes_retrans in Linux' struct tcp_info, u64; from Linux 4.19 on
# Function of torch.distributed -> kind, and which of its arguments is the whole tensor; and the names that this argument has.
FUNCTIONS: dict[str, tuple[str, int | None]] = {
    "all_reduce": ("all_reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_gather": ("all_gather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "all_to_all_single": ("all_to_all", 0),
    "barrier": ("barrier", None),
}
WHOLE = {0: ("tensor", "output_tensor", "tensor_list", "output"), 1: ("input", "input_list")}


def bytes_sent() -> int | None:
    """Bytes that this process has sent over the TCP connections that are open now, each once however often TCP sent it; None where the system
    does not say. What is still in the kernel's queue is not among them: a barrier before it brings most of that on its way.
    """
    total = 0
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed meanwhile, as what listed the folder is
            continue
        with connection:
            if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            try:
                connection.getpeername()
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            except OSError:  # it listens
                continue
            if len(information) < SENT_AGAIN + 8:
                return None
            sent, again = (struct.unpack_from("=Q", information, offset)[0] for offset in (SENT, SENT_AGAIN))
            total += sent - again
    return total


@dataclass
class Collective:
    """One collective: its kind (as in FUNCTIONS), the bytes of its whole tensor, seconds that the caller waited."""

    kind: str
    bytes: int
    seconds: float


class _Work:
    """A collective under way, whose waiting is timed."""

    def __init__(self, work: Any, call: Collective, synchronise: Callable[[], None]) -> None:
        self._work, self._call, self._synchronise = work, call, synchronise

    def wait(self, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        result = self._work.wait(*arguments, **named)
        self._synchronise()
        self._call.seconds += time.perf_counter() - begin
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Collectives:
    """Notes every collective of this process while `on`: those of torch.distributed, and DeepSpeed's, which go through it.

    Made before the engine is, since DeepSpeed keeps two of torch's functions. Off, it costs a question per call. `seconds` are those in which
    the caller could do nothing else: copying, sending, and waiting for a slower rank. On a GPU a collective is waited for, which no training
    run does: there it is time that could be hidden behind computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self.calls: list[Collective] = []
        self.device = device
        for name, (kind, place) in FUNCTIONS.items():
            setattr(dist, name, self._noted(getattr(dist, name), kind, place))

    @property
    def seconds(self) -> float:
        """That all noted collectives took of the caller's time."""
        return sum(call.seconds for call in self.calls)

    def _noted(self, function: Callable[..., Any], kind: str, place: int | None) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            if not self.on:
                return function(*arguments, **named)
            call = Collective(kind, 0 if place is None else _bytes(_whole(arguments, named, place)), 0.0)
            self.calls.append(call)
            self._synchronise()
            begin = time.perf_counter()
            result = function(*arguments, **named)
            if not named.get("async_op"):
                self._synchronise()
            call.seconds = time.perf_counter() - begin
            return result if result is None else _Work(result, call, self._synchronise)

        return noted

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _whole(arguments: Sequence[Any], named: dict[str, Any], place: int) -> Any:
    return arguments[place] if place < len(arguments) else next(named[name] for name in WHOLE[place] if name in named)


def _bytes(value: Tensor | Sequence[Tensor]) -> int:
    tensors = [value] if isinstance(value, Tensor) else value
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
