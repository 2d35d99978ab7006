"""What is observed of a stack's blocks, against the plain network with a hook on every block; and that observing changes nothing."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from policies import in_segments
from torch import Tensor, nn

from deepscale.config import ACTIVATION_NAMES, NORM_NAMES, ModelConfig
from deepscale.gradflow.flow import BLOCK_FIELDS
from deepscale.gradflow.observation import StackObservation, statistics
from deepscale.models.block import BlockSpec
from deepscale.models.components import ACTIVATIONS, commit_running_statistics
from deepscale.models.convnext import ConvNeXt, cross_entropy
from deepscale.models.naming import load_plain
from deepscale.models.observe import SATURATED, BlockObserver
from deepscale.models.reference import PlainBlock, PlainConvNeXt
from deepscale.models.stack import BlockStack

BLOCKS = (2, 1, 3, 1)
GAMMAS: list[dict[str, Any]] = [
    {"layerscale_init": None},
    {"layerscale_init": 1.0},
    {"layerscale_init": 1.0, "layerscale_shape": "channel"},
]
Fields = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"blocks": BLOCKS, "width": 4, "patch_size": 2, "kernel_size": 3, **settings})


def batch(images: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, 16, 32, dtype=torch.float64, generator=random).to(dtype), torch.arange(images) % 10


def randomised(model: nn.Module) -> nn.Module:
    """Weights at which units of every activation are saturated for some inputs, and some for all."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=random)
            spread = 3.0 if name.endswith("pwconv1.bias") else 0.4
            parameter.copy_(noise * spread + (1.0 if name.endswith(("gamma", "norm.weight")) else 0.0))
    return model


def pair(dtype: torch.dtype = torch.float64, stack_size: int = 2, segment: int = 0, **settings: Any) -> tuple[ConvNeXt, PlainConvNeXt]:
    """The stacked network and the plain one with the same values."""
    plain = randomised(PlainConvNeXt(config(**settings)).to(dtype))
    assert isinstance(plain, PlainConvNeXt)
    model = in_segments(segment).apply(ConvNeXt(config(**settings), stack_size=stack_size)).to(dtype)
    load_plain(model, plain.state_dict())
    return model, plain


def observed(model: ConvNeXt, batches: list[Batch], activations: bool = True) -> Fields:
    """The fields of one step over micro batches, whose losses are averaged."""
    observation = StackObservation(model, torch.device("cpu"))
    observation.attach(activations)
    for images, labels in batches:
        (cross_entropy(model(images), labels) / len(batches)).backward()
    return statistics(observation.detach(), spread=False, loss_scale=1.0)


def hooked(plain: PlainConvNeXt, images: Tensor, labels: Tensor) -> Fields:
    """The same of the plain network in one pass: outputs kept by hooks, f' from autograd through the activation alone."""
    blocks = [module for module in plain.modules() if isinstance(module, PlainBlock)]
    outputs: list[Tensor] = []
    derivatives: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        outputs.append(out)

    def activation(h: Tensor) -> Tensor:
        own = h.detach().double().requires_grad_()
        with torch.autocast("cpu", enabled=False):
            derivatives.append(torch.autograd.grad(ACTIVATIONS[plain.config.activation].forward(own).sum(), own)[0])
        return ACTIVATIONS[plain.config.activation].forward(h)

    handles = [block.register_forward_hook(keep) for block in blocks]
    for block in blocks:
        block.activation = activation
    cross_entropy(plain(images), labels).backward()
    for handle in handles:
        handle.remove()
    small = [d.abs() < SATURATED for d in derivatives]  # (B, 4C, H, W)
    fields = {
        "output_mean": [x.mean() for x in outputs],
        "output_std": [x.std(unbiased=False) for x in outputs],
        "output_grad_l2": [x.grad.norm() for x in outputs if x.grad is not None],
        "saturated": [s.double().mean() for s in small],
        "dead": [s.all(dim=3).all(dim=2).all(dim=0).double().mean() for s in small],
    }
    return {name: torch.stack(values).detach().double() for name, values in fields.items()}


