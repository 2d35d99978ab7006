"""A checkpoint on disk: found, opened, verified."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from deepscale.world import World

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `manifest` holds what the saver was told: "network", "asked", "settings" (flat, resolved), "progress", "versions"."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps that were done."""
        return int(self.manifest["step"])

    @property
    def progress(self) -> dict[str, Any]:
        """What `Saver.save` was given."""
        return dict(self.manifest["progress"])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that `Saver.save` was given."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """The stacked network's state, float32, on the CPU: parameters, and BatchNorm's running statistics averaged over ranks."""
        raise NotImplementedError


def find(folder: Path, warn: Callable[[str], None], world: World | None = None) -> Checkpoint | None:
    """The newest intact checkpoint of a --checkpoint-dir, None where there is none. Every rank must ask; all get the same.

    Each damaged one that is passed over is named in a warning, with what is wrong with it.
    """
    raise NotImplementedError


def open_checkpoint(path: Path, world: World | None = None) -> Checkpoint:
    """The checkpoint in `path` (DIR/step-00001200), or the newest intact one of `path` (DIR). Raises UsageError, naming what is wrong with it."""
    raise NotImplementedError
