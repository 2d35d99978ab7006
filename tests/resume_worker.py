"""One rank of test_resume_ranks.py: whole commands, one after the other, in one process group.

A case is {"name", "folder", "arguments", and optionally "ask": step}: the command runs in the folder, and before that step (from 1)
the last rank alone gets SIGUSR1. Its result is the exit code, and what the tracker was told: metrics by name as {step: value}.
"""

import os
import signal
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from rank import Case, run_cases

from deepscale import loop, tracking, train, world
from deepscale.records import Records
from deepscale.tracking import NullTracker


class Notes(NullTracker):
    """Keeps the metrics."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[int, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, {})[step] = float(value)


def run(case: Case, place: world.World) -> dict[str, Any]:
    """One command."""
    one, notes, code = loop.Fit._one, Notes(), 0

    def asked(fit: loop.Fit, batches: loop.Batches) -> None:
        if fit.step + 1 == case.get("ask") and place.rank == place.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        one(fit, batches)

    Path(case["folder"]).mkdir(parents=True, exist_ok=True)
    with chdir(case["folder"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Fit, "_one", asked)
        patch.setattr(Records, "_show", lambda *given: None)  # figure and page take longer than the run
        patch.setattr(tracking, "open_tracker", lambda *given, **named: notes)
        patch.setattr(world, "join", lambda engine: place)
        patch.setattr(world, "leave", lambda: None)
        try:
            train.main([*case["arguments"], "--no-tracking"])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return {"code": code, "metrics": notes.metrics}


if __name__ == "__main__":
    run_cases(run)
