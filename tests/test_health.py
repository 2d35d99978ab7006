"""The verdict on real networks, and what made-up records pin down: thresholds, zeros and who made them, capped curves."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepscale.config import ModelConfig
from deepscale.errors import UsageError
from deepscale.gradflow.flow import Flow
from deepscale.gradflow.health import LABELS, Thresholds, depth_curve, scalars, verdict
from deepscale.gradflow.values import bins_of, closed_by_gamma, geometric, slope
from deepscale.models.convnext import cross_entropy
from deepscale.models.reference import PlainConvNeXt
from tests.flows import made_up_flow


@functools.cache
def real_flow(depth: int, **settings: object) -> Flow:
    """One record of the plain published network at its initial values, by hooks and a loop over `p.grad`."""
    torch.set_num_threads(1)  # operators this small gain nothing from more
    model = PlainConvNeXt(ModelConfig(depth=depth, patch_size=4, **{"width": 8, **settings})).initialise(0)  # type: ignore[arg-type]
    flow = made_up_flow(depth, 1, gamma=model.config.gamma_init)
    outputs: list[Tensor] = []
    derivatives: list[Tensor] = []
    for stage in model.path:
        for block in stage.blocks:
            block.register_forward_hook(_keeper(outputs))
            block.pwconv1.register_forward_hook(lambda module, inputs, h, f=block.activation: derivatives.append(_derivative(f, h)))
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)
    cross_entropy(model(images), labels).backward()
    parameters = dict(model.named_parameters())
    for i, name in enumerate(flow.layer_names.tolist()):
        g = parameters[name].grad
        assert g is not None
        flow.mean_abs[0, i], flow.l2[0, i], flow.max_abs[0, i] = g.abs().mean(), g.double().norm(), g.abs().max()
        flow.zeros[0, i], flow.nonfinite[0, i] = (g == 0).double().mean(), (~torch.isfinite(g)).double().mean()
        flow.weight_l2[0, i] = parameters[name].detach().norm()
    for i, x in enumerate(outputs):
        assert x.grad is not None
        flow.output_grad_l2[0, i], flow.output_std[0, i] = x.grad.double().norm(), x.detach().double().std()
        flow.dead[0, i] = derivatives[i]
    return flow


def _keeper(outputs: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    return keep


def _derivative(f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """The share of units with |f'| < 0.01 on the whole batch."""
    h = h.detach().requires_grad_()
    (derivative,) = torch.autograd.grad(f(h).sum(), h)
    return (derivative.abs() < 0.01).all(0).flatten(1).all(1).double().mean()


def test_default_network_is_healthy_and_without_skip_vanishing() -> None:
    """1,004 layers as published against the same without a skip: the labels, and the numbers in the sentences."""
    default, without = real_flow(1004), real_flow(1004, skip="none")
    healthy, vanishing = verdict(default), verdict(without)
    assert (healthy.label, vanishing.label) == ("healthy", "vanishing")
    assert 0.05 < healthy.numbers["first_last_ratio"] < 2  # of the same order
    assert abs(healthy.numbers["slope_decades_per_1000_layers"]) < 0.01
    assert healthy.numbers["closed_by_gamma"] == 1002
    assert healthy.sentence.endswith("over 1,004 layers; 1,002 weights closed by gamma")
    assert vanishing.numbers["first_last_ratio"] == 0
    zero = np.flatnonzero(without.output_grad_l2[0] == 0)
    where = f"{len(zero)} of 334 block outputs, from layer {without.block_depths[zero[-1]]} back to the first"
    assert vanishing.sentence.startswith(f"vanishing: the gradient is exactly 0 at {where}; within the stages it falls by 101 decades")


@pytest.mark.parametrize(
    ("depth", "settings", "label"),
    [
        (26, {}, "healthy"),
        (26, {"skip": "none"}, "healthy"),  # shallow enough to train
        (26, {"skip": "none", "norm": "none"}, "vanishing"),
        (26, {"skip": "none", "activation": "sigmoid"}, "vanishing"),
        (110, {"layerscale_init": 1e-6}, "healthy"),
        (110, {"layerscale_init": None, "norm": "none"}, "healthy"),
        (110, {"layerscale_init": 1.0, "activation": "relu", "norm": "batchnorm"}, "healthy"),
        (110, {"layerscale_init": None, "activation": "sigmoid", "norm": "rmsnorm"}, "healthy"),
        (110, {"skip": "none"}, "vanishing"),
        (110, {"skip": "none", "layerscale_init": 50.0, "activation": "relu", "norm": "batchnorm"}, "exploding"),
        (1004, {"layerscale_init": None}, "healthy"),
        (1004, {"skip": "none", "activation": "tanh"}, "vanishing"),  # without an exact zero
        (1004, {"skip": "none", "width": 16}, "vanishing"),  # though it is a million times larger in between
        (1004, {"skip": "none", "width": 32}, "exploding"),  # LayerNorm keeps the signal alive
        (1004, {"skip": "none", "layerscale_init": 3000.0, "norm": "none"}, "non-finite"),
    ],
)
def test_verdict_of_real_networks(depth: int, settings: dict[str, object], label: str) -> None:
    """What the default thresholds were chosen for, at initialisation."""
    found = verdict(real_flow(depth, **settings))
    assert found.label == label, found.sentence
    assert label in LABELS


