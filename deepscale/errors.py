"""What can go wrong by a user's hand, as sentences instead of tracebacks.

Exit codes: 2 for bad input (`UsageError`), 3 for a loss that turned non-finite (`NonFiniteError`), 4 for memory that ran out
(`OutOfMemoryError`), 75 for a run that was asked to end and may be started again (stop.py), 130 for Ctrl-C, 141 where the reader of a
pipe has gone, as shells count it.
"""

import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

# Most often all ranks find the same fault: rank 0 says it, and the launcher ends the others before they do.
RANK_0_FIRST_S = 10.0
AGAIN = 75  # sysexits.h: EX_TEMPFAIL


class DeepscaleError(Exception):
    """Base of the errors that end a command with one sentence on standard error."""

    exit_code = 1
    told = False  # to rank 0, which says it (last_words.py)


class UsageError(DeepscaleError):
    """Bad input: the message says what was given, what is possible and what to type."""

    exit_code = 2


class MissingPackageError(UsageError):
    """An optional package is not installed; the message names it and the extra that brings it."""

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        how = f"pip install 'deepscale[{extra}]'" if extra else "pip install deepscale"
        super().__init__(f"{purpose} needs the package {package}, which is not installed: type {how}")


class NonFiniteError(DeepscaleError):
    """The loss turned NaN or infinite; the message names the step and the layer."""

    exit_code = 3


class OutOfMemoryError(DeepscaleError):
    """Device or host had no more memory; the message says what was planned and what to switch on."""

    exit_code = 4


class DiskError(DeepscaleError):
    """A disk that states rest on (--offload nvme) did not take or give what it was asked to."""

    def __init__(self, path: str, error: OSError) -> None:
        full = " or ".join(["make room there"] * (error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) + ["type another --nvme-path"])
        super().__init__(f"the disk with the states of --offload nvme failed: {path}: {error.strerror or error}; {full}, and --resume auto")


class LostRankError(DeepscaleError):
    """Another rank of the run has ended; `why`, and which, if that could tell."""

    def __init__(self, why: str | None = None) -> None:
        gone = "another rank of this run has ended, and it cannot go on without: its process was killed, or its machine is gone"
        super().__init__(f"{why or gone}. Type the same with --resume auto to go on from the last checkpoint")


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to end (stop.py): the message says who, what was saved, and how to go on."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unknown_choice(what: str, given: str, known: Iterable[str]) -> UsageError:
    """The sentence for an unknown name, listing the known ones."""
    return UsageError(f"{what} {given!r} is not known; possible: {', '.join(known)}")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command's entry point: known errors become one sentence and their exit code."""

    @functools.wraps(main)
    def guarded(*arguments: Any) -> None:
        try:
            main(*arguments)
        except DeepscaleError as error:
            with suppress(KeyboardInterrupt):
                if _rank() and not error.told:
                    time.sleep(RANK_0_FIRST_S)
                if not error.told:
                    print(f"deepscale: {error}", file=sys.stderr, flush=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt as error:
            if not _rank():
                with suppress(BrokenPipeError):
                    print(f"deepscale: {error if isinstance(error, Interrupted) else 'interrupted'}", file=sys.stderr, flush=True)
            raise SystemExit(getattr(error, "exit_code", 130)) from None
        except BrokenPipeError:  # `deepscale ... | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
            raise SystemExit(141) from None

    return guarded
