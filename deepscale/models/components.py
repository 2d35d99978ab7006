"""The parts a block is made of: activations, skips and norms; activations and norms each with its hand-written backward beside the autograd form.

The stacked network (`block.py`) calls the forward and backward functions here directly; the plain reference
(`reference.py`) and the layers outside stacks use `ChannelNorm` and `Activation.module`, which leave the backward to
autograd. A test compares every pair.

Shapes: M rows (B * H * W pixels), C channels. Sources: GELU arXiv:1606.08415, LayerNorm arXiv:1607.06450, BatchNorm
arXiv:1502.03167, RMSNorm arXiv:1910.07467. LayerScale (arXiv:2103.17239), a gamma per channel, and ReZero (arXiv:2003.04887) and SkipInit
(arXiv:2002.10444), a scalar that starts at 0, are the block's gamma: --layerscale-shape, --layerscale-init.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten

# ConvNeXt's published epsilon for LayerNorm (arXiv:2201.03545); torch's default for BatchNorm.
EPS = {"layernorm": 1e-6, "rmsnorm": 1e-6, "batchnorm": 1e-5, "none": 0.0}
MOMENTUM = 0.1

# What --precision makes the branches compute in; the stream stays float32.
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Activation:
    """f and its gradient: forward(h) -> f(h); backward(g, h, a) -> g * f'(h), with a = f(h) at hand.

    `product`: in float32 and float64, g times backward(1, h, a) is backward(g, h, a) in every bit.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    product: bool = False


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, lambda g, h, a: aten.gelu_backward(g, h), product=True),
    "relu": Activation(torch.relu, lambda g, h, a: aten.threshold_backward(g, h, 0), product=True),
    "silu": Activation(F.silu, lambda g, h, a: aten.silu_backward(g, h)),
    "tanh": Activation(torch.tanh, lambda g, h, a: aten.tanh_backward(g, a), product=True),
    "sigmoid": Activation(torch.sigmoid, lambda g, h, a: aten.sigmoid_backward(g, a)),
}

# The same as modules, whose outputs a recorder's hooks see. GELU's approximation by tanh counts as GELU.
MODULES: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


@dataclass(frozen=True)
class Skip:
    """What becomes of a block's input x and its branch b: [x +] scale(blocks of the network) * b.

    `coupled`: the branch sees one half of the channels and is added to the other (reversible.py).
    """

    adds: bool
    scale: Callable[[int], float] = lambda blocks: 1.0
    coupled: bool = False


def deepnorm_scale(blocks: int) -> float:
    """DeepNorm (Wang et al. 2022, arXiv:2203.00555) without its norm: x + b / alpha with alpha = L^(1/4), for L blocks.

    The paper's LayerNorm(alpha * x + b) is LayerNorm(x + b / alpha): alpha weighs x against b, and the norm takes the scale away. Where no norm
    follows, alpha * x would grow the stream by alpha^L; divided by alpha in every block, the network is the same function up to scale
    (exactly, where its branches are homogeneous). alpha is a constant, not learnt. The paper's (2N)^(1/4) is of an encoder of N layers, which has 2N
    branches where this network has L.
    """
    return float(blocks**-0.25)


SKIPS: dict[str, Skip] = {
    "identity": Skip(True),
    "deepnorm": Skip(True, deepnorm_scale),
    "reversible": Skip(False, coupled=True),
    "none": Skip(False),
}


class Standardise:
    """Rows standardised without the affine part, and the gradient of that: what differs between the norms.

    forward(y (M, C)) -> (xhat (M, C), inverse standard deviation); backward(dxhat, xhat, inverse) -> dy. `y` and `dxhat`
    may be overwritten. The affine part is folded into the weights that follow (block.py). One object serves blocks of one
    shape.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def takes(self, y: Tensor) -> bool:
        """Whether rows of this dtype may be given as they are; else the caller converts them to the stream's, and back."""
        return False

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward(self, dxhat: Tensor, xhat: Tensor, inverse: Tensor) -> Tensor:
        raise NotImplementedError


class _RowStandardise(Standardise):
    """A norm over each row's channels; the row means are products with ones, 2-4x faster than reductions over short rows on a CPU."""

    averaging: Tensor | None = None

    def _row_mean(self, values: Tensor) -> Tensor:
        """(M, C) -> (M, 1)."""
        if self.averaging is None:
            self.averaging = values.new_full((values.shape[1], 1), 1.0 / values.shape[1])
        return torch.mm(values, self.averaging)


