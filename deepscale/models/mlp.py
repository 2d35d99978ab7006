"""The multilayer perceptron (MLP) of the seven remedies (https://github.com/T-Sunm/Vanishing-Gradient): hidden layers of one width, a head.

A hidden layer is activation(norm(linear(x))); depth counts the hidden layers and the head. Skip connections add one hidden layer's
output to a later one's. The study's two own parts are `TensorNorm` and `normalised_gradient`.

Shapes: B batch, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from deepscale.config import ModelConfig
from deepscale.errors import UsageError
from deepscale.models.components import MODULES, ChannelNorm
from deepscale.models.network import Network
from deepscale.models.registry import Images
from deepscale.parsing import parse_pairs

GRADIENT_EPS = 1e-6  # the study's
Pairs = tuple[tuple[int, int], ...]


class _NormalisedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (g,) = grads
        return (g - g.mean()) / (g.std() + GRADIENT_EPS)


def normalised_gradient(x: Tensor) -> Tensor:
    """x as it is; backward, its gradient g becomes (g - mean g) / (std g + 1e-6).

    Mean and standard deviation are over all elements of g (B, D), of this rank and micro batch; the deviation is the sample's, with
    N - 1 below the root, as torch.std's. What multiplies the loss (fp16's loss scale, the share of a micro batch) does not come through.
    """
    made: Tensor = _NormalisedGradient.apply(x)
    return made


class TensorNorm(nn.Module):
    """(x - mean x) / std x over all elements of x (B, D), without parameters; the deviation is the sample's (N - 1), as torch.std's.

    The statistics are those of the batch that is there, in evaluation too: what comes out for one image depends on the others.
    """

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean()) / x.std()


class HiddenLayer(nn.Module):
    """activation(norm(linear(x))): (B, inputs) -> (B, width); the gradient that comes to its output is normalised where that is asked for."""

    def __init__(self, model: ModelConfig, inputs: int) -> None:
        super().__init__()
        assert isinstance(model.width, int)
        self.linear = nn.Linear(inputs, model.width)
        self.norm = TensorNorm() if model.norm == "tensornorm" else ChannelNorm(model.norm, model.width, model.sync_batchnorm)
        self.activation = MODULES[model.activation]()
        self.normalises = model.gradient_normalisation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.linear(x)))
        return normalised_gradient(x) if self.normalises else x


def skip_connections(model: ModelConfig) -> Pairs:
    """(from, to) of hidden layers, counted from 1: --skip-pairs, or with --skip identity from each to the next. Raises UsageError."""
    hidden = model.depth - 1
    if model.skip_pairs is None:
        return tuple((i, i + 1) for i in range(1, hidden)) if model.skip == "identity" else ()
    if model.skip == "identity":
        raise UsageError("--skip identity connects every hidden layer with the next, and --skip-pairs was given, too; leave one of them out")
    pairs = parse_pairs(model.skip_pairs)
    if last := [second for _, second in pairs if second > hidden]:
        raise UsageError(f"--skip-pairs {model.skip_pairs} leads to hidden layer {last[0]}, and --depth {model.depth} has {hidden} hidden layers")
    return pairs


class MLP(Network):
    """images (B, channels, side, side) -> logits (B, classes)."""

    def __init__(self, model: ModelConfig, images: Images) -> None:
        super().__init__()
        assert isinstance(model.width, int), "resolve auto first (plan.py)"
        self.config, hidden = model, model.depth - 1
        self.skips = skip_connections(model)
        self.starts = {first for first, _ in self.skips}
        sizes = [images.channels * images.side**2, *[model.width] * hidden]
        self.hidden = nn.ModuleList(HiddenLayer(model, inputs) for inputs in sizes[:-1])
        self.head = nn.Linear(sizes[-1], images.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        outputs: dict[int, Tensor] = {}  # of the layers that a skip connection starts from
        for i, layer in enumerate(self.hidden, start=1):
            x = layer(x)
            for first, second in self.skips:
                if second == i:
                    x = x + outputs[first]
            if i in self.starts:
                outputs[i] = x
        return self.head(x)
