"""Files that are there complete or not at all, also after the machine has lost its power."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepscale.errors import UsageError


@contextmanager
def atomic(path: Path, advice: str = "type another path") -> Iterator[Path]:
    """Gives a file beside `path` to write; at the end of the block it is synced and takes `path`'s place, after an error it is gone.

    Makes the folder. The file has the permissions that the umask leaves, whatever wrote it: some libraries make theirs for the
    owner alone. Raises UsageError, which ends with `advice`, for an OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error}); {advice}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, read piece by piece. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
