"""How a run is asked to end, and how it does.

| asked by | before training | while it trains | exit code |
|---|---|---|---|
| SIGTERM, SIGUSR1 (a scheduler) | at once | after the step or the batch of evaluation | 75 |
| Ctrl-C | at once | after the step or the batch; a second one at once | 130 |
| a DeepSpeed launcher that has gone | | after the step | 75 |

75 is sysexits.h's EX_TEMPFAIL, try again later: a scheduler requeues. All ranks end after the same step, though a signal may reach them
at different ones: the wish goes with the step's totals (loop.py).

DeepSpeed 0.19.8's launcher: `deepspeed` (runner.py) starts launch.py, which starts the ranks. A SIGTERM or SIGUSR1 to `deepspeed` ends it
alone (143, 138) and is passed on to nobody, so a rank looks whether it is still there. launch.py answers SIGTERM and SIGINT with a SIGTERM to
every rank, kills what is left after 30 s, and exits with 1; a rank that ends by itself with another code than 0 ends the others in the same
way, and its code comes out of both: 75 where the signal went to a rank.
"""

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from deepscale.errors import AGAIN, Interrupted

CTRL_C = 130
CODES = {signal.SIGTERM: AGAIN, signal.SIGUSR1: AGAIN, signal.SIGINT: CTRL_C}
PATIENCE_S = 20.0  # less than the launcher's 30


class Stop:
    """The wish to end: `code` is 0 while there is none, and else the exit code; `reason` says who asked."""

    def __init__(self) -> None:
        self.code, self.reason = 0, ""
        self.deferred = False
        self.patience_s: float | None = None
        self.launcher = _launcher()

    def listen(self) -> None:
        """From now on signals are answered; at once, until `defer`."""
        for number in CODES:
            signal.signal(number, self._heard)
        signal.signal(signal.SIGALRM, self._at_once)

    def defer(self, patience_s: float | None) -> None:
        """From now on signals wait for the end of the step, at most `patience_s` seconds."""
        self.deferred, self.patience_s = True, patience_s

    def wish(self) -> int:
        """The exit code that this rank wishes for, 0 for none."""
        if not self.code and self.launcher is not None and _launcher() != self.launcher:
            self.code, self.reason = AGAIN, "because its launcher has gone"
        return self.code

    def _heard(self, number: int, frame: FrameType | None) -> None:
        # The launcher answers a Ctrl-C with SIGTERM, which must not break into the closing of the run; a second Ctrl-C may.
        if self.code:
            if number == signal.SIGINT:
                self._at_once(number, frame)
            return
        self.code, self.reason = CODES[signal.Signals(number)], f"by {signal.Signals(number).name}"
        if not self.deferred:
            self._at_once(number, frame)
        if self.patience_s is not None:
            signal.setitimer(signal.ITIMER_REAL, self.patience_s)

    def _at_once(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"interrupted {self.reason}", self.code)


def program(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command with what was typed, and ends the process with its exit code.

    Python's own end is left out: at it, threads of gloo and of torch that still want Python's lock are ended where C++ allows no end, which aborts
    the process (seen once, on a busy machine) and loses the exit code. What is registered for the exit is done; the launcher's SIGTERM and
    schedulers are not answered any more.
    """
    code: object = 0
    try:
        main(sys.argv[1:])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader of a pipe has gone
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _launcher() -> tuple[int, int] | None:
    """(launch.py, the `deepspeed` command that started it) by process id, where this rank is DeepSpeed's."""
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return None
        # "pid (name) state ppid ...", and a name may hold anything
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
