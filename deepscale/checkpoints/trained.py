"""Trained weights, wherever they lie: in a checkpoint of a run, in the newest or best one of a folder, or in a weights file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deepscale.checkpoints import weights
from deepscale.checkpoints.stored import MANIFEST, checkpoints_in, ignore, open_checkpoint, step_name
from deepscale.checkpoints.writing import BEST
from deepscale.errors import UsageError
from deepscale.models.naming import load_plain, to_plain
from deepscale.models.network import Network


@dataclass(frozen=True)
class Trained:
    """Weights by name, and what is known of them: `metadata` as a weights file has it, the optimiser step where they are a checkpoint's."""

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, str]
    step: int | None = None

    @property
    def described(self) -> dict[str, Any]:
        """What rebuilds the network, and "data": the images it was trained on. Raises UsageError."""
        try:
            return dict(json.loads(self.metadata["deepscale"]))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.path} describes no network ({error}): give another file") from None

    def network(self) -> Network:
        """The network with these weights, on the CPU. Raises UsageError where they do not fit the one that is described."""
        model = weights.network_of(self.metadata)
        if self.metadata.get("layout") != "stacked":
            load_plain(model, self.state)
            return model
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            raise UsageError(f"{self.path} does not hold the tensors of the network it describes: {' '.join(str(error).split())[:300]}") from None
        return model


def trained(path: Path, best: bool = False, warn: Callable[[str], None] = ignore) -> Trained:
    """The weights in `path`: a weights file, a checkpoint (DIR/step-00001200), or DIR with its newest intact one, or the one of best validation.

    A folder without checkpoints gives its model.safetensors. Raises UsageError.
    """
    if best:
        path = _best_in(path)
    if path.is_dir() and not checkpoints_in(path) and not (path / MANIFEST).is_file():
        path = path / weights.WEIGHTS
        if not path.is_file():
            raise UsageError(f"{path.parent} holds no checkpoint and no {path.name}; give a --checkpoint-dir, a folder step-... in it, or a file")
    if not path.is_dir():
        state, metadata = weights.read(path)
        return Trained(path, state, metadata)
    found = open_checkpoint(path, warn)
    described = dict(found.manifest["network"])
    limit = found.progress.get("loop", {}).get("eval_limit")
    if limit is not None:
        described["data"] = described["data"] | {"eval_images": limit}
    return Trained(found.path, found.weights(), {"deepscale": json.dumps(described), "layout": "stacked"}, found.step)


def _best_in(folder: Path) -> Path:
    try:
        return folder / step_name(int(json.loads((folder / BEST).read_text())["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{folder} names no checkpoint of best validation ({BEST}); give a --checkpoint-dir of --checkpoint-every") from None


def convert(source: Path, target: Path, stacked: bool, best: bool = False, warn: Callable[[str], None] = ignore) -> int:
    """Writes the weights in `source` with the plain network's names, or, with `stacked`, with ours; returns the number of tensors."""
    found = trained(source, best, warn)
    model = found.network()
    out = dict(model.state_dict()) if stacked else to_plain(model)
    layout = "stacked" if stacked else "plain"
    weights.write(target, {name: value.clone() for name, value in out.items()}, found.metadata | {"layout": layout})
    return len(out)
