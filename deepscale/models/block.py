"""One ConvNeXt block (arXiv:2201.03545), as the original study counts it, forward and backward in torch's operators:

    y = dwconv(x); xhat = standardise(y); h = W1 (w * xhat + b) + b1; out = x + factor * (W2 f(h) + b2)

Shapes: x (B, C, H, W) in channels-last memory, so that convolutions see that and the rest rows (M, C) of the same memory, M = B * H * W.
The weights are a stack's, with a leading block axis (n, ...). What is done once per stack instead of once per block:
- the norm's affine part (w, b) is folded into W1 and b1, and, but in fp16, the factor (gamma, and the constants beside it) into W2 and b2.
  Their gradients, and those of W1 and W2, follow from the folded weights' gradients by the chain rule, for all n blocks at once;
- casts to the branch's low precision.
The residual stream and the norm's statistics keep the stream's dtype (float32 under autocast), and the factor is multiplied in it.

`native` does the same as `TorchWork` in one compiled kernel; this is its reference, and what runs elsewhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepscale.models.components import ACTIVATIONS, EPS, ROW_NORMS, SKIPS, BatchStandardise, Standardise, batch_moments
from deepscale.models.observe import BlockObserver

aten = torch.ops.aten


@dataclass(frozen=True)
class BlockSpec:
    """What all blocks of a stage share. `gamma` is "none", "scalar" or "channel"; `scale` multiplies every branch, and is not learnt.

    `channels` are the branch's: the stream's, or half of them in reversible blocks.
    """

    channels: int
    kernel_size: int
    activation: str
    norm: str
    skip: str
    gamma: str
    sync_batchnorm: bool = False
    scale: float = 1.0

    @property
    def adds(self) -> bool:
        """Whether the branch's input is added to it."""
        return SKIPS[self.skip].adds

    @property
    def coupled(self) -> bool:
        """Whether a block is two halves of the channels, of which one gives the branch and the other takes it (reversible.py)."""
        return SKIPS[self.skip].coupled

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.channels * 2 if self.coupled else self.channels

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter shapes of one block, by their names in the plain network."""
        c, k = self.channels, self.kernel_size
        shapes: dict[str, tuple[int, ...]] = {"dwconv.weight": (c, 1, k, k), "dwconv.bias": (c,)}
        if self.norm != "none":
            shapes["norm.weight"] = (c,)
        if self.norm in ("layernorm", "batchnorm"):
            shapes["norm.bias"] = (c,)
        shapes |= {"pwconv1.weight": (4 * c, c), "pwconv1.bias": (4 * c,), "pwconv2.weight": (c, 4 * c), "pwconv2.bias": (c,)}
        if self.gamma != "none":
            shapes["gamma"] = (1,) if self.gamma == "scalar" else (c,)
        return shapes

    @property
    def parameters(self) -> int:
        """Parameters of one block."""
        return sum(math.prod(shape) for shape in self.shapes().values())


# 1.5 * 2^52 times a grid of 2^-32: adding it to a float64 rounds that to the grid, as long as it is below 2^19; float32 above is on it already.
GRID_SHIFT = 1.5 * 2.0**20


def rounded(x: Tensor) -> Tensor:
    """x in float64, as the nearest multiple of 2^-32."""
    return (x.double() + GRID_SHIFT) - GRID_SHIFT


def rows_of(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last memory -> (M, C), the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Weights:
    """A stack's weights made ready for its blocks: folded and cast to the branch's dtype.

    `passing` (n): what multiplies each block's branch in this pass beside gamma and the spec's scale; a block of 0 is left out. None: 1.
    """

    def __init__(
        self, spec: BlockSpec, parameters: Mapping[str, Tensor], stream: torch.dtype, branch: torch.dtype, passing: tuple[float, ...] | None = None
    ) -> None:
        p = {name: value.to(stream) for name, value in parameters.items()}
        w1, b1, w2, b2 = p["pwconv1.weight"], p["pwconv1.bias"], p["pwconv2.weight"], p["pwconv2.bias"]
        if "norm.bias" in p:
            b1 = b1 + (w1 @ p["norm.bias"][:, :, None])[:, :, 0]
        if "norm.weight" in p:
            w1 = w1 * p["norm.weight"][:, None, :]
        # An fp16 branch is scaled in the stream's precision instead: a small factor times W2 would underflow. bf16 has float32's range.
        self.blocks = len(w1)
        self.computed = [i for i in range(self.blocks) if passing is None or passing[i]]
        constants = passing if passing is not None else (1.0,) * self.blocks if spec.scale != 1.0 else None
        self.constant = None if constants is None else b2.new_tensor(constants)[:, None].mul_(spec.scale)  # (n, 1)
        self.factor = p.get("gamma", self.constant) if self.constant is None or "gamma" not in p else p["gamma"] * self.constant  # (n, 1 or C)
        self.apart = self.factor.unbind(0) if self.factor is not None and branch == torch.float16 != stream else None
        if self.factor is not None and self.apart is None:
            w2, b2 = w2 * self.factor[:, :, None], b2 * self.factor
        ready = {"dw": p["dwconv.weight"], "dw_bias": p["dwconv.bias"], "w1": w1, "b1": b1, "w2": w2, "b2": b2}
        self.stacked = {name: value.to(branch) for name, value in ready.items()}  # (n, ...) each
        self.branch, self.stream = branch, stream


@dataclass
class Saved:
    """What one block's backward needs: its input (B, C, H, W), xhat (M, C), inverse deviation, h and a (M, 4C)."""

    x: Tensor
    xhat: Tensor
    inverse: Tensor
    h: Tensor
    a: Tensor


