"""Layers that stay as they are while others are trained: --freeze.

A frozen parameter takes no gradient and is in no group of the optimiser, so neither momentum nor weight decay moves it; a frozen
BatchNorm keeps its running statistics, and goes on to normalise training batches by their own.
"""

from collections.abc import Iterator

from deepscale.errors import UsageError
from deepscale.models.components import RunningStatistics
from deepscale.models.network import Network, PlainName


def numbered(model: Network) -> Iterator[tuple[str, PlainName, int]]:
    """(plain name, place, layer) of every parameter, in path order, layers counted from 1 as --depth counts them.

    A layer is a convolution or a linear one, but for ConvNeXt's downsamplings; what comes before the next one goes with it.
    """
    layer = 0
    for plain, place in model.plain_names():
        owner, _, kind = plain.rpartition(".")
        layer += kind == "weight" and not owner.endswith("norm") and ".downsample." not in plain
        yield plain, place, layer


def freeze(model: Network, layers: int) -> None:
    """Freezes the first `layers` layers. Raises UsageError where nothing is left to train, and where only some of a tensor's blocks are meant."""
    if not layers:
        return
    found: dict[str, list[int]] = {}
    for _, place, layer in numbered(model):
        found.setdefault(place.name, []).append(layer)
    last = max(numbers[-1] for numbers in found.values())
    if layers >= last:
        raise UsageError(f"--freeze {layers} leaves nothing to train: the network has {last} layers; type --freeze {last - 1} or less")
    parameters = dict(model.named_parameters())
    for name, numbers in found.items():
        if numbers[0] <= layers < numbers[-1]:
            raise UsageError(
                f"--freeze {layers} ends within the stack of layers {numbers[0]} to {numbers[-1]}, which share their parameter tensors; "
                f"type --stack-size 1, or another --freeze"
            )
        parameters[name].requires_grad_(numbers[-1] > layers)
    for module in model.modules():
        for child in module.children():
            if isinstance(child, RunningStatistics):
                child.frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