def test_dead_units_of_a_real_network() -> None:
    """A bias that shuts all ReLUs of one block: its weights get only zeros, the stream goes on, and the sentence names it."""
    model = PlainConvNeXt(ModelConfig(depth=26, width=8, patch_size=4, activation="relu", layerscale_init=None)).initialise(0)
    flow = made_up_flow(26, 1, gamma=None)
    with torch.no_grad():
        model.path[2].blocks[1].pwconv1.bias.fill_(-100.0)
    cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    for i, name in enumerate(flow.layer_names.tolist()):
        g = model.get_parameter(name).grad
        assert g is not None
        flow.mean_abs[0, i], flow.zeros[0, i] = g.abs().mean(), (g == 0).double().mean()
    found = verdict(flow)
    assert found.sentence == "dead layers: 3 of 29 weights get only zeros, the first is stages.2.blocks.1.dwconv (layer 11)"
    assert verdict(flow, thresholds=Thresholds(dead_layers=4)).label == "healthy"


def test_closed_by_gamma_is_never_dead_or_vanishing() -> None:
    """The weights of a block with gamma 0, exactly: their zeros are gamma's; the same zeros with gamma 1 are dead."""
    flow = made_up_flow(26, gamma=0.0)
    closed = closed_by_gamma(flow, 0)
    assert sorted(set(flow.layer_kinds[closed])) == ["dwconv", "pwconv1", "pwconv2"]
    assert closed.sum() == 24
    assert not closed_by_gamma(flow, 1).any()  # gamma has moved
    found = verdict(flow, 0)
    assert (found.label, found.numbers["closed_by_gamma"], found.numbers["dead_layers"]) == ("healthy", 24, 0)
    assert "24 weights closed by gamma" in found.sentence
    assert scalars(flow, 0)["grad/min_mean_abs"] > 0
    flow.weight_l2[0] = 1.0
    opened = verdict(flow, 0)
    assert (opened.label, opened.numbers["dead_layers"]) == ("dead layers", 24)
    assert "closed" not in opened.sentence


def test_what_fixup_closes_is_neither_dead_nor_vanishing() -> None:
    """At the first step all but the head's gradients are 0, since it is 0; at the second the first layers of every branch, since the last is 0."""
    flow = real_flow(26, init="fixup", norm="none")
    assert verdict(flow).sentence.startswith("healthy: the head is still 0")
    flow = made_up_flow(26)
    inside, last = np.isin(flow.layer_kinds, ("dwconv", "pwconv1", "gamma")), flow.layer_kinds == "pwconv2"
    flow.mean_abs[0, inside], flow.zeros[0, inside] = 0.0, 1.0
    assert verdict(flow, 0).label == "dead layers"
    flow.weight_l2[0, last] = 0.0
    found = verdict(flow, 0)
    assert (found.label, found.numbers["closed_by_gamma"]) == ("healthy", 16)


def test_labels_of_made_up_records() -> None:
    """What changes by 8 decades, at which end, and what is not finite; the gravest label wins."""
    vanishing, exploding = made_up_flow(1004, decades=8.0), made_up_flow(1004, decades=-8.0)
    found = verdict(vanishing)
    assert (found.label, verdict(exploding).label) == ("vanishing", "exploding")
    assert found.numbers["slope_decades_per_1000_layers"] == pytest.approx(8000 / 1004, rel=0.01)
    assert verdict(exploding).numbers["slope_decades_per_1000_layers"] == pytest.approx(-8000 / 1004, rel=0.01)
    assert "of the last block's; within the stages it falls by 7.9 decades per 1,000 layers" in found.sentence
    assert verdict(vanishing, thresholds=Thresholds(vanishing_ratio=1e-9)).label == "healthy"
    vanishing.nonfinite[1, [0, 700]] = 0.5
    found = verdict(vanishing, 1)
    assert found.label == "non-finite"
    assert f"2 of {len(vanishing.layer_names):,} layers" in found.sentence
    assert str(vanishing.layer_names[700]).removesuffix(".weight") in found.sentence  # backward met it before the stem
    large = made_up_flow(26)
    large.l2[2, 6] = 1e5
    assert verdict(large, 2).sentence == "exploding: the gradient of stages.1.blocks.0.dwconv (layer 5) has L2 norm 1e+05, over 10,000"
    assert verdict(large, 3).label == "healthy"
    bulge = made_up_flow(26)
    bulge.output_grad_l2[:, 3] = 1e3
    assert verdict(bulge).sentence.startswith("exploding: the gradient at layer 13 of 26 is ")


