"""Which layer is blamed for a loss that is not finite: really trained networks of 26 layers, spoilt in mid-run.

With torch and every ZeRO stage, on one rank and on two, where every rank must come to the same layer (nonfinite_worker.py).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks
from torch import Tensor

from deepscale.config import Config
from deepscale.engine import TorchEngine
from deepscale.loop import train_step
from deepscale.models.convnext import ConvNeXt
from deepscale.nonfinite import culprit
from deepscale.world import World

HERE = World(0, 1, 0, 1, torch.device("cpu"))

# On one rank the engines differ in nothing that matters here, and on two, how weights lie differs between three.
ENGINES, WHOLE = {1: ("torch",), 2: ("torch", "z0", "z1", "z2", "z3")}, ("torch", "z3")
WEIGHT, OUTPUT = "the first weight that is not finite is ", "all weights are finite, and the first layer whose output is not is "
# values by parameter of the stacked network, [row, value]; what is said
SPOILT: list[tuple[dict[str, list[Any]], str]] = [
    ({"stages.2.stacks.1.pwconv1_weight": [1, "nan"]}, WEIGHT + "stages.2.blocks.2.pwconv1.weight"),
    ({"stages.2.stacks.0.dwconv_bias": [0, "inf"], "stages.3.stacks.0.gamma": [0, "nan"]}, WEIGHT + "stages.2.blocks.0.dwconv.bias"),
    ({"stages.1.downsample.conv.weight": [7, "-inf"]}, WEIGHT + "stages.1.downsample.conv.weight"),
    ({"head.linear.bias": [3, "nan"]}, WEIGHT + "head.linear.bias"),
    # 1e30 times 1e30: what the weights make overflows, and they do not.
    ({f"stages.2.stacks.1.{name}": [0, 1e30] for name in ("pwconv1_bias", "pwconv2_weight")}, OUTPUT + "stages.2.blocks.1"),
    ({"stages.3.downsample.norm.bias": [2, 1e30], "stages.3.downsample.conv.weight": [1, 1e30]}, OUTPUT + "stages.3.downsample.conv"),
    ({}, "the loss stayed finite"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_layer_that_was_spoilt_is_named(ranks: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    wanted = [(engine, *spoilt) for engine in ENGINES[ranks] for spoilt in (SPOILT if engine in WHOLE else SPOILT[3:5])]
    cases = [{"engine": engine, "values": values} for engine, values, _ in wanted]
    found, _ = run_ranks("nonfinite_worker.py", cases, tmp_path, ranks, timeout_s=200)
    expected = {f"{engine} {values}": said for engine, values, said in wanted}
    for rank in found:
        assert dict(zip(expected, rank, strict=True)) == expected


def test_a_gradient_that_overflowed_in_the_step_before_is_told_from_a_spoilt_layer() -> None:
    """Clipping divides all gradients by a norm that is NaN, so that the step before has left no weight finite: none is to blame."""
    settings = Config().replace(depth=14, patch_size=4, width=4, batch_size=8, engine="torch", precision="fp32")
    model = ConvNeXt(settings.model).initialise(0)
    engine, images = TorchEngine(model, settings, HERE), torch.randn(8, 3, 32, 32)

    def spoil(totals: Tensor) -> None:
        assert model.head.linear.bias.grad is not None
        model.head.linear.bias.grad[0] = torch.nan

    train_step(engine, iter([(images, torch.arange(8))]), 1, HERE, spoil)
    assert culprit(model, engine, HERE, [images]) == "no weight is finite any more: a gradient overflowed in the step before"


@pytest.mark.parametrize(
    ("parameter", "row", "layer"),
    [
        ("stem.conv.weight", 0, "stem.conv.weight"),
        ("stages.2.stacks.1.pwconv1_weight", 1, "stages.2.blocks.2.pwconv1.weight"),
        ("head.linear.bias", 3, "head.linear.weight"),
    ],
)
def test_a_gradient_is_named_where_all_else_is_finite(parameter: str, row: int, layer: str) -> None:
    settings = Config().replace(depth=26, patch_size=4, width=4, batch_size=8, engine="torch", precision="fp32")
    model = ConvNeXt(settings.model, stack_size=2).initialise(0)
    engine, images = TorchEngine(model, settings, HERE), torch.randn(8, 3, 32, 32)
    model(images).sum().backward()
    assert culprit(model, engine, HERE, [images]) == "all weights, outputs and gradients are still finite"
    for name in {parameter, "head.linear.weight"}:
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        gradient[row].fill_(torch.nan)
    assert culprit(model, engine, HERE, [images]) == f"all weights and outputs are finite, and the first gradient that is not is that of {layer}"
