"""One file from the network: it arrives whole under its name, or not at all.

Without a network this fails within seconds: a name server that never answers is not waited for.
"""

import contextlib
import hashlib
import http.client
import os
import queue
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepscale.errors import UsageError

CONNECT_S = 12.0  # until the answer begins, name look-up included
SILENCE_S = 10.0  # longest wait for the next bytes
CHUNK_BYTES = 1 << 18


class DownloadError(UsageError):
    """A file could not be had from the network; the message says why, without advice."""


def _open(url: str) -> Any:
    """The opened answer. The request runs in a thread of its own because no timeout of Python's covers the name look-up."""
    answer: queue.Queue[Any] = queue.Queue(1)

    def ask() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "deepscale"})
            answer.put(urllib.request.urlopen(request, timeout=SILENCE_S))
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        got = answer.get(timeout=CONNECT_S)
    except queue.Empty:
        raise DownloadError(f"{url} did not answer within {CONNECT_S:.0f} s") from None
    if isinstance(got, Exception):
        raise DownloadError(f"{url}: {getattr(got, 'reason', got)}")
    return got


def _chunks(response: Any, url: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(f"{url} broke off: {error}") from None
        if not chunk:
            return
        yield chunk


@contextlib.contextmanager
def _progress(name: str, total_bytes: int, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line per quarter; yields a function that takes the bytes got so far."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress("{task.description}", *columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total_bytes or None)
            yield lambda done: bar.update(task, completed=done)
        return
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        quarter = 4 * done // total_bytes if total_bytes else 0
        if quarter > told:
            told = quarter
            say(f"{name}: {done / 1e6:.0f} of {total_bytes / 1e6:.0f} MB")

    yield tell


def download(url: str, path: Path, md5: str, say: Callable[[str], None]) -> None:
    """Fetches `url` to `path` if its MD5 is right.

    Raises DownloadError where the network or the checksum fails, OSError where the file cannot be written.
    """
    say(f"downloading {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    checksum = hashlib.md5(usedforsecurity=False)
    done = 0
    try:
        with contextlib.ExitStack() as stack:
            response = stack.enter_context(contextlib.closing(_open(url)))
            file = stack.enter_context(open(part, "wb"))
            tell = stack.enter_context(_progress(path.name, int(response.headers.get("Content-Length") or 0), say))
            for chunk in _chunks(response, url):
                file.write(chunk)
                checksum.update(chunk)
                done += len(chunk)
                tell(done)
        if checksum.hexdigest() != md5:
            raise DownloadError(f"{url} gave {done:,} bytes whose checksum is not the official one")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
