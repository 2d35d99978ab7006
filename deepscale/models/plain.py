"""A plain network of any depth: convolutions and activations, no norm, no skip connection, no gamma (Xiao et al., arXiv:1806.05393).

    x_0 = f(stem(image)); x_i = f(W_i * x_{i-1} + b_i), i = 1 ... n; logits = linear(mean of x_n over its pixels)

W_i are 3x3 convolutions C -> C, padded with zeros; the stem is a p x p convolution of stride p. Depth counts stem, layers and head.
As the blocks of ConvNeXt, layers are stacked: one module holds many, its parameters carry a leading layer axis (n, C, C, 3, 3), and it
is one node of autograd with a hand-written backward. `UnstackedPlain` is the same network layer by layer, its reference.

The paper's network has circular padding in theory, shrinks the image by strided 3x3 convolutions, and is 256 channels wide.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepscale.config import ModelConfig
from deepscale.models.components import ACTIVATIONS, no_autocast
from deepscale.models.convnext import split_evenly, stream
from deepscale.models.network import Network, PlainName
from deepscale.models.observe import BlockObserver
from deepscale.models.stack import Keeping

aten = torch.ops.aten
OUTSIDE = 2  # layers that are in no stack: stem and head
FROM_OUTPUT = ("tanh", "sigmoid", "relu")  # f' is known from f(h), and h need not be kept


class _LayersFunction(torch.autograd.Function):
    """The stack as one node of autograd. See LayerStack.forward for the arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: "LayerStack", branch: torch.dtype, keeping: Keeping | None, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype, x = x.dtype, x.to(branch)
        work = _Work(stack.activation, weight.to(branch), bias.to(branch))
        kept: list[Any] = []
        for i in range(len(weight)):
            if keeping is not None and keeping.segment and i % keeping.segment == 0:
                kept.append(x if keeping.store is None else keeping.store.put(x))
            h, a = work.forward(x, i)
            if keeping is not None and not keeping.segment:
                kept.append((x, h, a))
            x = a
            if stack.observer is not None and (stack.observer.without_gradients if keeping is None else i == len(weight) - 1):
                stack.observer.output(i, x)  # with gradients, backward shows the others
        ctx.save_for_backward(weight, bias)
        ctx.stack, ctx.kept, ctx.keeping, ctx.branch, ctx.observer = stack, kept, keeping, branch, stack.observer
        return x.to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        if not ctx.kept:
            raise RuntimeError("second backward through one forward pass: a LayerStack frees its activations as it goes; run the forward pass again")
        weight, bias = ctx.saved_tensors
        work = _Work(ctx.stack.activation, weight.to(ctx.branch), bias.to(ctx.branch))
        dw, db = torch.empty_like(weight), torch.empty_like(bias)
        g = outputs[0].to(ctx.branch).contiguous(memory_format=torch.channels_last)
        saved: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in reversed(range(len(weight))):
            if not saved:
                saved = _again(work, ctx.kept.pop(), ctx.keeping, i)
            x, h, a = saved.pop()
            if ctx.observer is not None:
                ctx.observer.gradient(i, g)
                if i:
                    ctx.observer.output(i - 1, x)
                if ctx.observer.activations:
                    ctx.observer.derivative(i, work.derivative(h, a))
            g, dw[i], db[i] = work.backward(g, x, h, a, i)
        return g.to(ctx.dtype), None, None, None, dw, db