def test_steps_between_stages_are_not_depths_effect() -> None:
    """A gradient that falls tenfold at each downsampling and else is level: the slope is 0, the ratio is 1e-3."""
    flow = made_up_flow(110)
    flow.output_grad_l2[0] = 10.0**flow.block_groups
    found = verdict(flow, 0)
    assert found.numbers["slope_decades_per_1000_layers"] == pytest.approx(0, abs=1e-9)
    assert found.numbers["first_last_ratio"] == pytest.approx(1e-3)
    flow.output_grad_l2[0] *= 10 ** (flow.block_depths / 500)
    found = verdict(flow, 0)
    assert found.numbers["slope_decades_per_1000_layers"] == pytest.approx(2.0, rel=1e-4)
    assert "it falls by 0.22 decades towards the image, over 110 layers" in found.sentence  # not by 2 per 1,000, of which it has no tenth


def test_zeros_of_the_weights_behind_a_vanished_gradient_are_not_dead() -> None:
    """Exact zeros at the first block outputs, and of all that lies before them: vanishing, with the depth; nothing counts as dead."""
    flow = made_up_flow(110, gamma=None)
    flow.output_grad_l2[0, :10] = 0
    gone = flow.layer_depths <= flow.block_depths[9]
    flow.zeros[0, gone], flow.mean_abs[0, gone], flow.l2[0, gone] = 1, 0, 0
    found = verdict(flow, 0)
    assert (found.label, found.numbers["dead_layers"], found.numbers["zero_blocks"]) == ("vanishing", 0, 10)
    assert f"10 of 36 block outputs, from layer {flow.block_depths[9]} back to the first" in found.sentence
    flow.output_grad_l2[0] = 0
    assert verdict(flow, 0).sentence.startswith("vanishing: the gradient is exactly 0 at 36 of 36 block outputs")


def test_models_without_blocks_are_judged_by_their_weights() -> None:
    """No block observed: mean |g| of the weights; in blocks with a gamma it says nothing, so there stem and head are left."""
    flow = made_up_flow(110, decades=6.0, gamma=None)
    flow.output_grad_l2[:] = np.nan
    assert verdict(flow).label == "vanishing"
    assert "mean |g| of the first layer is" in verdict(flow).sentence
    assert "zero_blocks" not in verdict(flow).numbers
    tiny = made_up_flow(110, gamma=None)
    tiny.output_grad_l2[:] = np.nan
    tiny.mean_abs *= 1e-6
    assert verdict(tiny).label == "vanishing"
    millionth = made_up_flow(110, gamma=1e-6)
    millionth.output_grad_l2[:] = np.nan
    millionth.mean_abs[:, np.isin(millionth.layer_kinds, ("dwconv", "pwconv1", "pwconv2"))] *= 1e-6
    assert verdict(millionth).label == "healthy"


def test_a_stem_that_no_longer_moves_is_vanishing() -> None:
    """Mean |g| of 1e-9 at the stem and 1e-3 at the head; the same factor everywhere is a network that has learnt all it can."""
    flow = made_up_flow(110)
    flow.mean_abs[0, 0], flow.mean_abs[0, -1] = 1e-9, 1e-3
    flow.mean_abs[1] *= 1e-6
    assert verdict(flow, 0).sentence == "vanishing: mean |g| of stem.conv (layer 1) is 1e-09, 1e-06 of the last layer's, over 110 layers"
    assert verdict(flow, 1).label == "healthy"
    flow.mean_abs[2, 0], flow.zeros[2, 0] = 0, 1
    assert verdict(flow, 2).sentence == "vanishing: the gradient of stem.conv (layer 1) is exactly 0"


