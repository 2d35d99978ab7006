"""The hand-written backward of every activation and norm against autograd through torch's own functions, and BatchNorm's running
statistics against torch's BatchNorm2d."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from policies import in_segments
from torch import Tensor, nn

from deepscale.activations import Recompute
from deepscale.config import ACTIVATION_NAMES, NORM_NAMES, ModelConfig
from deepscale.models.components import (
    ACTIVATIONS,
    EPS,
    MOMENTUM,
    ROW_NORMS,
    BatchStandardise,
    ChannelNorm,
    RunningStatistics,
    batch_moments,
    commit_running_statistics,
)
from deepscale.models.convnext import ConvNeXt, cross_entropy

M, C = 37, 12
TIGHT = {"rtol": 1e-12, "atol": 1e-13}

TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def rows(*, seed: int = 0, scale: float = 1.0, shift: float = 0.0, channels: int = C) -> Tensor:
    """(M, channels) in float64, from their own generator."""
    return torch.randn(M, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale + shift


def test_the_names_on_the_command_line_are_those_that_exist() -> None:
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES
    assert ROW_NORMS.keys() | {"batchnorm"} == set(NORM_NAMES) == EPS.keys()


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_an_activation_and_its_gradient_are_torchs(name: str, scale: float) -> None:
    """Forward and hand-written backward against torch's function and autograd in float64; 30 reaches where sigmoid and tanh are flat."""
    h, g = rows(scale=scale).requires_grad_(), rows(seed=1)
    expected = TORCH_ACTIVATIONS[name](h)
    expected.backward(g)
    with torch.no_grad():
        a = ACTIVATIONS[name].forward(h)
        gradient = ACTIVATIONS[name].backward(g, h, a)
    torch.testing.assert_close(a, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(gradient, h.grad, rtol=1e-12, atol=0)


def test_the_gradient_of_relu_at_zero_is_zero() -> None:
    """As autograd's: units that a zero bias leaves at exactly 0 must not differ between the stacked and the plain network."""
    zero = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    F.relu(zero).sum().backward()
    gradient = ACTIVATIONS["relu"].backward(torch.ones(4, dtype=torch.float64), zero.detach(), zero.detach())
    torch.testing.assert_close(gradient, zero.grad)
    assert not gradient.any()


TORCH_ROW_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layernorm": lambda y: F.layer_norm(y, (y.shape[1],), eps=EPS["layernorm"]),
    "rmsnorm": lambda y: F.rms_norm(y, (y.shape[1],), eps=EPS["rmsnorm"]),
    "none": lambda y: y,
}


@pytest.mark.parametrize("name", ROW_NORMS)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-3, 0.0), (5.0, 3.0)])
def test_a_row_norm_and_its_gradient_are_torchs(name: str, scale: float, shift: float) -> None:
    """float64 against F.layer_norm and F.rms_norm with autograd; at deviation 1e-3 epsilon is as large as the variance and must count."""
    y, g = rows(scale=scale, shift=shift).requires_grad_(), rows(seed=1)
    expected = TORCH_ROW_NORMS[name](y)
    expected.backward(g)
    norm = ROW_NORMS[name](EPS[name])
    with torch.no_grad():
        xhat, inverse = norm.forward(y.detach().clone())
        gradient = norm.backward(g.clone(), xhat, inverse)
    torch.testing.assert_close(xhat, expected.detach(), **TIGHT)
    torch.testing.assert_close(gradient, y.grad, rtol=1e-11, atol=1e-12 * y.grad.abs().max().item())


