"""Depth without normalisation: Fixup's and DeepNorm's initial values and DeepNorm's skip, each with the property that it claims."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepscale import ops
from deepscale.activations import Recompute
from deepscale.config import SKIP_NAMES, ModelConfig
from deepscale.errors import UsageError
from deepscale.models.components import SKIPS, deepnorm_scale
from deepscale.models.convnext import ConvNeXt, cross_entropy, use_kernel
from deepscale.models.naming import to_plain
from deepscale.models.reference import PlainConvNeXt
from deepscale.ops.op import missing_compiler
from deepscale.studies import normfree
from deepscale.studies.study import Group, Results, Row


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"width": 4, "patch_size": 2, "norm": "none", **settings})


def batch(images: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(images, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), torch.arange(images)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm(), f"{((found - expected).norm() / expected.norm()).item():.2g}"


# --------------------------------------------------------------------------------------------------------- DeepNorm's skip


def test_every_skip_is_known_by_name() -> None:
    assert tuple(SKIPS) == SKIP_NAMES


def test_the_norm_after_it_takes_away_what_divides_it() -> None:
    """LayerNorm(alpha x + b), as published, and LayerNorm(x + b / alpha), as here, float64; alpha x + b alone grows as alpha^L."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(32, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    for blocks in (8, 334, 3_333):
        scale = deepnorm_scale(blocks)
        assert scale == pytest.approx(blocks ** (-1 / 4), rel=1e-12)
        near(F.layer_norm(x + scale * branch, (16,), eps=0.0), F.layer_norm(x / scale + branch, (16,), eps=0.0), 1e-12)


@pytest.mark.parametrize("kernel", ["torch", "native"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"layerscale_init": 0.5}, {"layerscale_init": 0.5, "layerscale_shape": "channel", "norm": "layernorm"}, {"norm": "batchnorm"}],
    ids=lambda settings: "-".join(map(str, settings.values())) or "published",
)
def test_stacked_is_plain_with_deepnorms_skip(settings: dict[str, Any], kernel: str) -> None:
    """Outputs and every gradient of two blocks a stage and five in the third, float64; the scale is not 1 there."""
    if kernel == "native" and (reason := ops.ensure_ops(["block"], print)["block"]):
        assert missing_compiler(), reason
        pytest.skip(reason)
    model = config(blocks=(2, 2, 5, 2), skip="deepnorm", init="deepnorm", **settings)
    plain = PlainConvNeXt(model).initialise(0).double()
    stacked = Recompute(2).apply(ConvNeXt(model, stack_size=3)).initialise(0).double()
    use_kernel(stacked, kernel)
    assert plain.path[0].blocks[0].scale == pytest.approx(11**-0.25)
    images, labels = batch()
    ours, expected = stacked(images), plain(images)
    near(ours, expected, 1e-11)
    cross_entropy(ours, labels).backward()
    cross_entropy(expected, labels).backward()
    own = to_plain(stacked, {name: p.grad for name, p in stacked.named_parameters()})
    largest = max(p.grad.norm() for p in plain.parameters())
    for name, parameter in plain.named_parameters():
        assert (own[name] - parameter.grad).norm() <= 1e-9 * max(parameter.grad.norm(), 1e-3 * largest), name


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_half_precision_scales_in_the_streams(gamma: float | None) -> None:
    """fp16 leaves the scale out of its weights: gradients near float32's, 4 % of each tensor's norm."""
    grads = []
    for enabled in (False, True):
        model = ConvNeXt(config(blocks=(1, 1, 9, 1), skip="deepnorm", init="deepnorm", norm="layernorm", layerscale_init=gamma)).initialise(0)
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            cross_entropy(model(batch(dtype=torch.float32)[0]), batch()[1]).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    largest = max(g.norm() for g in grads[0].values())
    for name, full in grads[0].items():
        assert (grads[1][name] - full).norm() <= 0.04 * max(full.norm(), 0.01 * largest), name


# ----------------------------------------------------------------------------------------------------------- initial values


