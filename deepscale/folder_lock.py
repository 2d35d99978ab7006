"""One run at a time in a --checkpoint-dir: the second is refused, with the words who is there.

DIR/lock          locked by rank 0 as long as the run lives; the system opens it when the process ends, however it ends
    lock.json     who that is
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from deepscale.errors import UsageError

if TYPE_CHECKING:  # a sweep's worker, which waits for this lock, loads no torch
    from deepscale.world import World

LOCK, OWNER = "lock", "lock.json"


@contextmanager
def locked(folder: str | None, world: "World") -> Iterator[None]:
    """Holds the folder's lock while inside, on rank 0; every rank must ask. Raises UsageError on all of them where another run has it."""
    if folder is None:
        yield
        return
    lock, refusal = FileLock(Path(folder) / LOCK), ""
    if world.is_main:
        try:
            lock.acquire(timeout=0)
            _owner(folder).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        except Timeout:
            refusal = f"{folder} is in use by another run{_who(folder)}; wait for its end, or type another --checkpoint-dir"
        except OSError as error:
            refusal = f"{folder} cannot be locked ({error.strerror}); type another --checkpoint-dir"
    try:
        if refusal := world.agree(refusal):
            raise UsageError(refusal)
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                _owner(folder).unlink()
            lock.release()


def _owner(folder: str) -> Path:
    return Path(folder) / OWNER


def _who(folder: str) -> str:
    """ " (process 12 on host, since ...)", or nothing where that cannot be read."""
    try:
        owner = json.loads(_owner(folder).read_text())
        return f" (process {int(owner['pid'])} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