class LayerStandardise(_RowStandardise):
    """LayerNorm: mean and variance of each row.

    On a GPU, where every operator is a launch, by torch's own kernel: one launch instead of seven. It takes low precision as well, and its
    statistics are float32 then, which saves the launches of four conversions.
    """

    KERNEL: tuple[str, ...] = ("cuda",)
    identity: tuple[Tensor, Tensor] | None = None

    def takes(self, y: Tensor) -> bool:
        return y.device.type in self.KERNEL

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if y.device.type in self.KERNEL:
            xhat, _, inverse = aten.native_layer_norm(y, y.shape[1:], None, None, self.eps)
            return xhat, inverse
        y = y.sub_(self._row_mean(y))
        inverse = self._row_mean(y * y).add_(self.eps).rsqrt_()  # (M, 1)
        return y.mul_(inverse), inverse

    def backward(self, dxhat: Tensor, xhat: Tensor, inverse: Tensor) -> Tensor:
        # The kernel's formula with mean 0 and deviation 1 is the gradient on xhat; the deviation follows.
        if self.identity is None:
            self.identity = torch.zeros_like(inverse), torch.ones_like(inverse)
        dy: Tensor = aten.native_layer_norm_backward(dxhat, xhat, xhat.shape[1:], *self.identity, None, None, (True, False, False))[0]
        return dy.mul_(inverse)


class RMSStandardise(_RowStandardise):
    """RMSNorm: root mean square of each row, no centring."""

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inverse = self._row_mean(y * y).add_(self.eps).rsqrt_()  # (M, 1)
        return y.mul_(inverse), inverse

    def backward(self, dxhat: Tensor, xhat: Tensor, inverse: Tensor) -> Tensor:
        return torch.addcmul(dxhat, xhat, self._row_mean(dxhat * xhat), value=-1).mul_(inverse)


class NoStandardise(Standardise):
    """No norm at all."""

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.new_empty(0)

    def backward(self, dxhat: Tensor, xhat: Tensor, inverse: Tensor) -> Tensor:
        return dxhat


def _mean_over_ranks(sums: Tensor, rows: int, sync: bool) -> Tensor:
    """Column sums (k, C) of `rows` rows -> means over the rows of this rank, or of all ranks."""
    if not (sync and dist.is_initialized()):
        return sums / rows
    total = torch.cat([sums.flatten(), sums.new_tensor([float(rows)])])
    dist.all_reduce(total)
    return total[:-1].view_as(sums) / total[-1]


def batch_rows(rows: int, sync: bool) -> int:
    """Rows that batch statistics were taken over: this rank's, or, with `sync`, those of all ranks, whose batches are equally large."""
    return rows * dist.get_world_size() if sync and dist.is_initialized() else rows