def assert_close(found: Fields, expected: Fields, rtol: float = 1e-9) -> None:
    """Every field of every block; the mean, which may cancel, within `rtol` of the standard deviation."""
    assert list(found) == list(BLOCK_FIELDS)
    for name, values in expected.items():
        assert found[name].shape == values.shape == (sum(BLOCKS),)
        atol = rtol * float(expected["output_std"].max()) if name == "output_mean" else 0.0
        torch.testing.assert_close(found[name], values, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


# -------------------------------------------------------------------------------------------------- against the plain network


def variants() -> Iterator[tuple[dict[str, Any], int]]:
    """Every activation with every norm and skip, and gammas and recomputed segments in turn."""
    combined = itertools.product(ACTIVATION_NAMES, NORM_NAMES, ("identity", "none"))
    for i, (activation, norm, skip) in enumerate(combined):
        yield {"activation": activation, "norm": norm, "skip": skip, **GAMMAS[i % 3]}, i % 4  # segments of 0 (keep all) to 3 blocks


@pytest.mark.parametrize(
    ("settings", "segment"), [*variants()], ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else ""
)
def test_every_block_equals_the_plain_networks(settings: dict[str, Any], segment: int) -> None:
    model, plain = pair(segment=segment, **settings)
    assert_close(observed(model, [batch(4)]), hooked(plain, *batch(4)))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("segment", [0, 1, 2, 5])
@pytest.mark.parametrize("stack_size", [1, 3])
def test_every_gamma_segment_and_stack_size(gamma: dict[str, Any], segment: int, stack_size: int) -> None:
    model, plain = pair(segment=segment, stack_size=stack_size, **gamma)
    expected = hooked(plain, *batch(3))
    assert expected["saturated"].min() > 0 and expected["dead"].max() > 0, "nothing would be compared"
    assert_close(observed(model, [batch(3)]), expected)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
@pytest.mark.parametrize("passes", [2, 3])
def test_several_passes_equal_one_over_the_joined_batch(norm: str, passes: int) -> None:
    """Micro batches with different means, so that the deviation within them is not the whole; BatchNorm would see other statistics."""
    model, plain = pair(norm=norm, segment=2)
    images, labels = batch(6)
    images += torch.arange(6.0, dtype=torch.float64)[:, None, None, None]
    parts = list(zip(images.chunk(passes), labels.chunk(passes), strict=True))
    assert_close(observed(model, parts), hooked(plain, images, labels))


@pytest.mark.parametrize("segment", [0, 2])
def test_bfloat16_branches_stay_near_float64(segment: int) -> None:
    """Under autocast, against the plain network in float64: 5 % (bfloat16 keeps 8 bits), shares within 0.02 of all outputs."""
    model, _ = pair(torch.float32, segment=segment)
    _, plain = pair()
    expected = hooked(plain, *batch(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = observed(model, [batch(4, torch.float32)])
    for name in ("output_std", "output_grad_l2"):
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0)
        assert not torch.allclose(found[name], expected[name], rtol=1e-5, atol=0), "nothing was in bfloat16"
    torch.testing.assert_close(found["saturated"], expected["saturated"], rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------------ nothing else changes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("segment", [0, 1, 2])
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_an_observed_step_is_an_unobserved_one_bit_for_bit(norm: str, segment: int, precision: str) -> None:
    """Loss, logits, all gradients and BatchNorm's running statistics, with stochastic depth."""
    results = []
    for watching in (False, True):
        model, _ = pair(torch.float32, norm=norm, segment=segment, drop_path=0.3)
        torch.manual_seed(3)
        observation = StackObservation(model, torch.device("cpu"))
        if watching:
            observation.attach(activations=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(batch(4, torch.float32)[0])
            loss = cross_entropy(logits, batch(4)[1])
        loss.backward()
        assert len(observation.detach()) == 5 * watching
        commit_running_statistics(model)
        results.append([loss.detach(), logits.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for plain, watched in zip(*results, strict=True):
        assert torch.equal(plain, watched)


def test_evaluation_is_not_observed() -> None:
    """Neither between attaching and the training pass, nor afterwards."""
    model, plain = pair()
    observation = StackObservation(model, torch.device("cpu"))
    observation.attach(activations=True)
    images, labels = batch(4)
    model.eval()
    with torch.no_grad():
        model(100 * images)
    model.train()
    cross_entropy(model(images), labels).backward()
    observers = observation.detach()
    expected = hooked(plain, images, labels)
    assert_close(statistics(observers, False, 1.0), expected)
    cross_entropy(model(images), labels).backward()
    assert_close(statistics(observers, False, 1.0), expected)
    assert all(stack.observer is None for stage in model.path for stack in stage.path)


def test_a_second_step_starts_anew_and_saturation_is_counted_when_asked() -> None:
    model, plain = pair()
    observation = StackObservation(model, torch.device("cpu"))
    for activations, seed in ((True, 1), (False, 2), (True, 3)):
        observation.attach(activations)
        images, labels = batch(4, seed=seed)
        cross_entropy(model(images), labels).backward()
        observers = observation.detach()
        found = statistics(observers, False, 1.0)
        assert activations == any(observer.saturated.any() for observer in observers), "counting costs time"
        expected = hooked(plain, images, labels)
        if not activations:
            nothing = torch.full_like(expected["dead"], torch.nan)
            expected |= {"saturated": nothing, "dead": nothing}
        for name in BLOCK_FIELDS:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------- known answers


def one_block(activation: str, bias: list[float], weight: list[float], x: Tensor) -> dict[str, float]:
    """A block of 4 channels whose 16 units see h = weight * x[0] + bias; no norm, no gamma."""
    stack = BlockStack(BlockSpec(4, 1, activation, "none", "identity", "none"), 0, 1).double()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
        stack.dwconv_weight.fill_(1.0)
        stack.pwconv1_weight[0, :, 0] = torch.tensor(weight, dtype=torch.float64)
        stack.pwconv1_bias[0] = torch.tensor(bias, dtype=torch.float64)
    stack.observer = BlockObserver(1, 16, torch.device("cpu"))
    stack(x.requires_grad_()).sum().backward()
    return {name: value.item() for name, value in stack.observer.statistics().items()}


def test_dead_relu_units_are_counted() -> None:
    """5 units below zero for all images, 3 for the half of them that are negative, 8 never."""
    x = torch.cat([torch.full((3, 4, 2, 2), 1.0), torch.full((3, 4, 2, 2), -1.0)]).double()
    found = one_block("relu", [-5.0] * 5 + [0.0] * 3 + [5.0] * 8, [1.0] * 16, x)
    assert found["dead"] == pytest.approx(5 / 16, rel=1e-12)
    assert found["saturated"] == pytest.approx((5 + 3 / 2) / 16, rel=1e-12)


@pytest.mark.parametrize(("activation", "edge"), [("tanh", 2.9932), ("sigmoid", 4.5848)])
def test_saturated_tanh_and_sigmoid_outputs_are_counted(activation: str, edge: float) -> None:
    """f' = 0.01 at |h| = `edge`: 6 units beyond it on either side, 4 just within, 6 beyond it for a quarter of the images."""
    x = torch.cat([torch.zeros(3, 4, 2, 2), torch.full((1, 4, 2, 2), 1.0)]).double()
    bias = [edge + 0.001] * 3 + [-edge - 0.001] * 3 + [edge - 0.001] * 4 + [0.0] * 6
    found = one_block(activation, bias, [0.0] * 10 + [100.0] * 6, x)
    assert found["dead"] == pytest.approx(6 / 16, rel=1e-12)
    assert found["saturated"] == pytest.approx((6 + 6 / 4) / 16, rel=1e-12)


def test_a_nearly_constant_signal_has_its_deviation() -> None:
    """1e-9 of its mean: a mean of squares less a squared mean would leave only rounding."""
    x = 1000 + 1e-6 * batch(4)[0]
    observer = BlockObserver(1, 1, torch.device("cpu"))
    observer.output(0, x)
    assert observer.statistics()["output_std"].item() == pytest.approx((x - 1000).std(unbiased=False).item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_vanished_and_exploded_signals_have_their_norm(scale: float) -> None:
    """float32 whose squares float32 does not hold."""
    x = torch.randn(2, 3, 4, 4) * scale
    observer = BlockObserver(1, 1, torch.device("cpu"))
    observer.output(0, x)
    observer.gradient(0, x)
    found = observer.statistics()
    assert found["output_std"].item() == pytest.approx(x.double().std(unbiased=False).item(), rel=1e-6)
    assert found["output_grad_l2"].item() == pytest.approx(x.double().norm().item(), rel=1e-6)


def test_no_passes_are_no_numbers() -> None:
    """A record without a pass: NaN, which stands for not recorded; a gradient of 0 would read as vanished."""
    found = BlockObserver(2, 4, torch.device("cpu")).statistics()
    assert all(found[name].isnan().all() for name in BLOCK_FIELDS)
