"""What loop, recorder, checkpoints and engines need to know of a network, whatever it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import nn

from deepscale.config import ModelConfig
from deepscale.models.components import RunningStatistics
from deepscale.models.initial import fill_all
from deepscale.models.observe import BlockObserver


@dataclass(frozen=True)
class PlainName:
    """Where a parameter of the plain network lives: parameter `name`, block `index` of its stack or None."""

    name: str
    index: int | None


class Stack(Protocol):
    """Consecutive equal blocks whose parameters share tensors (blocks, ...), from block `first` of their stage on.

    `units`: outputs of a block's activation. While an `observer` is attached, passes show it every block.
    """

    first: int
    blocks: int
    observer: BlockObserver | None

    @property
    def units(self) -> int:
        """Outputs of a block's activation for each pixel."""
        ...


class Network(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes).

    A network registers its parameters in path order, calls its norms "norm" or "...norm", and has BatchNorm from components.py, whose running
    statistics count a step once. One with stacks says so by `stacks`, `plain_names` and `plain`; others go by their modules.
    """

    config: ModelConfig

    def initialise(self, seed: int) -> Self:
        """Writes all initial values (initial.py)."""
        with torch.no_grad():
            parameters = dict(self.named_parameters())
            # On the meta device are parts that another process has.
            own = ((plain, at) for plain, at in self.plain_names() if not parameters[at.name].is_meta)
            places = ((plain, parameters[at.name] if at.index is None else parameters[at.name][at.index]) for plain, at in own)
            fill_all(places, seed, self.config)
            for module in self.modules():
                if isinstance(module, RunningStatistics):
                    module.reset_parameters()
        return self

    def stacks(self) -> Iterator[tuple[str, Stack]]:
        """(prefix of its blocks' names in the plain network, such as "stages.2.blocks", stack) of every stack, in path order."""
        return iter(())

    def parts(self) -> list[nn.Module]:
        """The modules that a pass calls one after the other, each on what the one before it gives; none where a pass is more than that."""
        return []

    def plain_names(self) -> Iterator[tuple[str, PlainName]]:
        """(name in the plain network, place here) of every parameter, in path order from image to logits."""
        return ((name, PlainName(name, None)) for name, _ in self.named_parameters())

    def plain(self) -> nn.Module:
        """The network without stacks, without values: for the shapes of its state."""
        return self


def has_stacks(model: Network) -> bool:
    """Whether equal blocks of it share parameter tensors."""
    return next(model.stacks(), None) is not None


def first_layer(model: nn.Module) -> nn.Module:
    """The module with the first weight of two dimensions or more: the first layer on the path."""
    for module in model.modules():
        # ZeRO-3 leaves a parameter flat and empty.
        if any(len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 for parameter in module.parameters(recurse=False)):
            return module
    raise ValueError("the network has no layer")