@pytest.mark.parametrize("name", ROW_NORMS)
def test_a_row_norm_serves_several_blocks(name: str) -> None:
    """One object for all blocks of a stack: backward in reverse order against autograd, each with its own rows."""
    norm = ROW_NORMS[name](EPS[name])
    inputs = [rows(seed=seed, scale=1.0 + seed) for seed in range(3)]
    passes = [norm.forward(y.clone()) for y in inputs]
    for seed in reversed(range(3)):
        y, g = inputs[seed].clone().requires_grad_(), rows(seed=10 + seed)
        TORCH_ROW_NORMS[name](y).backward(g)
        torch.testing.assert_close(norm.backward(g.clone(), *passes[seed]), y.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("fixed", [False, True], ids=["batch", "running"])
def test_batch_standardise_and_its_gradient_are_torchs(fixed: bool) -> None:
    """float64 against F.batch_norm with autograd: over the batch's own statistics, and over given ones that do not depend on it."""
    y, g = rows(scale=2.0, shift=1.0).requires_grad_(), rows(seed=1)
    mean, variance = (rows(seed=2)[0], rows(seed=3)[0].abs()) if fixed else batch_moments(y.detach(), sync=False)
    if fixed:
        expected = F.batch_norm(y, mean, variance, training=False, eps=EPS["batchnorm"])
    else:
        expected = F.batch_norm(y, None, None, training=True, eps=EPS["batchnorm"])
    expected.backward(g)
    norm = BatchStandardise(EPS["batchnorm"], mean, variance, fixed, sync=False)
    with torch.no_grad():
        xhat, inverse = norm.forward(y.detach().clone())
        gradient = norm.backward(g.clone(), xhat, inverse)
    torch.testing.assert_close(xhat, expected.detach(), **TIGHT)
    torch.testing.assert_close(gradient, y.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [*ROW_NORMS, "batchnorm"])
def test_gradients_of_norms_are_difference_quotients(name: str) -> None:
    """The hand-written backward against finite differences of the hand-written forward (torch.autograd.gradcheck, float64)."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):  # type: ignore[no-untyped-def]
            moments = batch_moments(y, sync=False)
            norm = BatchStandardise(EPS[name], *moments, fixed=False, sync=False) if name == "batchnorm" else ROW_NORMS[name](EPS[name])
            xhat, inverse = norm.forward(y.clone())
            ctx.norm = norm
            ctx.save_for_backward(xhat, inverse)
            return xhat.clone()

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return ctx.norm.backward(g.clone(), *ctx.saved_tensors)

    assert torch.autograd.gradcheck(Norm.apply, (rows(channels=5)[:7].clone().requires_grad_(),))


def channel_norm(kind: str, dtype: torch.dtype = torch.float64) -> ChannelNorm:
    """With an affine part that is not the identity."""
    norm = ChannelNorm(kind, C).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(rows(seed=20 + seed)[0])
    return norm


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "none"])
def test_channel_norm_is_torchs(kind: str) -> None:
    norm, x = channel_norm(kind), rows().view(1, 1, M, C)
    affine = [p.detach() for p in norm.parameters()]
    expected = {
        "layernorm": lambda: F.layer_norm(x, (C,), *affine, eps=1e-6),
        "rmsnorm": lambda: F.rms_norm(x, (C,), *affine, eps=1e-6),
        "none": lambda: x,
    }[kind]()
    assert len(affine) == {"layernorm": 2, "rmsnorm": 1, "none": 0}[kind]
    torch.testing.assert_close(norm(x), expected, **TIGHT)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "batchnorm"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_channel_norm_works_in_float32_whatever_comes_in(kind: str, low: torch.dtype) -> None:
    """A low-precision input under autocast against the same values as float32 without: bit-equal, so statistics were float32."""
    x = rows(shift=3.0).to(low)
    low_norm, full_norm = channel_norm(kind, torch.float32), channel_norm(kind, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = low_norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, full_norm(x.float()), rtol=0, atol=0)


def images(seed: int) -> Tensor:
    """(B, C, H, W) in float64, channels of different mean and deviation."""
    drawn = torch.randn(4, C, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.arange(1.0, C + 1.0, dtype=torch.float64).view(C, 1, 1) + torch.arange(float(C), dtype=torch.float64).view(C, 1, 1)


def batch_norms() -> tuple[ChannelNorm, nn.BatchNorm2d]:
    """Ours and torch's, with the same affine part and starting statistics."""
    ours, torchs = channel_norm("batchnorm"), nn.BatchNorm2d(C).double()
    with torch.no_grad():
        torchs.weight.copy_(ours.weight)
        torchs.bias.copy_(ours.bias)
    return ours, torchs


def ours_on_images(norm: ChannelNorm, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_batch_norm_is_torchs_over_training_and_evaluation() -> None:
    """Three steps in training, then evaluation, against nn.BatchNorm2d: outputs, gradients and running statistics (unbiased variance)."""
    ours, torchs = batch_norms()
    for step in range(3):
        x, g = images(step), images(100 + step)
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = ours_on_images(ours, own), torchs(other)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        for module in (ours, torchs):
            module.zero_grad()
        out.backward(g)
        expected.backward(g)
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.weight.grad, torchs.weight.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.bias.grad, torchs.bias.grad, rtol=1e-10, atol=1e-10)
        commit_running_statistics(ours)
        torch.testing.assert_close(ours.statistics.running_mean, torchs.running_mean, **TIGHT)
        torch.testing.assert_close(ours.statistics.running_var, torchs.running_var, **TIGHT)
    ours.eval()
    torchs.eval()
    before = ours.statistics.running_mean.clone()
    torch.testing.assert_close(ours_on_images(ours, images(9)), torchs(images(9)), rtol=1e-11, atol=1e-12)
    commit_running_statistics(ours)
    torch.testing.assert_close(ours.statistics.running_mean, before, rtol=0, atol=0)


def test_accumulation_is_one_update_of_the_mean_of_its_passes() -> None:
    """Two micro batches and one commit against two nn.BatchNorm2d that saw one micro batch each: the mean of their statistics."""
    ours, first = batch_norms()
    _, second = batch_norms()
    for norm, seed in ((first, 0), (second, 1)):
        norm(images(seed))
        ours_on_images(ours, images(seed))
    assert torch.equal(ours.statistics.running_mean, torch.zeros(C, dtype=torch.float64)), "nothing changes before the optimiser's step"
    commit_running_statistics(ours)
    torch.testing.assert_close(ours.statistics.running_mean, (first.running_mean + second.running_mean) / 2, **TIGHT)
    torch.testing.assert_close(ours.statistics.running_var, (first.running_var + second.running_var) / 2, **TIGHT)


def test_a_second_commit_changes_nothing() -> None:
    statistics = RunningStatistics(2, C)
    statistics.add(torch.full((2, C), 3.0), torch.full((2, C), 5.0), rows=11)
    statistics.commit()
    torch.testing.assert_close(statistics.running_mean, torch.full((2, C), MOMENTUM * 3.0))
    torch.testing.assert_close(statistics.running_var, torch.full((2, C), (1 - MOMENTUM) + MOMENTUM * 5.0 * 11 / 10))
    committed = statistics.running_mean.clone(), statistics.running_var.clone()
    statistics.commit()
    assert torch.equal(statistics.running_mean, committed[0])
    assert torch.equal(statistics.running_var, committed[1])


def test_one_row_leaves_the_variance_finite() -> None:
    """A batch of one pixel has no unbiased variance; the biased one, 0, is taken."""
    statistics = RunningStatistics(C)
    statistics.add(torch.ones(C), torch.zeros(C), rows=1)
    statistics.commit()
    torch.testing.assert_close(statistics.running_var, torch.full((C,), 1 - MOMENTUM))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_recomputation_counts_a_batch_once(micro_batches: int) -> None:
    """All running statistics of the network after a step: recomputed against kept activations, with and without accumulation."""
    model = ModelConfig(blocks=(1, 2, 5, 1), width=4, patch_size=1, norm="batchnorm", layerscale_init=0.5)
    states = []
    for segment in (0, 2):
        network = in_segments(segment).apply(ConvNeXt(model, stack_size=3)).initialise(0).double()
        for micro in range(micro_batches):
            x = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(micro))
            cross_entropy(network(x), torch.tensor([0, 1, 2])).backward()
        passes = {module.passes for module in network.modules() if isinstance(module, RunningStatistics)}
        assert passes == {micro_batches}
        commit_running_statistics(network)
        states.append({name: value for name, value in network.named_buffers() if "running" in name})
    kept, recomputed = states
    assert len(kept) == 2 * (1 + 3 + 5 + 1), "stem, downsamplings, stacks (1, 1, 2 and 1), head"
    for name in kept:
        torch.testing.assert_close(recomputed[name], kept[name], rtol=1e-12, atol=1e-15)
        assert not torch.equal(kept[name], torch.zeros_like(kept[name])) and not torch.equal(kept[name], torch.ones_like(kept[name])), name


def test_evaluation_without_gradients_counts_no_batch() -> None:
    """A validation pass between micro batches must leave what the step will commit."""
    network = Recompute(1).apply(ConvNeXt(ModelConfig(depth=14, width=4, patch_size=1, norm="batchnorm"))).initialise(0)
    network.eval()
    with torch.no_grad():
        network(torch.randn(2, 3, 16, 16))
    assert {module.passes for module in network.modules() if isinstance(module, RunningStatistics)} == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name, activation in ACTIVATIONS.items() if activation.product])
def test_a_gradient_times_the_derivative_is_the_backward_in_every_bit(name: str, dtype: torch.dtype) -> None:
    """What a recorded step relies on, over many sizes of values and lengths that fill no vector register."""
    activation = ACTIVATIONS[name]
    h = torch.randn(1237, 17, dtype=dtype) * torch.logspace(-30, 2, 17, dtype=dtype)
    g, a = torch.randn_like(h) * 1e-3, activation.forward(h)
    assert torch.equal(g * activation.backward(torch.ones_like(h), h, a), activation.backward(g, h, a))
