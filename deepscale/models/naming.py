"""Between a network's state and the plain network's, by the plain names (`stages.2.blocks.117.dwconv.weight`).

Of a network without stacks both are the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepscale.errors import UsageError
from deepscale.models.network import Network

STATISTICS = ("running_mean", "running_var")


def places_of(model: Network) -> dict[str, tuple[str, int | None]]:
    """Plain name -> (name in the stacked state, block of its stack), parameters and BatchNorm's running statistics."""
    places = {plain: (where.name, where.index) for plain, where in model.plain_names()}
    stacks = {id(stack): (prefix, stack) for prefix, stack in model.stacks()}
    for name, _ in model.named_buffers():
        owner, _, statistic = name.rpartition(".statistics.")
        if statistic not in STATISTICS:
            continue
        module = model.get_submodule(owner)
        if id(module) not in stacks:
            places[name] = (name, None)
            continue
        prefix, stack = stacks[id(module)]
        for i in range(stack.blocks):
            places[f"{prefix}.{stack.first + i}.norm.statistics.{statistic}"] = (name, i)
    return places


def plain_shapes(model: Network) -> dict[str, torch.Size]:
    """Shapes of the plain network's state."""
    with torch.device("meta"):
        plain = model.plain()
    return {name: value.shape for name, value in plain.state_dict().items()}


@torch.no_grad()
def to_plain(model: Network, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state (or any tensors of the same names and shapes, such as gradients) by plain names."""
    state = model.state_dict() if values is None else values
    shapes = plain_shapes(model)
    plain = {}
    for name, (place, index) in places_of(model).items():
        if place in state:
            value = state[place] if index is None else state[place][index]
            plain[name] = value.reshape(shapes[name])
    return plain


@torch.no_grad()
def load_plain(model: Network, state: Mapping[str, Tensor]) -> None:
    """Loads a plain network's state into the stacked model. Raises UsageError for missing, surplus or misshapen tensors."""
    places = places_of(model)
    for kind, names in (("missing", places.keys() - state.keys()), ("not part of this network", state.keys() - places.keys())):
        if names:
            raise UsageError(f"{len(names)} tensors are {kind}, among them {min(names)}; check --model, --depth, --norm and --layerscale-init")
    for name, shape in plain_shapes(model).items():
        if state[name].shape != shape:
            raise UsageError(f"{name} has shape {tuple(state[name].shape)}, this network needs {tuple(shape)}; check --width and --kernel-size")
    own = model.state_dict()
    for name, (place, index) in places.items():
        target = own[place] if index is None else own[place][index]
        target.copy_(state[name].reshape(target.shape))