def _again(work: "_Work", part: Any, keeping: Keeping, last: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the backward of layer `last`, or of the segment that it ends, needs: x, h and a of each, from what `forward` kept."""
    if not keeping.segment:
        return [part]
    x, again = part if keeping.store is None else keeping.store.get(part), []
    for i in range(last - last % keeping.segment, last + 1):
        h, a = work.forward(x, i)
        again.append((x, h, a))
        x = a
    return again


class _Work:
    """The maths of a layer, h = W * x + b and a = f(h), without autograd; images (B, C, H, W) in channels-last memory."""

    def __init__(self, activation: str, weight: Tensor, bias: Tensor) -> None:
        self.activation, self.from_output = ACTIVATIONS[activation], activation in FROM_OUTPUT
        self.w, self.b, self.channels = weight.unbind(0), bias.unbind(0), bias.shape[1]

    def forward(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """x -> h, a; where f' follows from a, that stands for h."""
        h = F.conv2d(x, self.w[i], self.b[i], padding=1)
        a = self.activation.forward(h)
        return (a, a) if self.from_output else (h, a)

    def backward(self, g: Tensor, x: Tensor, h: Tensor, a: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient on layer i's output -> on its input, weight and bias."""
        dh = self.activation.backward(g, h, a)
        found: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
            dh, x, self.w[i], [self.channels], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
        )
        return found

    def derivative(self, h: Tensor, a: Tensor) -> Tensor:
        """f'(h) of rows (M, C)."""
        return self.activation.backward(torch.ones_like(h), h, a).permute(0, 2, 3, 1).reshape(-1, self.channels)


class LayerStack(nn.Module):
    """Layers `first` ... `first + blocks - 1`, a block each: weight (n, C, C, 3, 3), bias (n, C).

    `keeping` says what forward leaves for backward; at first the input of the stack alone, whose layers are computed again: of n layers
    in sqrt(n) stacks, 2 sqrt(n) images are held at a time. While an `observer` is attached, passes show it every layer.
    """

    observer: BlockObserver | None = None

    def __init__(self, activation: str, channels: int, first: int, blocks: int) -> None:
        super().__init__()
        self.activation, self.units, self.first, self.blocks = activation, channels, first, blocks
        self.weight = nn.Parameter(torch.empty(blocks, channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(blocks, channels))
        self.keeping = Keeping(segment=blocks)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W); computed in autocast's dtype where that is on."""
        device, low = x.device.type, not x.is_meta and torch.is_autocast_enabled(x.device.type)
        branch = torch.get_autocast_dtype(device) if low else self.weight.dtype
        keeping = self.keeping if torch.is_grad_enabled() else None
        with no_autocast(x):
            x = x.contiguous(memory_format=torch.channels_last)
            return _LayersFunction.apply(x, self, branch, keeping, self.weight, self.bias)


class _Plain(Network):
    """Stem, layers and head; what both forms share."""

    head: nn.ModuleDict  # registered after the layers: parameters are listed in path order

    def __init__(self, model: ModelConfig, classes: int, channels: int) -> None:
        super().__init__()
        assert isinstance(model.width, int) and isinstance(model.patch_size, int), "resolve auto first (plan.py)"
        self.config, self.width, self.f = model, model.width, ACTIVATIONS[model.activation].forward
        self.classes, self.image_channels = classes, channels
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(channels, model.width, model.patch_size, model.patch_size)})

    def forward(self, x: Tensor) -> Tensor:
        x = stream(self.f(self.stem["conv"](x.contiguous(memory_format=torch.channels_last))))
        logits: Tensor = self.head["linear"](self.body(x).mean((2, 3)))
        return logits

    def body(self, x: Tensor) -> Tensor:
        """The layers between stem and head, (B, C, H, W) -> (B, C, H, W)."""
        raise NotImplementedError


class Plain(_Plain):
    """images (B, channels, H, W) -> logits (B, classes), in stacks of about sqrt(n) of the n layers, or of `stack_size` at most."""

    def __init__(self, model: ModelConfig, *, classes: int = 10, channels: int = 3, stack_size: int | None = None) -> None:
        super().__init__(model, classes, channels)
        layers = model.built_depth - OUTSIDE
        sizes = split_evenly(layers, stack_size or max(1, round(math.sqrt(layers))))
        stacks = [LayerStack(model.activation, self.width, sum(sizes[:i]), n) for i, n in enumerate(sizes)]
        self.groups = nn.ModuleList(stacks)
        self.path = tuple(stacks)  # the same stacks, with their type
        self.head = nn.ModuleDict({"linear": nn.Linear(self.width, classes)})

    def body(self, x: Tensor) -> Tensor:
        for stack in self.path:
            x = stack(x)
        return x

    def stacks(self) -> Iterator[tuple[str, LayerStack]]:
        """Every stack, with the prefix of its layers' names in the unstacked network."""
        return (("layers", stack) for stack in self.path)

    def plain(self) -> nn.Module:
        """The unstacked network of the same sizes, without values."""
        return UnstackedPlain(self.config, classes=self.classes, channels=self.image_channels)

    def plain_names(self) -> Iterator[tuple[str, PlainName]]:
        """(name in the unstacked network, place here) of every parameter, in path order from image to logits."""
        for name in ("stem.conv.weight", "stem.conv.bias"):
            yield name, PlainName(name, None)
        for t, stack in enumerate(self.path):
            for i in range(stack.blocks):
                for kind in ("weight", "bias"):
                    yield f"layers.{stack.first + i}.{kind}", PlainName(f"groups.{t}.{kind}", i)
        for name in ("head.linear.weight", "head.linear.bias"):
            yield name, PlainName(name, None)


class UnstackedPlain(_Plain):
    """The same network of separate modules, with autograd throughout and the same initial values."""

    def __init__(self, model: ModelConfig, *, classes: int = 10, channels: int = 3) -> None:
        super().__init__(model, classes, channels)
        self.layers = nn.ModuleList(nn.Conv2d(self.width, self.width, 3, padding=1) for _ in range(model.built_depth - OUTSIDE))
        self.head = nn.ModuleDict({"linear": nn.Linear(self.width, classes)})

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.f(layer(x))
        return x
