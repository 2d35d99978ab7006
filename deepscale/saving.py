"""When a run is saved, and what of the loop goes into a checkpoint beside the network's state."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from deepscale.checkpoints import Saver
from deepscale.config import Every


class Saving:
    """Checkpoints of one run. Every rank must ask for the same ones: what rank 0's clock says reaches the others with a step's totals.

    `every` None: only where the run is asked to end, and, with `marks`, at the best validation so far and at the end.
    `about` is what the run itself wants to find again (its id in MLflow ...).
    """

    def __init__(self, saver: Saver, folder: Path, every: Every | None, marks: bool, about: Callable[[], dict[str, Any]]) -> None:
        self.saver, self.folder, self.every, self.marks, self.about = saver, folder, every, marks, about
        self.state: Callable[[], tuple[dict[str, Any], dict[str, NDArray[Any]]]] = lambda: ({}, {})  # of the loop, which sets it
        self.saved_step = 0
        self.saved_at = time.monotonic()
        self.best: float | None = None

    def wished(self) -> bool:
        """Whether so much time has passed on this rank's clock."""
        return self.every is not None and self.every.seconds is not None and time.monotonic() - self.saved_at >= self.every.seconds

    def due(self, step: int, wished: bool) -> bool:
        """Whether a checkpoint is to be saved after this step; `wished` is rank 0's."""
        steps = self.every.steps if self.every is not None else None
        return step > self.saved_step and (wished or (steps is not None and step % steps == 0))

    def validated(self, accuracy: float) -> bool:
        """Notes the accuracy of a validation; whether it is the best so far, and to be saved for that."""
        better = self.best is None or accuracy > self.best
        self.best = accuracy if better else self.best
        return better and self.marks

    def save(self, step: int, accuracy: float | None = None, finished: bool = False) -> None:
        """Saves the state after a step; `accuracy` of validation where it was measured there."""
        self.saver.world.doing("checkpoint")
        progress, arrays = self.state()
        self.saver.save(step, {"run": self.about(), **progress, "best": self.best, "finished": finished}, arrays, best=accuracy, again=finished)
        self.saved_step, self.saved_at = step, time.monotonic()

    def saved(self, step: int) -> bool:
        """Waits for what is being written; whether the checkpoint of this step is there."""
        self.saver.wait()
        return self.saver.last == step
