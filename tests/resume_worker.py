"""One rank of test_resume.py: whole commands, one after the other, in one process group.

A case is {"name", "folder", "arguments", and optionally "ask": [step, rank]}: the command runs in the folder, and before that step
(from 1) this rank alone gets SIGUSR1. Its result is the exit code.
"""

import os
import signal
from contextlib import chdir
from pathlib import Path

import pytest
from rank import Case, run_cases

from deepscale import loop, train, world


def run(case: Case, place: world.World) -> int:
    """The exit code of `train.main`."""
    step, rank = case.get("ask", (0, 0))
    one = loop.Fit._one

    def asked(fit: loop.Fit, batches: loop.Batches) -> None:
        if fit.step + 1 == step and place.rank == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        one(fit, batches)

    Path(case["folder"]).mkdir(parents=True, exist_ok=True)
    with chdir(case["folder"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Fit, "_one", asked)
        patch.setattr(world, "join", lambda engine: place)
        patch.setattr(world, "leave", lambda: None)
        try:
            train.main(case["arguments"])
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    run_cases(run)