def batch_moments(y: Tensor, sync: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel over the batch, y (M, C) -> (C,), (C,); of all ranks' batch with `sync`."""
    mean = _mean_over_ranks(y.sum(0, keepdim=True), y.shape[0], sync)[0]
    variance = _mean_over_ranks((y - mean).square().sum(0, keepdim=True), y.shape[0], sync)[0]
    return mean, variance


class BatchStandardise(Standardise):
    """BatchNorm of one block: statistics over the batch given by `moments`, which the caller keeps for recomputation."""

    def __init__(self, eps: float, mean: Tensor, variance: Tensor, fixed: bool, sync: bool) -> None:
        super().__init__(eps)
        self.mean, self.variance, self.fixed, self.sync = mean, variance, fixed, sync

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inverse = (self.variance + self.eps).rsqrt()  # (C,)
        return y.sub_(self.mean).mul_(inverse), inverse

    def backward(self, dxhat: Tensor, xhat: Tensor, inverse: Tensor) -> Tensor:
        if self.fixed:  # running statistics do not depend on the batch
            return dxhat * inverse
        sums = torch.stack([dxhat.sum(0), (dxhat * xhat).sum(0)])
        mean, projection = _mean_over_ranks(sums, xhat.shape[0], self.sync)
        return (dxhat - mean).addcmul_(xhat, projection, value=-1).mul_(inverse)


ROW_NORMS: dict[str, type[Standardise]] = {"layernorm": LayerStandardise, "rmsnorm": RMSStandardise, "none": NoStandardise}


class RunningStatistics(nn.Module):
    """Running mean and variance of BatchNorm, float32, of shape (..., C).

    Forward passes in training `add` their batch's moments; `commit`, called once after each optimiser step, makes one
    update of momentum 0.1 of their mean, so that neither recomputation nor accumulation counts twice.
    """

    running_mean: Tensor
    running_var: Tensor
    pending: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self.register_buffer("pending", torch.zeros(2, *shape), persistent=False)
        self.passes = 0
        self.frozen = False

    def reset_parameters(self) -> None:
        """The state before training: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.pending.zero_()

    def add(self, mean: Tensor, variance: Tensor, rows: int) -> None:
        """Notes one forward pass's moments of `rows` rows; the variance is made unbiased, as torch's BatchNorm does."""
        self.pending[0] += mean
        self.pending[1] += variance * (rows / max(1, rows - 1))
        self.passes += 1

    def commit(self) -> None:
        """One update from the passes noted since the last; none of frozen ones."""
        if self.passes:
            if not self.frozen:
                self.running_mean.lerp_(self.pending[0] / self.passes, MOMENTUM)
                self.running_var.lerp_(self.pending[1] / self.passes, MOMENTUM)
            self.pending.zero_()
            self.passes = 0


def commit_running_statistics(model: nn.Module) -> None:
    """After an optimiser step: every BatchNorm's one update."""
    for module in model.modules():
        if isinstance(module, RunningStatistics):
            module.commit()


def average_running_statistics(model: nn.Module) -> None:
    """Before evaluation and saving: running statistics averaged over ranks, which saw different batches."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buffers = [b for m in model.modules() if isinstance(m, RunningStatistics) for b in (m.running_mean, m.running_var)]
    if buffers:
        joined = torch.cat([b.flatten() for b in buffers])
        dist.all_reduce(joined)
        joined /= dist.get_world_size()
        for buffer, values in zip(buffers, joined.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


class _SumOverRanks(torch.autograd.Function):
    """All-reduced sum whose gradient is all-reduced too: what synchronised BatchNorm needs from autograd."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """The context in which operators keep their input's precision; on the meta device, where a network is counted, there is no other."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class ChannelNorm(nn.Module):
    """A norm over channels with its affine part, for x (..., C); the statistics are float32 whatever x is. Gradients by autograd."""

    def __init__(self, kind: str, channels: int, sync: bool = False) -> None:
        super().__init__()
        self.kind, self.channels, self.eps, self.sync = kind, channels, EPS[kind], sync
        if kind != "none":
            self.weight = nn.Parameter(torch.empty(channels))
        if kind in ("layernorm", "batchnorm"):
            self.bias = nn.Parameter(torch.empty(channels))
        if kind == "batchnorm":
            self.statistics = RunningStatistics(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        with no_autocast(x):
            x = x if x.dtype == torch.float64 else x.float()
            if self.kind == "layernorm":
                return F.layer_norm(x, (self.channels,), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
            if self.kind == "rmsnorm":
                return F.rms_norm(x, (self.channels,), self.weight.to(x.dtype), self.eps)
            return self._batch_norm(x)

    def _batch_norm(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.channels)
        mean, variance = self.statistics.running_mean, self.statistics.running_var
        if self.training:
            mean, variance = self._moments(rows)
            self.statistics.add(mean.detach(), variance.detach(), batch_rows(rows.shape[0], self.sync))
        standard = (x - mean.to(x.dtype)) * (variance.to(x.dtype) + self.eps).rsqrt()
        return standard * self.weight + self.bias

    def _moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not (self.sync and dist.is_initialized()):
            return rows.mean(0), rows.var(0, unbiased=False)
        count = _SumOverRanks.apply(rows.new_tensor(float(rows.shape[0])))
        mean = _SumOverRanks.apply(rows.sum(0)) / count
        return mean, _SumOverRanks.apply((rows - mean).square().sum(0)) / count


class BatchNorm(ChannelNorm):
    """ChannelNorm's BatchNorm for images (B, C, H, W): the same values by torch's kernel, where statistics are not shared over ranks."""

    def __init__(self, channels: int, sync: bool = False) -> None:
        super().__init__("batchnorm", channels, sync)

    def forward(self, x: Tensor) -> Tensor:
        if self.sync and dist.is_initialized():
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        with no_autocast(x):
            x = x if x.dtype == torch.float64 else x.float()
            weight, bias, own = self.weight.to(x.dtype), self.bias.to(x.dtype), self.statistics
            if not self.training:
                return F.batch_norm(x, own.running_mean.to(x.dtype), own.running_var.to(x.dtype), weight, bias, False, MOMENTUM, self.eps)
            y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, MOMENTUM, self.eps)
            own.add(mean.detach(), inverse.detach().pow(-2) - self.eps, x.numel() // self.channels)
            return y
