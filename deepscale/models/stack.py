"""BlockStack: n consecutive equal ConvNeXt blocks as one module whose parameters carry a leading block axis (n, ...).

At depth everything that costs per parameter tensor or per operator dominates, so a stack is also one node of autograd with
a hand-written backward (`_StackFunction`). The block is ConvNeXt's (arXiv:2201.03545) as the original study counts it:

    y = dwconv(x); xhat = standardise(y); h = W1 (w * xhat + b) + b1; out = x + gamma * (W2 f(h) + b2)

What is done once per stack instead of once per block:
- the norm's affine part (w, b) is folded into W1 and b1, and, but in fp16, gamma into W2 and b2. Their gradients, and
  those of W1 and W2, follow from the folded weights' gradients by the chain rule, for all n blocks at once;
- casts to the branch's low precision.
The residual stream and the norm's statistics keep the stream's dtype (float32 under autocast), and gamma is multiplied in it.

What a forward pass leaves for its backward is the stack's `keeping`: all that backward needs, a part of it, or only the input of
every segment of blocks (arXiv:1604.06174), whose forward then runs again. Segments may be smaller than stacks: fewer blocks are
held at once and stay in cache, at no more tensors. Tensors stay in channels-last memory, so that convolutions see (B, C, H, W)
and the rest rows (M, C) of the same memory.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepscale.models import native
from deepscale.models.components import ACTIVATIONS, EPS, ROW_NORMS, BatchStandardise, RunningStatistics, Standardise, batch_moments, batch_rows
from deepscale.models.observe import BlockObserver

aten = torch.ops.aten


@dataclass(frozen=True)
class BlockSpec:
    """What all blocks of a stage share. `gamma` is "none", "scalar" or "channel"."""

    channels: int
    kernel_size: int
    activation: str
    norm: str
    skip: str
    gamma: str
    sync_batchnorm: bool = False

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


class Store(Protocol):
    """Where the inputs of segments rest between forward and backward."""

    def put(self, x: Tensor) -> Any:
        """Takes x (B, C, H, W); what it gives stands for x, which is forgotten when that is."""
        ...

    def get(self, resting: Any) -> Tensor:
        """The x that was put, equal in every bit. Once, and those of one forward pass the last one first."""
        ...


@dataclass(frozen=True)
class Keeping:
    """What a stack's forward pass leaves for its backward; every choice gives the same values.

    `segment` 0: what each block's backward needs, but for h and a unless `hidden`; n: the inputs of every n blocks, in the
    `store` if there is one.
    """

    segment: int = 0
    hidden: bool = True
    store: Store | None = None


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last memory -> (M, C), the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _Weights:
    """A stack's weights made ready for its blocks: folded and cast to the branch's dtype."""

    def __init__(self, spec: BlockSpec, parameters: dict[str, Tensor], stream: torch.dtype, branch: torch.dtype) -> None:
        p = {name: value.to(stream) for name, value in parameters.items()}
        w1, b1, w2, b2 = p["pwconv1.weight"], p["pwconv1.bias"], p["pwconv2.weight"], p["pwconv2.bias"]
        if "norm.bias" in p:
            b1 = b1 + (w1 @ p["norm.bias"][:, :, None])[:, :, 0]
        if "norm.weight" in p:
            w1 = w1 * p["norm.weight"][:, None, :]
        # An fp16 branch is scaled in the stream's precision instead: a small gamma times W2 would underflow. bf16 has float32's range.
        self.gamma = p["gamma"].unbind(0) if "gamma" in p and branch == torch.float16 != stream else None
        if "gamma" in p and self.gamma is None:
            w2, b2 = w2 * p["gamma"][:, :, None], b2 * p["gamma"]
        ready = {"dw": p["dwconv.weight"], "dw_bias": p["dwconv.bias"], "w1": w1, "b1": b1, "w2": w2, "b2": b2}
        self.stacked = {name: value.to(branch) for name, value in ready.items()}  # (n, ...) each
        self.branch, self.stream, self.blocks = branch, stream, len(w1)


@dataclass
class _Saved:
    """What one block's backward needs: its input (B, C, H, W), xhat (M, C), inverse deviation, h and a (M, 4C)."""

    x: Tensor
    xhat: Tensor
    inverse: Tensor
    h: Tensor
    a: Tensor