def initial(model: ModelConfig) -> dict[str, Tensor]:
    return to_plain(ConvNeXt(model).initialise(0))


def deviation(values: Tensor, expected: float) -> None:
    """Within 5 sigma of what is expected of a normal."""
    assert values.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * values.numel()))


def test_fixups_values() -> None:
    """L = 24 blocks: zeros where the paper has them, sqrt(2 / fan in) L^(-1/4) in the branches, sqrt(2 / fan in) outside, gamma 1, biases 0."""
    model = ModelConfig(blocks=(2, 2, 18, 2), width=16, patch_size=2, norm="none", init="fixup")
    state = initial(model)
    for name, value in state.items():
        if name.endswith(("bias", "pwconv2.weight")) or name == "head.linear.weight":
            assert not value.any(), name
        elif name.endswith("gamma"):
            assert torch.equal(value, torch.ones(1)), name
    for name, fan_in in (("pwconv1", 64), ("dwconv", 9)):
        deviation(torch.cat([state[f"stages.2.blocks.{i}.{name}.weight"].flatten() for i in range(18)]), math.sqrt(2 / fan_in) * 24**-0.25)
    deviation(state["stages.3.downsample.conv.weight"], math.sqrt(2 / 256))


def test_deepnorms_values() -> None:
    """L = 24 blocks: Xavier's deviation, (4L)^(-1/4) of it in the 1x1 convolutions of the blocks; no gamma unless asked for."""
    model = ModelConfig(blocks=(2, 2, 18, 2), width=16, patch_size=2, norm="none", init="deepnorm", skip="deepnorm")
    state = initial(model)
    assert not any(name.endswith("gamma") for name in state)
    for name, both, gain in (("pwconv1", 64 + 256, 96**-0.25), ("pwconv2", 256 + 64, 96**-0.25), ("dwconv", 9 + 9, 1.0)):
        deviation(torch.cat([state[f"stages.2.blocks.{i}.{name}.weight"].flatten() for i in range(18)]), gain * math.sqrt(2 / both))
    deviation(state["stages.3.downsample.conv.weight"], math.sqrt(2 / (64 * 4 + 128 * 4)))
    deviation(state["head.linear.weight"], math.sqrt(2 / (128 + 10)))


