"""Which layer is to blame for a loss that is not finite. Looked for only then, so it may take its time.

Backward spreads one NaN over all gradients, and a step over all weights. So the weights are looked at first, then the outputs of a forward
pass of the same images, and gradients only where both are finite. Every rank must call, and all come to the same layer.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepscale.engine import Engine, Share
from deepscale.gradflow.measure import rows_of
from deepscale.models.network import Network
from deepscale.models.observe import BlockObserver
from deepscale.world import World


def culprit(model: Network, engine: Engine, world: World, images: Iterable[Tensor]) -> str:
    """Half a sentence on the layer; between the last backward and step, with the micro batches of the step."""
    names = [name for name, _ in model.plain_names()]
    weights = flagged(model, engine, world, lambda share: share.weight)
    if len(weights) == len(names):
        return "no weight is finite any more: a gradient overflowed in the step before"
    if weights:
        return f"the first weight that is not finite is {weights[0]}"
    output = first_output(model, engine, world, images)
    if output is not None:
        return f"all weights are finite, and the first layer whose output is not is {output}"
    gradients = flagged(model, engine, world, lambda share: share.gradient)
    if gradients:
        return f"all weights and outputs are finite, and the first gradient that is not is that of {gradients[0]}"
    return "all weights, outputs and gradients are still finite"


def flagged(model: Network, engine: Engine, world: World, values_of: Callable[[Share], Tensor]) -> list[str]:
    """Names in the plain network, in path order, of the parameters of which this value holds a NaN or an infinity on any rank."""
    places = list(model.plain_names())
    at = {(where.name, where.index or 0): i for i, (_, where) in enumerate(places)}
    stacked = {where.name for _, where in places if where.index is not None}
    flags = torch.zeros(len(places), device=world.device)
    for name, parameter in model.named_parameters():
        share = engine.share(parameter)
        values = values_of(share)
        if bool(torch.isfinite(values).all()):
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a parameter flat and empty
        size = shape.numel() // (shape[0] if name in stacked else 1)
        for first, rows in rows_of(values, share.start, size):
            for row in (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist():
                flags[at[name, first + row]] = 1.0
    return [places[i][0] for i in world.sum(flags).nonzero().flatten().tolist()]


@torch.no_grad()
def first_output(model: Network, engine: Engine, world: World, images: Iterable[Tensor]) -> str | None:
    """The first layer outside the blocks, or block, in path order whose output is not finite in a forward pass of these images on any rank."""
    layers = list(dict.fromkeys(_layers(model)))
    at = {layer: i for i, layer in enumerate(layers)}
    flags = torch.zeros(len(layers), device=world.device)

    def see(layer: str, output: Tensor) -> None:
        flags[at[layer]] += (~torch.isfinite(output).all()).to(flags)

    with _watched(model, set(layers), see):
        for batch in images:
            engine.forward(batch)
    bad = world.sum(flags).nonzero().flatten().tolist()
    return layers[bad[0]] if bad else None


def _layers(model: Network) -> Iterator[str]:
    """In path order: the block of each parameter in a stack, and the layer of any other, what has one output to look at."""
    prefixes = list(dict.fromkeys(prefix for prefix, _ in model.stacks()))
    for plain, where in model.plain_names():
        if where.index is None:
            yield plain.rpartition(".")[0]
        else:
            prefix = next(prefix for prefix in prefixes if plain.startswith(f"{prefix}."))
            yield f"{prefix}.{plain[len(prefix) + 1 :].split('.')[0]}"


class _Outputs(BlockObserver):
    """Sees the outputs of a stack's blocks, and keeps nothing."""

    without_gradients = True

    def __init__(self, see: Callable[[int, Tensor], None]) -> None:
        super().__init__(0, 0, torch.device("cpu"))
        self.see = see

    def output(self, i: int, x: Tensor) -> None:
        self.see(i, x)


@contextmanager
def _watched(model: Network, layers: set[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While inside, `see` is shown the output of every one of the layers in each forward pass without gradients."""
    hooks = []
    for name, module in model.named_modules():
        if name in layers:
            hooks.append(module.register_forward_hook(_shown(name, see)))
    for prefix, stack in model.stacks():
        stack.observer = _Outputs(lambda i, x, prefix=prefix, first=stack.first: see(f"{prefix}.{first + i}", x))  # type: ignore[misc]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for _, stack in model.stacks():
            stack.observer = None


def _shown(name: str, see: Callable[[str, Tensor], None]) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda module, given, output: see(name, output)
