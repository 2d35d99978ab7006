"""Host memory for tensors that a backward pass will want back: the store of OffloadInputs (activations.py)."""

import weakref
from collections import defaultdict

import torch
from torch import Tensor


class Resting:
    """A tensor in host memory. Once nobody refers to it, fetched or abandoned with its pass, its buffer is free for another."""

    def __init__(self, buffer: Tensor, free: list[Tensor], device: torch.device, before: "weakref.ref[Resting] | None") -> None:
        self.buffer, self.free, self.device, self.before = buffer, free, device, before
        self.fetched: Tensor | None = None  # its copy on the device, there or on its way
        self.arrived: torch.cuda.Event | None = None  # of that copy

    def __del__(self) -> None:
        if self.fetched is not None:  # and never asked for: its memory may be used again when the copy into it has ended
            _wait(self.arrived, self.device)
        self.free.append(self.buffer)


class HostStore:
    """put(x) copies x to host memory, get(resting) back; buffers are kept and used again from step to step.

    Tensors are wanted back in the opposite order, so each knows the one put before it, and getting one begins to fetch that: it is
    copied while the pass works on the other. Passes may be abandoned, or several be open at once: each tensor has its own buffer.

    On a GPU buffers are pinned (torch rounds each up to a power of two), and all copies run in order on one stream of their own,
    beside the computation. All device memory belongs to the computing stream: a copy begins after what is queued there by then, and
    memory is given back only after that stream was told to wait for the copy. `record_stream` would do without the wait, but frees
    memory when the CPU sees the copy ended, and the CPU runs far ahead: all inputs would be on the device at once. Written for a GPU
    and not yet run on one; on a CPU the same steps are plain copies.
    """

    def __init__(self) -> None:
        self.free: defaultdict[tuple[torch.device, torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.last: weakref.ref[Resting] | None = None
        self.leaving: tuple[Tensor, torch.cuda.Event] | None = None  # the last one put, until it is copied
        self.bytes = 0  # of all buffers

    def put(self, x: Tensor) -> Resting:
        """Copies x (B, C, H, W), in channels-last memory, to the host."""
        free = self.free[x.device, x.shape, x.dtype]
        resting = Resting(free.pop() if free else self._buffer(x), free, x.device, self.last)
        self.last = weakref.ref(resting)
        copied = self._copy(resting.buffer, x, x.device)
        self._let_go()
        self.leaving = None if copied is None else (x, copied)
        return resting

    def get(self, resting: Resting) -> Tensor:
        """The tensor on its device again, in memory of its own."""
        x = self._fetch(resting)
        _wait(resting.arrived, resting.device)
        resting.fetched = None
        self._let_go()
        before = None if resting.before is None else resting.before()
        if before is not None:
            self._fetch(before)
        return x

    def _fetch(self, resting: Resting) -> Tensor:
        if resting.fetched is None:
            resting.fetched = torch.empty_like(resting.buffer, device=resting.device)
            resting.arrived = self._copy(resting.fetched, resting.buffer, resting.device)
        return resting.fetched

    def _copy(self, target: Tensor, source: Tensor, device: torch.device) -> torch.cuda.Event | None:
        if device.type != "cuda":
            target.copy_(source)
            return None
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        stream = self.streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def _let_go(self) -> None:
        """Gives the memory of the tensor put before back: one is on its way while the pass goes on, and no more."""
        if self.leaving is not None:
            _wait(self.leaving[1], self.leaving[0].device)
        self.leaving = None

    def _buffer(self, x: Tensor) -> Tensor:
        buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda, memory_format=torch.channels_last)
        self.bytes += buffer.nbytes
        return buffer


def _wait(event: torch.cuda.Event | None, device: torch.device) -> None:
    """The computing stream goes on when the event has happened; the CPU does not wait."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
