"""Weights to start from: those of another run, as far as they fit. --init-from."""

from collections.abc import Callable
from pathlib import Path

import torch

from deepscale.checkpoints.trained import trained
from deepscale.errors import UsageError
from deepscale.models.freezing import numbered
from deepscale.models.naming import places_of, plain_shapes, to_plain
from deepscale.models.network import Network

NAMED = 4  # tensors that a line names


def check_there(path: str | None) -> None:
    """Raises UsageError where there is no such file or folder."""
    if path is not None and not Path(path).exists():
        raise UsageError(
            f"--init-from {path}: there is no such file or folder; give the model.safetensors of a run's --checkpoint-dir, or that folder"
        )


@torch.no_grad()
def start_from(path: Path, model: Network, layers: int | None, say: Callable[[str], None]) -> None:
    """Overwrites initial values with the weights in `path` (as `trained` takes it) that have the plain name and shape of one here.

    `layers`: of the first so many layers alone. What does not fit keeps its initial value, which `say` is told. Raises UsageError
    where nothing fits.
    """
    found = trained(path, warn=say)
    state = to_plain(found.network()) if found.metadata.get("layout") == "stacked" else found.state
    number = {plain: layer for plain, _, layer in numbered(model)}
    own, shapes, places = model.state_dict(), plain_shapes(model), places_of(model)
    wanted = [name for name in places if layers is None or _layer(name, number) <= layers]
    fits = [name for name in wanted if name in state and state[name].shape == shapes[name]]
    if not fits:
        raise UsageError(f"no tensor in {found.path} has the name and shape of one of this network; check --model, --depth and --width")
    for name in fits:
        place, index = places[name]
        target = own[place] if index is None else own[place][index]
        target.copy_(state[name].reshape(target.shape))
    say(f"{len(fits):,} of the network's {len(places):,} tensors start from {found.path}{_others([n for n in places if n not in set(fits)])}")


def _layer(name: str, number: dict[str, int]) -> int:
    """The layer of a parameter, or of a norm's running statistics."""
    return number[name] if name in number else number[f"{name.rpartition('.statistics.')[0]}.weight"]


def _others(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"; with initial values as --init says: {', '.join(names[:NAMED])}{more}"
