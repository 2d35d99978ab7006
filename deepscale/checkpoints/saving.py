"""Writing checkpoints: complete and verified, or not at all."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from deepscale.config import Config
from deepscale.data.splits import DatasetInfo
from deepscale.engine import Engine
from deepscale.models.convnext import ConvNeXt
from deepscale.world import World


def about(asked: Config, settings: Config, info: DatasetInfo) -> dict[str, Any]:
    """What a manifest says of the run: "network" (what rebuilds it), "asked" and "settings" (flat settings, before and after planning)."""
    raise NotImplementedError


class Saver:
    """Saves a run's state into `folder`, and keeps the last `keep` checkpoints and the best.

    `asynchronous`: write from a thread while training goes on; None: where a copy of the states fits into free host memory.
    All methods must be called by every rank, at the same steps. A save that fails is a warning, never an exception.
    """

    def __init__(
        self,
        folder: Path,
        model: ConvNeXt,
        engine: Engine,
        world: World,
        *,
        about: Mapping[str, Any],
        keep: int = 2,
        asynchronous: bool | None = None,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        raise NotImplementedError

    def save(self, step: int, progress: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], best: float | None = None) -> None:
        """Saves the state after `step` optimiser steps, between two steps. `progress` (JSON) and `arrays` (rank 0's) come back as they were.

        `best`: the validation accuracy here, if it was measured.
        """
        raise NotImplementedError

    def wait(self) -> None:
        """Until what was saved is in place, or has failed."""
        raise NotImplementedError

    def close(self) -> None:
        """Waits; the end."""
        raise NotImplementedError