def test_scalars_are_finite_and_left_out_where_undefined() -> None:
    """On a healthy record, and on one in which nothing is a number: no NaN, no infinity, no stand-in."""
    flow = made_up_flow(26)
    given = scalars(flow, 0)
    assert given["grad/first_layer_mean_abs"] == flow.mean_abs[0, 0]
    assert given["grad/last_layer_mean_abs"] == flow.mean_abs[0, -1]
    assert given["grad/first_last_ratio"] == pytest.approx(flow.output_grad_l2[0, 0] / flow.output_grad_l2[0, -1])
    own = flow.mean_abs[0, flow.weights]
    assert (given["grad/min_mean_abs"], given["grad/max_mean_abs"]) == (own.min(), own.max())
    for array in (flow.mean_abs, flow.l2, flow.output_grad_l2):
        array[0] = np.nan
    flow.nonfinite[0] = 1.0
    given = scalars(flow, 0)
    assert given["grad/nonfinite_layers"] == len(flow.layer_names)
    assert not {"grad/first_last_ratio", "grad/min_mean_abs", "grad/slope_decades_per_1000_layers", "grad/first_layer_mean_abs"} & set(given)
    assert all(math.isfinite(value) for value in given.values())
    flow.output_grad_l2[1] = 0  # no logarithm of it
    assert "grad/first_last_ratio" not in scalars(flow, 1)


def test_a_run_without_records_is_a_sentence() -> None:
    flow = made_up_flow(26, records=1)
    flow.steps = flow.steps[:0]
    with pytest.raises(UsageError, match="no record of gradient flow"):
        verdict(flow)


@pytest.mark.parametrize("depth", [26, 1004])
def test_curves_keep_their_ends(depth: int) -> None:
    """At most 300 points of ascending depth; first and last layer are themselves; the middle is a geometric mean."""
    flow = made_up_flow(depth, decades=6.0)
    for name in ("mean_abs", "output_grad_l2"):
        curve = depth_curve(flow, 0, name)
        depths, values = zip(*curve, strict=True)
        assert len(curve) <= 300
        assert list(depths) == sorted(set(depths))
        assert values[0] == pytest.approx(getattr(flow, name)[0, 0])
        assert values[-1] == pytest.approx(getattr(flow, name)[0, -1])
        # 6 decades over the depth, 12 % noise: every point lies near the line.
        line = 6 * (np.array(depths) / depth - 1)
        assert np.abs(np.log10(values) - line - np.log10(values[-1])).max() < 0.4
    with pytest.raises(UsageError, match="'gradient' is not known; possible: mean_abs"):
        depth_curve(flow, 0, "gradient")


def test_curves_show_zeros_and_leave_out_what_is_no_number() -> None:
    """Zeros stay zeros, infinities and NaN leave no point, shares are averaged as they are, gamma's zeros are not drawn."""
    flow = made_up_flow(26, gamma=None)
    flow.mean_abs[0, 3], flow.mean_abs[0, 6], flow.mean_abs[0, 9] = 0, np.inf, np.nan
    curve = dict(depth_curve(flow, 0, "mean_abs"))
    assert curve[int(flow.layer_depths[3])] == 0
    assert set(flow.layer_depths[[6, 9]].tolist()).isdisjoint(curve)
    flow.zeros[0, flow.layer_depths <= 13] = 1.0
    assert depth_curve(flow, 0, "zeros", points=3)[1][1] == pytest.approx(0.5, abs=0.1)
    assert [depth for depth, _ in depth_curve(made_up_flow(26, gamma=0.0), 0, "mean_abs")] == [1, 26]
    flow.mean_abs[0] = np.nan
    assert depth_curve(flow, 0, "mean_abs") == []


@given(st.lists(st.one_of(st.floats(1e-30, 1e30), st.just(0.0), st.just(math.inf), st.just(math.nan)), min_size=1, max_size=60), st.integers(2, 20))
def test_bins_against_a_plain_loop(values: list[float], points: int) -> None:
    """Any values in any number of bins, against the definition bin by bin."""
    bins, middles = bins_of(np.arange(1, len(values) + 1), points)
    assert len(middles) == min(points, len(values))
    assert sorted(set(bins.tolist())) == list(range(len(middles)))
    for b, mean in enumerate(geometric(np.array(values), bins, len(middles)).tolist()):
        own = [value for value, place in zip(values, bins, strict=True) if place == b and not math.isnan(value)]
        positive = [math.log(value) for value in own if 0 < value < math.inf]
        if math.inf in own:
            assert mean == math.inf
        elif positive:
            assert math.log(mean) == pytest.approx(sum(positive) / len(positive), abs=1e-9)
        else:
            assert mean == 0 if own else math.isnan(mean)


def test_slope_needs_points() -> None:
    """Two positive values, or one in each group, have no slope; zeros and infinities are not fitted."""
    ones, depths = np.ones(4), np.arange(4)
    assert math.isnan(slope(np.array([1.0, 1.0, 0.0, np.inf]), depths, ones))
    assert math.isnan(slope(ones, depths, depths))
    assert slope(np.array([1.0, 10.0, 0.0, 1000.0]), depths, ones) == pytest.approx(1000)