def change_of_a_step(blocks: tuple[int, ...], boost: float = 0.0) -> float:
    """How much one step of gradient descent on the blocks' weights changes the logits, over the learning rate; with Fixup's scale times L^`boost`.

    The head, which Fixup makes 0, is drawn: with 0 there is nothing to come back from it at the first step.
    """
    model = ConvNeXt(config(blocks=blocks, init="fixup", activation="relu")).initialise(0).double()
    lr = 1e-7
    inside = [p for name, p in model.named_parameters() if ".stacks." in name and name.endswith("weight")]
    with torch.no_grad():
        model.head.linear.weight.copy_(torch.randn(10, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        for name, parameter in model.named_parameters():
            if name.endswith(("dwconv_weight", "pwconv1_weight")):
                parameter.mul_(sum(blocks) ** boost)
    images, labels = batch()
    before = model(images)
    for parameter, gradient in zip(inside, torch.autograd.grad(cross_entropy(before, labels), inside), strict=True):
        parameter.data.sub_(gradient, alpha=lr)
    return float((model(images) - before).detach().norm() / lr)


def test_a_fixup_step_changes_the_output_alike_at_every_depth() -> None:
    """8, 48 and 192 blocks: Theta(lr), within a factor of 1.5; without the scale it grows as their number, here at least half of that."""
    found = [change_of_a_step((1, 1, n - 3, 1)) for n in (8, 48, 192)]
    assert max(found) <= 1.5 * min(found), found
    grown = [change_of_a_step((1, 1, n - 3, 1), boost=1 / 4) for n in (8, 192)]
    assert grown[1] >= 12 * grown[0], grown


@pytest.mark.parametrize(
    ("settings", "signal"),
    [
        ({"init": "kaiming", "layerscale_init": 0.0}, True),
        ({"init": "kaiming", "layerscale_init": 1e-6, "layerscale_shape": "channel"}, True),
        ({"init": "deepnorm", "skip": "deepnorm"}, True),
        ({"init": "kaiming", "layerscale_init": None}, False),
    ],
    ids=["skipinit", "layerscale", "deepnorm", "plain"],
)
def test_what_keeps_the_gradient_level_without_norms(settings: dict[str, Any], signal: bool) -> None:
    """326 layers at initialisation: stage 3's gradient at its first block over its last's is 0.5 to 2; with He's weights alone it explodes."""
    model = ConvNeXt(config(depth=326, **settings), stack_size=1).initialise(0).double()
    seen: list[Tensor] = []
    stacks = model.path[2].path
    for stack in (stacks[0], stacks[-1]):
        stack.register_forward_hook(lambda module, args, out: out.register_hook(seen.append) and None)
    cross_entropy(model(batch()[0]), batch()[1]).backward()
    ratio = float(seen[1].norm() / seen[0].norm())
    assert (0.5 <= ratio <= 2) if signal else not ratio <= 1e6, ratio


# ---------------------------------------------------------------------------------------------------------------- settings


def test_what_leaves_nothing_to_train_is_refused() -> None:
    for settings, words in (
        ({"init": "fixup", "skip": "none"}, "the last layer of every block is 0"),
        ({"init": "fixup", "layerscale_init": 0.0}, "type --layerscale-init 1 or none"),
    ):
        with pytest.raises(UsageError, match=words):
            ModelConfig(**settings)


def test_auto_gamma_goes_with_skip_and_init() -> None:
    for settings, gamma in (
        ({}, 0.0), ({"init": "fixup"}, 1.0), ({"init": "fixup", "layerscale_init": None}, None), ({"skip": "deepnorm"}, None),
        ({"skip": "none"}, None), ({"init": "deepnorm"}, 0.0), ({"skip": "deepnorm", "layerscale_init": 0.0}, 0.0),
    ):  # fmt: skip
        assert ModelConfig(**settings).gamma_init == gamma, settings


# --------------------------------------------------------------------------------------------------------------- the study


def found(slopes: dict[str, float | None], accuracies: dict[tuple[str, int], float]) -> Results:
    """Made-up rows: a method's decades per 1,000 layers at the initial values (None: nothing finite), and what it reaches at a depth."""
    study = normfree.STUDY
    rows = {normfree.at_init(method): {normfree.SLOPE: value} if value is not None else {} for method, value in slopes.items()}
    rows |= {normfree.trained(method, depth): {normfree.ACCURACY: value} for (method, depth), value in accuracies.items()}
    groups = {name: Group(study.case(name), (Row(name, 0, "finished", numbers),), study.converged) for name, numbers in rows.items()}
    return Results(study, "cpu", groups)


def test_findings_follow_from_the_rows() -> None:
    """Each of the study's sentences holds, does not, and is not tested, on rows made up for it."""
    deep = {(method, depth): 0.4 for method in normfree.METHODS for depth in (normfree.SHALLOW, normfree.DEEP)}
    level = dict.fromkeys(normfree.METHODS, 0.05) | {normfree.HE: None}
    expected = found(level, deep | {(normfree.HE, normfree.SHALLOW): 0.1, (normfree.HE, normfree.DEEP): 0.1})
    assert all(finding.holds(expected) for finding in normfree.STUDY.findings)
    opposite = found(dict.fromkeys(normfree.METHODS, 0.2) | {normfree.HE: 0.0}, dict.fromkeys(deep, 0.1) | {(normfree.NORMED, normfree.DEEP): 0.5})
    holding = [finding.holds(opposite) for finding in normfree.STUDY.findings]
    fails = [i for i, finding in enumerate(normfree.STUDY.findings) if finding.sentence.startswith("He's weights alone train neither")]
    assert [i for i, holds in enumerate(holding) if holds] == fails and None not in holding
    assert {finding.holds(found({}, {})) for finding in normfree.STUDY.findings} == {None}
