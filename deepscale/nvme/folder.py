"""The folder on the disk where --offload nvme rests states: refused before training where it cannot serve, timed, removed at the end.

Every rank has a folder of its own in it, deepscale-*, which holds a lock as long as the process lives. What a killed process has left is removed
by the next run that uses the disk.
"""

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from deepscale.errors import DiskError, UsageError
from deepscale.nvme.transfer import Handle
from deepscale.progress import gib

PREFIX, LOCK = "deepscale-", "lock"
TIMED = 32 * 2**20  # bytes
SPARE = 1.05  # of what is needed must be free


class Speed(NamedTuple):
    """Bytes a second."""

    read: float
    write: float


def check(path: str | None) -> None:
    """Raises UsageError for a folder that is not there or cannot be written."""
    if path is None:
        raise UsageError("--offload nvme needs a folder on the disk: type --nvme-path DIR")
    if not Path(path).is_dir():
        what = "is not a folder" if Path(path).exists() else "does not exist"
        raise UsageError(f"--nvme-path {path} {what}; type a folder on a local disk, or make it: mkdir -p {path}")
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(f"--nvme-path {path} cannot be written ({error.strerror}); type another folder") from None


def own_folder(path: str) -> Path:
    """A new folder of this process in `path`, locked, and removed when the process ends; what dead ones have left there is removed."""
    for left in Path(path).glob(f"{PREFIX}*"):
        _remove_if_left(left)
    new = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=path))  # locked before others see it
    lock = os.open(new / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    own = new.rename(new.with_name(new.name[1:]))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _remove_if_left(folder: Path) -> None:
    with suppress(OSError):
        lock = os.open(folder / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def refuse_full(path: str, needed: int, ranks: int) -> None:
    """Raises UsageError where the disk has less room than `ranks` ranks of this machine need, `needed` bytes each."""
    free, wanted = shutil.disk_usage(path).free, int(SPARE * needed * ranks)
    if free < wanted:
        who = f"{ranks} ranks of this machine need" if ranks > 1 else "the run needs"
        raise UsageError(
            f"--nvme-path {path} has {gib(free)} free, and {who} {gib(wanted)} there; make room, type a folder on another disk, "
            f"or a smaller --depth or --width"
        )


@functools.lru_cache
def speed_of(path: str) -> Speed:
    """What the disk reads and writes, the way training does, with every local rank at it that asks. Raises UsageError where it fails."""
    handle, tensor = Handle(), torch.zeros(TIMED, dtype=torch.uint8)
    with tempfile.TemporaryDirectory(prefix=".speed-", dir=path) as folder:
        file, seconds = str(Path(folder) / "speed"), []
        try:
            for begin in (handle.async_pwrite, handle.async_pread):
                started = time.perf_counter()
                begin(tensor, file)
                handle.wait()
                seconds.append(time.perf_counter() - started)
        except DiskError as error:
            raise UsageError(f"--nvme-path {path} cannot be used: {error}") from None
    return Speed(TIMED / seconds[1], TIMED / seconds[0])