class _Work:
    """One stack's pass: the block's forward and backward in plain tensor operations, without autograd."""

    def __init__(self, spec: BlockSpec, weights: _Weights, norms: list[Standardise], masks: Tensor | None, observer: BlockObserver | None) -> None:
        self.spec, self.weights, self.norms, self.observer = spec, weights, norms, observer
        self.masks = None if masks is None else masks.unbind(0)  # each (M, 1): 0, or 1 / (1 - rate)
        self.activation = ACTIVATIONS[spec.activation]
        self.dw, self.dw_bias, self.w1, self.b1, self.w2, self.b2 = (value.unbind(0) for value in weights.stacked.values())
        self.w1_t, self.w2_t = (weights.stacked[name].transpose(1, 2).unbind(0) for name in ("w1", "w2"))
        self.one: Tensor | None = None  # (M, 4C) of ones, for an observer

    def forward(self, x: Tensor, i: int, moments: Tensor | None = None) -> Tensor:
        """Block i, of which nothing is kept: (B, C, H, W) -> (B, C, H, W)."""
        return self.kept(x, i, moments)[0]

    def kept(self, x: Tensor, i: int, moments: Tensor | None = None) -> tuple[Tensor, _Saved]:
        """Block i, and what its backward needs. With `moments` (2, n, C), BatchNorm's statistics are measured and written there."""
        saved = self.hidden(x, i, moments)
        return self.output(saved, i), saved

    def standard(self, x: Tensor, i: int, moments: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Block i, and what `expanded` needs."""
        saved = self.hidden(x, i, moments)
        return self.output(saved, i), (saved.x, saved.xhat, saved.inverse)

    def hidden(self, x: Tensor, i: int, moments: Tensor | None = None) -> _Saved:
        """Block i up to its activation: what its backward needs."""
        w, k = self.weights, self.spec.kernel_size
        y = _rows(F.conv2d(x.to(w.branch), self.dw[i], self.dw_bias[i], padding=k // 2, groups=self.spec.channels))
        y = y if self.spec.norm == "none" or self.norms[i].takes(y) else y.to(w.stream)
        if moments is not None:
            moments[0, i], moments[1, i] = batch_moments(y, self.spec.sync_batchnorm)
        xhat, inverse = self.norms[i].forward(y)
        return self.expanded(x, xhat.to(w.branch), inverse, i)

    def expanded(self, x: Tensor, xhat: Tensor, inverse: Tensor, i: int) -> _Saved:
        """Block i from xhat (M, C) to its activation."""
        h = torch.addmm(self.b1[i], xhat, self.w1_t[i])
        return _Saved(x, xhat, inverse, h, self.activation.forward(h))

    def output(self, saved: _Saved, i: int) -> Tensor:
        """Block i from its activation to its output (B, C, H, W)."""
        w = self.weights
        x = saved.x
        out = torch.addmm(self.b2[i], saved.a, self.w2_t[i])  # (M, C)
        if w.gamma is not None:
            out = out * w.gamma[i]
        if self.masks is not None:
            out = out * self.masks[i]
        if self.spec.skip == "identity":
            out = out.add_(_rows(x)) if out.dtype == w.stream else _rows(x) + out  # in the stream's precision
        elif out.dtype != w.stream:
            out = out.to(w.stream)
        batch, channels, height, width = x.shape
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def backward(self, g: Tensor, saved: _Saved, i: int, grads: "_Gradients") -> Tensor:
        """Gradient (M, C) on block i's output -> on its input; the folded weights' gradients are written to `grads`."""
        w, k, c = self.weights, self.spec.kernel_size, self.spec.channels
        if self.observer is not None:
            self.observer.gradient(i, g)
            if i:
                self.observer.output(i - 1, saved.x)
        masked = g if self.masks is None else g * self.masks[i]
        branch = masked.to(w.branch)
        scaled = branch if w.gamma is None else (masked * w.gamma[i]).to(w.branch)
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
        return _rows(dx).to(w.stream).add_(g) if self.spec.skip == "identity" else _rows(dx).to(w.stream)

    def through_activation(self, g: Tensor, saved: _Saved, i: int) -> Tensor:
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


class _Gradients:
    """Gradients of a stack's folded weights, filled block by block, then unfolded for all blocks at once."""

    def __init__(self, spec: BlockSpec, blocks: int, like: Tensor) -> None:
        n, c, k = blocks, spec.channels, spec.kernel_size
        self.stacked = {
            "dw": like.new_empty(n, c, 1, k, k),
            "dw_bias": like.new_empty(n, c),
            "w1": like.new_empty(n, c, 4 * c),
            "b1": like.new_empty(n, 4 * c),
            "w2": like.new_empty(n, c, 4 * c),
            "b2": like.new_empty(n, c),
        }
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
        if "gamma" in p:  # W2' = gamma W2, b2' = gamma b2
            gamma = (w2 * p["pwconv2.weight"]).sum(2) + b2 * p["pwconv2.bias"]
            grads["gamma"] = gamma.sum(1, keepdim=True) if p["gamma"].shape[1] == 1 else gamma
            w2, b2 = w2.mul_(p["gamma"][:, :, None]), b2 * p["gamma"]
        grads |= {"pwconv1.weight": w1, "pwconv2.weight": w2, "pwconv2.bias": b2}
        return {name: grads[name].to(value.dtype) for name, value in parameters.items()}


class _StackFunction(torch.autograd.Function):
    """The stack as one node of autograd. See BlockStack.forward for the arguments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stack: "BlockStack", branch: torch.dtype, keeping: Keeping | None, masks: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        spec, moments = stack.spec, None
        if spec.norm == "batchnorm":
            statistics = stack.statistics
            measured = stack.training
            moments = torch.empty_like(statistics.pending) if measured else torch.stack([statistics.running_mean, statistics.running_var])
            moments = moments.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            named = dict(zip(spec.shapes(), parameters, strict=True))
            weights = _Weights(spec, named, x.dtype, branch)
            work = _work(stack.kernel, spec, weights, _norms(spec, weights.blocks, moments, fixed=not stack.training), x, masks, None)
            kept: list[Any] = []
            first, measuring = x, moments if stack.training else None
            for i in range(weights.blocks):
                x = _forward(work, x, i, measuring, keeping, kept)
        if stack.observer is not None and keeping is not None:
            stack.observer.output(weights.blocks - 1, x)
        if moments is not None and stack.training:
            stack.statistics.add(moments[0], moments[1], batch_rows(first.numel() // spec.channels, spec.sync_batchnorm))
        # The input is saved for autograd's check that nobody overwrites it, but where a store has a copy: there it must not stay.
        held = () if keeping is not None and keeping.store is not None else (first,)
        ctx.save_for_backward(*parameters, *held)
        ctx.spec, ctx.kept, ctx.keeping, ctx.observer, ctx.kernel = spec, kept, keeping, stack.observer, stack.kernel
        ctx.masks, ctx.moments, ctx.fixed, ctx.branch = masks, moments, not stack.training, branch
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        if not ctx.kept:
            raise RuntimeError("second backward through one forward pass: a BlockStack frees its activations as it goes; run the forward pass again")
        spec, output = ctx.spec, outputs[0]
        with torch.autocast(output.device.type, enabled=False):
            named = dict(zip(spec.shapes(), ctx.saved_tensors, strict=False))
            weights = _Weights(spec, named, output.dtype, ctx.branch)
            work = _work(ctx.kernel, spec, weights, _norms(spec, weights.blocks, ctx.moments, ctx.fixed), output, ctx.masks, ctx.observer)
            batch, channels, height, width = output.shape
            grads = _Gradients(spec, weights.blocks, output)
            g = _rows(output.contiguous(memory_format=torch.channels_last))
            saved: list[Any] = []
            for i in reversed(range(weights.blocks)):
                if not saved:
                    saved = _again(work, ctx.kept.pop(), ctx.keeping, i)
                g = work.backward(g, saved.pop(), i, grads)
            dx = g.view(batch, height, width, channels).permute(0, 3, 1, 2)
            return dx, None, None, None, None, *grads.unfolded(named).values()


def _norms(spec: BlockSpec, blocks: int, moments: Tensor | None, fixed: bool) -> list[Standardise]:
    if moments is None:
        return [ROW_NORMS[spec.norm](EPS[spec.norm])] * blocks
    means, variances = moments.unbind(0)
    pairs = zip(means.unbind(0), variances.unbind(0), strict=True)
    return [BatchStandardise(EPS[spec.norm], mean, variance, fixed, spec.sync_batchnorm) for mean, variance in pairs]


def _work(
    kernel: str, spec: BlockSpec, weights: _Weights, norms: list[Standardise], x: Tensor, masks: Tensor | None, observer: BlockObserver | None
) -> Any:
    """The maths of a block: torch's operators, or the native kernel for what that knows."""
    if kernel == "native" and native.computes(spec, x.device, weights.stream, weights.branch):
        return native.NativeWork(spec, weights, x, masks, observer)
    return _Work(spec, weights, norms, masks, observer)


def _forward(work: Any, x: Tensor, i: int, moments: Tensor | None, keeping: Keeping | None, kept: list[Any]) -> Tensor:
    """Block i, adding to `kept` what is kept of it, or of the segment that it begins."""
    if keeping is None or keeping.segment:
        if keeping is not None and i % keeping.segment == 0:
            kept.append(x if keeping.store is None else keeping.store.put(x))
        return work.forward(x, i, moments)
    x, part = (work.kept if keeping.hidden else work.standard)(x, i, moments)
    kept.append(part)
    return x


def _again(work: Any, part: Any, keeping: Keeping, last: int) -> list[Any]:
    """What the backward of block `last`, or of the segment that it ends, needs: from what `_forward` kept, the rest computed again."""
    if not keeping.segment:
        return [part if keeping.hidden else work.expanded(*part, last)]
    x, again = part if keeping.store is None else keeping.store.get(part), []
    for i in range(last - last % keeping.segment, last):
        x, saved = work.kept(x, i)
        again.append(saved)
    return [*again, work.hidden(x, last)]


class BlockStack(nn.Module):
    """Blocks `first` ... `first + blocks - 1` of a stage.

    Parameters are named as in the plain network with the dot replaced (`dwconv_weight`), of shape (n, ...); `gamma` is
    (n, 1) or (n, C). `drop_rates` (n,): stochastic depth (arXiv:1603.09382), a per-sample mask on the branch. `keeping` says what
    forward leaves for backward, at first all (deepscale/activations.py changes it). While an `observer` is attached, forward and
    backward passes with gradients show it every block; they compute the same values.
    """

    observer: BlockObserver | None = None
    keeping = Keeping()
    _rates: Tensor | None = None  # drop_rates (n, 1) on the device
    kernel = "torch"  # or "native", which must be loaded

    def __init__(self, spec: BlockSpec, first: int, blocks: int, drop_rates: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.spec, self.first, self.blocks, self.drop_rates = spec, first, blocks, drop_rates
        for name, shape in spec.shapes().items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.empty(blocks, *shape)))
        if spec.norm == "batchnorm":
            self.statistics = RunningStatistics(blocks, spec.channels)

    def stacked(self) -> dict[str, nn.Parameter]:
        """The parameters by the plain network's names within a block."""
        return {name: getattr(self, name.replace(".", "_")) for name in self.spec.shapes()}

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W), in the stream's dtype; the branch runs in autocast's dtype where that is on."""
        device = x.device.type
        parameters = tuple(self.stacked().values())
        branch = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameters[0].dtype
        keeping = self.keeping if torch.is_grad_enabled() else None
        x = x.contiguous(memory_format=torch.channels_last)
        return _StackFunction.apply(x, self, branch, keeping, self._masks(x), *parameters)

    def _masks(self, x: Tensor) -> Tensor | None:
        """Stochastic depth's factors, (n, M, 1), or None."""
        if not self.training or self.drop_rates is None:
            return None
        if self._rates is None or self._rates.device != x.device:  # once: a copy to a GPU waits for all of its work
            self._rates = torch.tensor(self.drop_rates, dtype=torch.float64, device=x.device)[:, None]
        kept = (torch.rand(self.blocks, x.shape[0], device=x.device) >= self._rates) / (1 - self._rates)  # (n, B)
        return kept.to(x.dtype).repeat_interleave(x.shape[2] * x.shape[3], dim=1)[:, :, None]
