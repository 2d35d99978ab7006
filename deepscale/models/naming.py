"""Between the stacked network's state and the plain network's, by the plain names (`stages.2.blocks.117.dwconv.weight`)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepscale.errors import UsageError
from deepscale.models.convnext import ConvNeXt
from deepscale.models.reference import PlainConvNeXt
from deepscale.models.stack import BlockStack

STATISTICS = ("running_mean", "running_var")


def _places(model: ConvNeXt) -> dict[str, tuple[str, int | None]]:
    """Plain name -> (name in the stacked state, block of its stack), parameters and BatchNorm's running statistics."""
    places = {plain: (where.name, where.index) for plain, where in model.plain_names()}
    for name, _ in model.named_buffers():
        owner, _, statistic = name.rpartition(".statistics.")
        if statistic not in STATISTICS:
            continue
        stage, separator, _ = owner.partition(".stacks.")
        if not separator:
            places[name] = (name, None)
            continue
        module = model.get_submodule(owner)
        assert isinstance(module, BlockStack)
        for i in range(module.blocks):
            places[f"{stage}.blocks.{module.first + i}.norm.statistics.{statistic}"] = (name, i)
    return places


def plain_shapes(model: ConvNeXt) -> dict[str, torch.Size]:
    """Shapes of the plain network's state."""
    with torch.device("meta"):
        plain = PlainConvNeXt(model.config, classes=model.head.linear.out_features, channels=model.stem.conv.in_channels)
    return {name: value.shape for name, value in plain.state_dict().items()}


@torch.no_grad()
def to_plain(model: ConvNeXt, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state (or any tensors of the same names and shapes, such as gradients) by plain names."""
    state = model.state_dict() if values is None else values
    shapes = plain_shapes(model)
    plain = {}
    for name, (place, index) in _places(model).items():
        if place in state:
            value = state[place] if index is None else state[place][index]
            plain[name] = value.reshape(shapes[name])
    return plain


@torch.no_grad()
def load_plain(model: ConvNeXt, state: Mapping[str, Tensor]) -> None:
    """Loads a plain network's state into the stacked model. Raises UsageError for missing, surplus or misshapen tensors."""
    places = _places(model)
    for kind, names in (("missing", places.keys() - state.keys()), ("not part of this network", state.keys() - places.keys())):
        if names:
            raise UsageError(f"{len(names)} tensors are {kind}, among them {min(names)}; check --depth, --norm and --layerscale-init")
    for name, shape in plain_shapes(model).items():
        if state[name].shape != shape:
            raise UsageError(f"{name} has shape {tuple(state[name].shape)}, this network needs {tuple(shape)}; check --width and --kernel-size")
    own = model.state_dict()
    for name, (place, index) in places.items():
        target = own[place] if index is None else own[place][index]
        target.copy_(state[name].reshape(target.shape))