class TorchWork:
    """One stack's pass: the block's forward and backward in plain tensor operations, without autograd."""

    def __init__(self, spec: BlockSpec, weights: Weights, norms: list[Standardise], masks: Tensor | None, observer: BlockObserver | None) -> None:
        self.spec, self.weights, self.norms, self.observer = spec, weights, norms, observer
        self.masks = None if masks is None else masks.unbind(0)  # each (M, 1): 0, or 1 / (1 - rate)
        self.activation = ACTIVATIONS[spec.activation]
        self.dw, self.dw_bias, self.w1, self.b1, self.w2, self.b2 = (value.unbind(0) for value in weights.stacked.values())
        self.w1_t, self.w2_t = (weights.stacked[name].transpose(1, 2).unbind(0) for name in ("w1", "w2"))
        self.one: Tensor | None = None  # (M, 4C) of ones, for an observer

    def forward(self, x: Tensor, i: int, moments: Tensor | None = None) -> Tensor:
        """Block i, of which nothing is kept: (B, C, H, W) -> (B, C, H, W)."""
        return self.kept(x, i, moments)[0]

    def kept(self, x: Tensor, i: int, moments: Tensor | None = None) -> tuple[Tensor, Saved]:
        """Block i, and what its backward needs. With `moments` (2, n, C), BatchNorm's statistics are measured and written there."""
        saved = self.hidden(x, i, moments)
        return self.output(saved, i), saved

    def standard(self, x: Tensor, i: int, moments: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Block i, and what `expanded` needs."""
        saved = self.hidden(x, i, moments)
        return self.output(saved, i), (saved.x, saved.xhat, saved.inverse)

    def hidden(self, x: Tensor, i: int, moments: Tensor | None = None) -> Saved:
        """Block i up to its activation: what its backward needs."""
        w, k = self.weights, self.spec.kernel_size
        y = rows_of(F.conv2d(x.to(w.branch), self.dw[i], self.dw_bias[i], padding=k // 2, groups=self.spec.channels))
        y = y if self.spec.norm == "none" or self.norms[i].takes(y) else y.to(w.stream)
        if moments is not None:
            moments[0, i], moments[1, i] = batch_moments(y, self.spec.sync_batchnorm)
        xhat, inverse = self.norms[i].forward(y)
        return self.expanded(x, xhat.to(w.branch), inverse, i)

    def expanded(self, x: Tensor, xhat: Tensor, inverse: Tensor, i: int) -> Saved:
        """Block i from xhat (M, C) to its activation."""
        h = torch.addmm(self.b1[i], xhat, self.w1_t[i])
        return Saved(x, xhat, inverse, h, self.activation.forward(h))

    def output(self, saved: Saved, i: int) -> Tensor:
        """Block i from its activation to its output (B, C, H, W)."""
        w = self.weights
        x = saved.x
        out = torch.addmm(self.b2[i], saved.a, self.w2_t[i])  # (M, C)
        if w.apart is not None:
            out = out * w.apart[i]
        if self.masks is not None:
            out = out * self.masks[i]
        if self.spec.adds:
            out = out.add_(rows_of(x)) if out.dtype == w.stream else rows_of(x) + out  # in the stream's precision
        elif out.dtype != w.stream:
            out = out.to(w.stream)
        batch, channels, height, width = x.shape
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def couple(self, half: Tensor, out: Tensor, sign: int) -> Tensor:
        """half (B, C, H, W) += sign * out, a branch's output, rounded where the half is wider; gives a copy of the sum in the stream's dtype."""
        half.add_(out if half.dtype == out.dtype else rounded(out), alpha=sign)
        return half.to(self.weights.stream, copy=True)

    def backward(self, g: Tensor, saved: Saved, i: int, grads: "Gradients") -> Tensor:
        """Gradient (M, C) on block i's output -> on its input; the folded weights' gradients are written to `grads`."""
        w, k, c = self.weights, self.spec.kernel_size, self.spec.channels
        if self.observer is not None:
            self.observer.gradient(i, g)
            if i:
                self.observer.output(i - 1, saved.x)
        masked = g if self.masks is None else g * self.masks[i]
        branch = masked.to(w.branch)
        scaled = branch if w.apart is None else (masked * w.apart[i]).to(w.branch)
        grads.write(grads.w2, i, branch.t(), saved.a)  # (C, 4C)
        torch.sum(masked, 0, out=grads.b2[i])
        dh = self.through_activation(scaled @ self.w2[i], saved, i)  # (M, 4C)
        torch.sum(dh, 0, dtype=w.stream, out=grads.b1[i])
        grads.write(grads.w1, i, saved.xhat.t(), dh)  # (C, 4C)
        dxhat = dh @ self.w1[i]
        low = self.spec.norm == "none" or self.norms[i].takes(dxhat)
        rows = (dxhat, saved.xhat) if low else (dxhat.to(w.stream), saved.xhat.to(w.stream))
        dy = self.norms[i].backward(*rows, saved.inverse)
        batch, _, height, width = saved.x.shape
        dy = dy.to(w.branch).view(batch, height, width, c).permute(0, 3, 1, 2)
        dx, dw, dw_bias = aten.convolution_backward(
            dy, saved.x.to(w.branch), self.dw[i], [c], [1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], c, [True, True, True]
        )
        grads.dw[i].copy_(dw)
        grads.dw_bias[i].copy_(dw_bias)
        return rows_of(dx).to(w.stream).add_(g) if self.spec.adds else rows_of(dx).to(w.stream)

    def through_activation(self, g: Tensor, saved: Saved, i: int) -> Tensor:
        """Gradient (M, 4C) on block i's activation -> on its input. An observer is shown f', which is then used if that changes no bit."""
        observer, f = self.observer, self.activation
        if observer is None or not observer.activations:
            return f.backward(g, saved.h, saved.a)
        if self.one is None:
            self.one = torch.ones_like(saved.h)
        derivative = f.backward(self.one, saved.h, saved.a)
        dh = g.mul_(derivative) if f.product and g.dtype == self.weights.stream else f.backward(g, saved.h, saved.a)
        observer.derivative(i, derivative)
        return dh


class Gradients:
    """Gradients of a stack's folded weights, filled block by block, then unfolded for all blocks at once. Those of blocks left out are 0."""

    def __init__(self, spec: BlockSpec, weights: Weights, like: Tensor) -> None:
        self.weights = weights
        n, c, k = weights.blocks, spec.channels, spec.kernel_size
        self.stacked = {
            "dw": like.new_empty(n, c, 1, k, k),
            "dw_bias": like.new_empty(n, c),
            "w1": like.new_empty(n, c, 4 * c),
            "b1": like.new_empty(n, 4 * c),
            "w2": like.new_empty(n, c, 4 * c),
            "b2": like.new_empty(n, c),
        }
        if len(weights.computed) < n:
            for value in self.stacked.values():
                value.zero_()
        self.dw, self.dw_bias, self.w1, self.b1, self.w2, self.b2 = (value.unbind(0) for value in self.stacked.values())

    @staticmethod
    def write(into: tuple[Tensor, ...], i: int, left: Tensor, right: Tensor) -> None:
        """into[i] = left @ right, in the branch's dtype and kept in the stream's."""
        if left.dtype == into[i].dtype:
            torch.mm(left, right, out=into[i])
        else:
            into[i].copy_(left @ right)

    def unfolded(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the stack's own parameters, by the chain rule through the folding."""
        s = self.stacked
        p = {name: value.to(s["b2"].dtype) for name, value in parameters.items()}
        w1, b1, w2, b2 = torch.empty_like(p["pwconv1.weight"]).copy_(s["w1"].transpose(1, 2)), s["b1"], s["w2"], s["b2"]
        grads = {"dwconv.weight": s["dw"], "dwconv.bias": s["dw_bias"], "pwconv1.bias": b1}
        if "norm.weight" in p:  # W1' = W1 * w, b1' = b1 + W1 b
            grads["norm.weight"] = (w1 * p["pwconv1.weight"]).sum(1)
            w1.mul_(p["norm.weight"][:, None, :])
        if "norm.bias" in p:
            grads["norm.bias"] = (b1[:, None, :] @ p["pwconv1.weight"])[:, 0, :]
            w1.addcmul_(b1[:, :, None], p["norm.bias"][:, None, :])
        factor, constant = self.weights.factor, self.weights.constant
        if "gamma" in p:  # W2' = gamma constant W2, b2' = gamma constant b2
            gamma = (w2 * p["pwconv2.weight"]).sum(2) + b2 * p["pwconv2.bias"]
            gamma = gamma if constant is None else gamma * constant
            grads["gamma"] = gamma.sum(1, keepdim=True) if p["gamma"].shape[1] == 1 else gamma
        if factor is not None:
            w2, b2 = w2.mul_(factor[:, :, None]), b2 * factor
        grads |= {"pwconv1.weight": w1, "pwconv2.weight": w2, "pwconv2.bias": b2}
        return {name: grads[name].to(value.dtype) for name, value in parameters.items()}


def norms_of(spec: BlockSpec, blocks: int, moments: Tensor | None, fixed: bool) -> list[Standardise]:
    if moments is None:
        return [ROW_NORMS[spec.norm](EPS[spec.norm])] * blocks
    means, variances = moments.unbind(0)
    pairs = zip(means.unbind(0), variances.unbind(0), strict=True)
    return [BatchStandardise(EPS[spec.norm], mean, variance, fixed, spec.sync_batchnorm) for mean, variance in pairs]
