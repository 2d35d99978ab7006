"""Tensors in a file of the safetensors format, written tensor by tensor and hashed on the way, read range by range.

The format (github.com/huggingface/safetensors): 8 bytes, the length of the header as a little-endian number; the header, JSON
{name: {"dtype", "shape", "data_offsets": [begin, end)}}, offsets counted from its end, with texts under "__metadata__"; the raw data,
without gaps. Nothing in it can be code. The library reads and writes such files whole; a checkpoint's are as large as the memory.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepscale.errors import UsageError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, as in the library
BUFFER = 2**20
BLOCK = 2**22  # bytes hashed and written at once, from a core's cache


class Written(NamedTuple):
    """A file as it should be."""

    bytes: int
    sha256: str


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
    """Writes and syncs a file, the largest elements first, and reads it back. Tensors on a GPU are copied to the host one after the other.

    Raises OSError, also where what is read back is not what was written.
    """
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as pool, path.open("wb", buffering=BUFFER) as file:
        for block in _blocks(tensors, metadata):
            hashed = pool.submit(digest.update, block)  # on another core, while the block is in both caches
            file.write(block)
            hashed.result()
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    read = np.empty(2 * BLOCK, np.uint8)  # a block is smaller, and new memory for each would take longer than reading
    with path.open("rb", buffering=0) as back:
        for block in _blocks(tensors, metadata):
            if back.readinto(read[: len(block)].data) != len(block) or not np.array_equal(read[: len(block)], np.frombuffer(block, np.uint8)):
                raise OSError(f"{path.name} reads back otherwise than it was written: the disk or the memory is faulty")
    return Written(size, digest.hexdigest())


def _blocks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The bytes of a file: its header, then the tensors, small ones together."""
    named = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in named:
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    together = bytearray(len(text).to_bytes(8, "little") + text)
    for _, tensor in named:
        data = _bytes_of(tensor.detach().cpu().contiguous())
        if len(data) < BLOCK // 4:
            together += data
        if len(together) >= BLOCK or len(data) >= BLOCK // 4:
            yield memoryview(together)
            together = bytearray()
        if len(data) >= BLOCK // 4:
            yield from (data[first : first + BLOCK] for first in range(0, len(data), BLOCK))
    yield memoryview(together)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Entry(NamedTuple):
    """Where a tensor lies in its file: bytes `begin` and following."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class TensorFile:
    """An open file, whose header is consistent with its size. Raises UsageError where it is not, or cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb", buffering=0)
            self.entries, self.metadata = _header(self.file, os.fstat(self.file.fileno()).st_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is no intact safetensors file ({getattr(error, 'strerror', None) or error})") from None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Elements `start` and following of the flat tensor, as many as `out` (k,) takes, on whatever device it lies."""
        dtype, shape, begin = self.entries[name]
        if start < 0 or start + out.numel() > math.prod(shape) or dtype != out.dtype:
            raise UsageError(f"{self.path}: {name} holds {math.prod(shape):,} elements of {dtype}, and {out.numel():,} of {out.dtype} were wanted")
        host = out if out.device.type == "cpu" and out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
        if out.numel():
            view = _bytes_of(host.detach())
            offset = begin + start * out.element_size()
            while view:
                count = os.preadv(self.file.fileno(), [view], offset)
                if not count:
                    raise UsageError(f"{self.path} ends within {name}")
                view, offset = view[count:], offset + count
        if host is not out:
            out.copy_(host)

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        if name not in self.entries:
            raise UsageError(f"{self.path} holds no {name}")
        dtype, shape, _ = self.entries[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.read_into(name, 0, tensor.view(-1))
        return tensor


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Raises ValueError and its like where header and size do not make a file without gaps."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LARGEST_HEADER, size - 8):
        raise ValueError(f"its header would be {length:,} bytes long")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    entries, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError(f"the shape or the place of {name} is no whole number")
        if first != end or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not lie where its header says")
        entries[name] = Entry(dtype, shape, 8 + length + first)
        end = last
    if 8 + length + end != size:
        raise ValueError(f"its header describes {8 + length + end:,} bytes, it has {size:,}")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts")
    return entries, metadata
