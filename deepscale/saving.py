"""When a run is saved, and what of the loop goes into a checkpoint beside the network's state."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from deepscale.checkpoints import Saver
from deepscale.errors import AGAIN, Interrupted
from deepscale.parsing import Every
from deepscale.stop import CTRL_C, Stop
from deepscale.world import World


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


class Wishes:
    """What ranks ask for while they train: to end, or, rank 0's clock, a checkpoint. All ranks take them up after the same step."""

    def __init__(self, stop: Stop, saving: Saving | None, world: World) -> None:
        self.stop, self.saving, self.world = stop, saving, world
        self.asked, self.due = 0, False  # of all ranks: the exit code to end with, a checkpoint

    def own(self) -> tuple[float, float, float]:
        """What this rank adds to a step's totals: a wish to end and to be started again, one by Ctrl-C, one for a checkpoint."""
        code, saving = self.stop.wish(), self.saving
        return float(code == AGAIN), float(code == CTRL_C), float(self.world.is_main and saving is not None and saving.wished())

    def take(self, again: float, ctrl_c: float, due: float) -> None:
        """Notes the sums over ranks of `own`."""
        self.asked, self.due = CTRL_C if ctrl_c else AGAIN if again else 0, bool(due)

    def ask(self) -> None:
        """Notes whether any rank wishes to end, where there are no totals to go with."""
        again, ctrl_c, _ = self.own()
        again, ctrl_c = self.world.sum(torch.tensor([again, ctrl_c], device=self.world.device)).tolist()
        self.take(again, ctrl_c, due=0.0)

    def save_if_due(self, step: int) -> None:
        """After a step."""
        if self.saving is not None and self.saving.due(step, self.due):
            self.saving.save(step)
        self.due = False

    def end_if_asked(self, step: int, of: int, accuracy: float | None) -> None:
        """Saves and raises Interrupted where a rank was asked to end. `of`: steps of the run, 0 while they are not known."""
        if not self.asked:
            return
        said = f"interrupted {self.stop.reason or 'on another rank'} after step {step:,}" + (f" of {of:,}" if of else "")
        saving = self.saving
        if saving is None:
            raise Interrupted(f"{said}, and nothing of it is saved; next time type --checkpoint-every 10m", self.asked)
        if saving.saved_step < step:
            saving.save(step, accuracy)
        if saving.saved(step):
            raise Interrupted(f"{said}; all of it is saved in {saving.folder}: type the same with --resume auto to go on", self.asked)
        raise Interrupted(f"{said}; this step could not be saved: --resume auto goes on from what {saving.folder} holds", self.asked)
