"""Host memory for tensors that a backward pass will want back: the store of OffloadInputs (activations.py)."""

import contextlib
import weakref
from collections import defaultdict

import torch
from torch import Tensor


class Resting:
    """A tensor in host memory. Once nobody refers to it, fetched or abandoned with its pass, its buffer is free for another."""

    def __init__(self, buffer: Tensor, free: list[Tensor], device: torch.device, before: "weakref.ref[Resting] | None") -> None:
        self.buffer, self.free, self.device, self.before = buffer, free, device, before
        self.fetched: Tensor | None = None  # its copy on the device, there or on its way

    def __del__(self) -> None:
        self.free.append(self.buffer)


class HostStore:
    """put(x) copies x to host memory, get(resting) back; buffers are kept and used again from step to step.

    Tensors are wanted back in the opposite order, so each knows the one put before it, and getting one begins to fetch that: it is
    copied while the pass works on the other. Passes may be abandoned, or several be open at once: each tensor has its own buffer.

    On a GPU buffers are pinned, and all copies run on one stream of their own, beside the computation and in order: a buffer is never
    overwritten before the copy out of it has ended. `record_stream` tells the allocator which memory that stream, or the computing one,
    still reads. Written for that and not yet run on a GPU; on a CPU the same steps are plain copies.
    """

    def __init__(self) -> None:
        self.free: defaultdict[tuple[torch.device, torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.last: weakref.ref[Resting] | None = None
        self.bytes = 0  # of all buffers

    def put(self, x: Tensor) -> Resting:
        """Copies x (B, C, H, W), in channels-last memory, to the host."""
        free = self.free[x.device, x.shape, x.dtype]
        resting = Resting(free.pop() if free else self._buffer(x), free, x.device, self.last)
        self.last = weakref.ref(resting)
        if x.is_cuda:
            self._stream(x.device).wait_stream(torch.cuda.current_stream(x.device))  # until x is computed
            x.record_stream(self._stream(x.device))
        with self._copying(x.device):
            resting.buffer.copy_(x, non_blocking=True)
        return resting

    def get(self, resting: Resting) -> Tensor:
        """The tensor on its device again, in memory of its own."""
        x = self._fetch(resting)
        if x.is_cuda:
            current = torch.cuda.current_stream(x.device)
            current.wait_stream(self._stream(x.device))
            x.record_stream(current)
        resting.fetched = None
        before = resting.before() if resting.before is not None else None
        if before is not None:
            self._fetch(before)
        return x

    def _fetch(self, resting: Resting) -> Tensor:
        if resting.fetched is None:
            with self._copying(resting.device):
                resting.fetched = torch.empty_like(resting.buffer, device=resting.device).copy_(resting.buffer, non_blocking=True)
        return resting.fetched

    def _buffer(self, x: Tensor) -> Tensor:
        buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda, memory_format=torch.channels_last)
        self.bytes += buffer.nbytes
        return buffer

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]

    def _copying(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream(device)) if device.type == "cuda" else contextlib.nullcontext()
