"""Tensors to files and back, for what DeepSpeed rests on a disk, with every byte accounted for.

DeepSpeed 0.19.8 moves them through its op `async_io`, by libaio with O_DIRECT. That op never looks at what became of a request
(csrc/aio/common/deepspeed_aio_common.cpp: `_do_io_complete` counts events and drops their results). Two things go wrong without an error:

- The gradients of a sub-group are read back into one buffer, each behind the other, wherever it happens to begin. O_DIRECT wants addresses
  that are multiples of 512 or 4,096 bytes and refuses others with EINVAL, so that the step takes whatever was in the buffer. Tensors below
  1 MiB are not written at all, and stay right.
- A write that a full or failing disk refuses is lost, and the next read gives old bytes.

`Handle` has the op's interface and stands in its place. It asks the system's pread and pwrite, from threads, through page-aligned buffers of its
own, and looks at every result. It needs neither libaio nor a compiler.

A third error is corrected beside it: where the accelerator has no float16, as on a CPU, DeepSpeed keeps parameters on the disk in bfloat16
whatever they are (zero/partition_parameters.py, `_set_dtype`: `dtype or float16 if ... else bfloat16`). Ours are always float32.
"""

import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepscale.errors import DiskError

BLOCK = 4096  # bytes that O_DIRECT is content with on every file system
CHUNK = 4 * 2**20  # bytes of one request
THREADS = 4


class Handle:
    """The interface of DeepSpeed's `aio_handle`. Files are filled up to a multiple of `BLOCK` bytes, which mean nothing.

    `async_pread` and `async_pwrite` move a contiguous CPU tensor from or to the start of a file, in pieces, from threads; `wait` ends them all and
    raises DiskError where one failed. The tensor must stay as it is until then.
    """

    buffers: ClassVar[set[int]] = set()  # where the buffers that DeepSpeed has asked any handle for begin

    def __init__(self, **_: Any) -> None:  # libaio's block size and queue depth
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="nvme")
        self.pending: list[Future[None]] = []
        self.operations = 0
        self.own = threading.local()

    def async_pread(self, tensor: Tensor, path: str, offset: int = 0) -> int:
        """Begins to fill the tensor."""
        return self._begin(tensor, path, offset, self._read)

    def async_pwrite(self, tensor: Tensor, path: str, offset: int = 0) -> int:
        """Begins to write the tensor."""
        return self._begin(tensor, path, offset, self._write)

    def wait(self) -> int:
        """How many tensors have been moved since the last time: all that were begun. Raises DiskError."""
        pending, self.pending = self.pending, []
        ended, self.operations = self.operations, 0
        errors = [error for future in pending if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return ended

    def new_cpu_locked_tensor(self, numel: int, like: Tensor) -> Tensor:
        """A buffer of DeepSpeed's (numel,), zeros; page-locked where a GPU copies from it."""
        made = torch.zeros(int(numel), dtype=like.dtype, pin_memory=torch.cuda.is_available())
        self.buffers.add(made.untyped_storage().data_ptr())
        return made

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Forgets a buffer."""
        self.buffers.discard(tensor.untyped_storage().data_ptr())
        return True

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of these buffers; DeepSpeed copies others into one before it moves them."""
        return tensor.untyped_storage().data_ptr() in self.buffers

    def _begin(self, tensor: Tensor, path: str, offset: int, move: Callable[[Tensor, str, int], None]) -> int:
        if offset or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"{path}: whole contiguous tensors on the CPU are moved, not {tuple(tensor.shape)} on {tensor.device} at {offset}")
        flat = tensor.detach().view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), CHUNK):
            self.pending.append(self.pool.submit(move, flat[start : start + CHUNK], path, start))
        self.operations += 1
        return 0

    def _write(self, part: Tensor, path: str, start: int) -> None:
        view, buffer = self._buffer(part.numel())
        buffer[: part.numel()].copy_(part)
        _move(os.pwrite, path, os.O_WRONLY | os.O_CREAT, view, start, part.numel())

    def _read(self, part: Tensor, path: str, start: int) -> None:
        view, buffer = self._buffer(part.numel())
        _move(lambda file, into, at: os.preadv(file, [into], at), path, os.O_RDONLY, view, start, part.numel())
        part.copy_(buffer[: part.numel()])

    def _buffer(self, size: int) -> tuple[memoryview, Tensor]:
        """This thread's own, on page boundaries, as bytes and as a tensor: for `size` bytes, rounded up to whole blocks."""
        if not hasattr(self.own, "view"):
            self.own.view = memoryview(mmap.mmap(-1, CHUNK))
            self.own.buffer = torch.frombuffer(self.own.view, dtype=torch.uint8)
        return self.own.view[: -(-size // BLOCK) * BLOCK], self.own.buffer


def _move(call: Callable[[int, memoryview, int], int], path: str, flags: int, view: memoryview, start: int, least: int) -> None:
    """One request, and what a short one left, until `least` bytes are moved. Raises DiskError."""
    try:
        file = _open(path, flags)
        try:
            done = 0
            while done < least:
                moved = call(file, view[done:], start + done)
                if moved == 0:
                    raise OSError(f"it ends after {start + done:,} bytes, where {start + least:,} were written")
                done += moved
        finally:
            os.close(file)
    except OSError as error:
        raise DiskError(path, error) from error


def _open(path: str, flags: int) -> int:
    """Past the page cache, where the file system can do that."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(path, flags, 0o600)


def install() -> None:
    """Puts `Handle` where DeepSpeed looks for its op, and keeps parameters on the disk in float32."""
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
    from deepspeed.runtime.zero import partition_parameters

    class Float32Swapper(AsyncPartitionedParameterSwapper):  # type: ignore[misc]
        def __init__(self, settings: Any, dtype: torch.dtype) -> None:
            super().__init__(settings, torch.float32)

    OpBuilder._loaded_ops["async_io"] = SimpleNamespace(aio_handle=Handle)
    OpBuilder._loaded_ops.setdefault("pin_memory", SimpleNamespace())  # which async_io would build before itself
    partition_parameters.AsyncPartitionedParameterSwapper = Float32Swapper
