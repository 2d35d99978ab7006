"""What is kept in DATA_DIR/.deepscale: locks for processes that start together, and decoded images.

Decoded images are plain .npy files, memory-mapped, so that the ranks of a machine share one copy. They are written
under a temporary name, renamed when complete, and their digest is checked before every use.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from deepscale.data.splits import DatasetInfo, Source, Split, digest
from deepscale.errors import UsageError

SPLITS = ("train", "validation", "test")


def cache_folder(data_dir: Path) -> Path:
    """Where the project keeps its own files beside the user's data."""
    return data_dir / ".deepscale"


def checked_folder(data_dir: str) -> Path:
    """The data folder, which need not exist yet. Raises UsageError where a file stands in its way."""
    folder = Path(data_dir).expanduser()
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                raise UsageError(f"--data-dir {data_dir} is not possible: {part} is a file; give a folder")
            break
    return folder


def not_writable(data_dir: Path, error: OSError) -> UsageError:
    """The sentence for a data folder that takes no files."""
    return UsageError(f"the data folder {data_dir} cannot be written ({error.strerror or error}); give another: --data-dir FOLDER")


@contextmanager
def one_at_a_time(data_dir: Path, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Only one process at a time is inside, over all processes that use this data folder. Raises OSError where it is not writable."""
    folder = cache_folder(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / f"{name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        say(f"another process is preparing {name}; waiting for it")
        lock.acquire()
    except NotImplementedError:
        raise OSError(errno.ENOLCK, "its file system has no file locks") from None
    try:
        yield
    finally:
        lock.release()


def empty_pixels(folder: Path | None, split: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Room for the images of a split: a file in `folder`, or memory where that is None. Raises OSError where the disk is full."""
    if folder is None:
        return np.empty(shape, np.uint8)
    if 0 in shape:  # nothing can be mapped of an empty file
        np.save(folder / f"{split}_images.npy", np.empty(shape, np.uint8), allow_pickle=False)
        return np.empty(shape, np.uint8)
    path = folder / f"{split}_images.npy"
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)  # a hole filled on a full disk would kill the process
    return pixels


def keep(source: Source, work: Path, final: Path) -> None:
    """Completes a folder whose images `empty_pixels` made, and gives it its final name. Raises OSError."""
    for name in SPLITS:
        split: Split = getattr(source, name)
        if isinstance(split.images, np.memmap):
            split.images.flush()
        np.save(work / f"{name}_labels.npy", split.labels, allow_pickle=False)
    (work / "info.json").write_text(json.dumps(asdict(source.info), indent=1))
    shutil.rmtree(final, ignore_errors=True)  # damaged, or it would have been used
    work.rename(final)


def recall(final: Path) -> Source | None:
    """The images kept there, memory-mapped and verified; None where there are none or they are damaged."""
    try:
        record = json.loads((final / "info.json").read_text())
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        info = DatasetInfo(**{**record, **lists})
        parts = [Split(_load(final / f"{name}_images.npy", mapped=True), _load(final / f"{name}_labels.npy")) for name in SPLITS]
        whole = digest(*parts) == info.digest
    except (OSError, ValueError, TypeError):  # missing, cut short, or of another version: made anew
        return None
    return Source(info, *parts) if whole else None


def _load(path: Path, mapped: bool = False) -> Any:
    # "c" maps privately: pages are shared over processes, and torch does not warn of memory that cannot be written.
    return np.load(path, mmap_mode="c" if mapped and os.path.getsize(path) > 4096 else None, allow_pickle=False)
