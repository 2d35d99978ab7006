"""A process that has imported everything and forks trainings, so that a soak of hundreds of starts is not spent on imports.

Reads one JSON object a line, {"arguments", "environment", "folder", "log", "phase", "script"} (to run instead of the training, "" for none);
writes {"started": pid} for it, and {"ended": pid, "code"} when that process has ended (below 0: by a signal). A training is a session of its own,
and keeps what it is doing in the file `phase`.
"""

import json
import mmap
import os
import runpy
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import deepspeed  # noqa: F401

from deepscale import stop, tracking, train
from deepscale.world import Doing

LENGTH = 64


def main() -> None:
    """Serves until standard input ends."""
    tracking._preload()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    children: set[int] = set()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.005)
        if readable:
            line = sys.stdin.readline()
            if not line:
                return
            child = os.fork()
            if not child:
                become(json.loads(line))
            children.add(child)
            print(json.dumps({"started": child}), flush=True)
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
                print(json.dumps({"ended": child, "code": os.waitstatus_to_exitcode(status)}), flush=True)


def become(job: dict[str, Any]) -> NoReturn:
    """This process, just forked, as the training."""
    os.setsid()
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, flags, path in ((0, os.O_RDONLY, os.devnull), (1, os.O_WRONLY | os.O_APPEND, job["log"]), (2, os.O_WRONLY | os.O_APPEND, job["log"])):
        os.dup2(os.open(path, flags), number)
    show_phases(job["phase"])
    sys.argv = [job["script"], *job["arguments"]]
    stop.program(run_script if job["script"] else train.main)


def run_script(_: Sequence[str]) -> None:
    """A program around the training, which reads its arguments itself."""
    runpy.run_path(sys.argv[0], run_name="__main__")


def show_phases(path: str) -> None:
    """Keeps "STEP PHASE" of this rank in a file of `LENGTH` bytes, which stays when the process is killed."""
    with open(path, "wb") as file:
        file.write(b" " * LENGTH)
    with open(path, "r+b") as file:
        shown = mmap.mmap(file.fileno(), LENGTH)
    change = Doing.__call__

    def show(doing: Doing, phase: str) -> None:
        change(doing, phase)
        shown[:] = f"{doing.step} {phase}".encode().ljust(LENGTH)

    Doing.__call__ = show  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
