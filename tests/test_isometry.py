"""Initial weights that keep lengths without skip connections: delta-orthogonal convolutions, ConvNeXt's pairs, and the Jacobian they have."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepscale.config import ModelConfig
from deepscale.gradflow.jacobian import jacobian, singular_values
from deepscale.models.components import ACTIVATIONS, Activation
from deepscale.models.convnext import ConvNeXt
from deepscale.models.initial import fill
from deepscale.models.reference import PlainConvNeXt

LINEAR = Activation(torch.clone, lambda g, h, a: g.clone())


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def blocks_of(count: int, **settings: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The third stage of a ConvNeXt without skips, `count` blocks of 8 channels, float64, and an image (1, 8, 3, 3) for it."""
    given = {"blocks": (1, 1, count, 1), "width": 2, "patch_size": 1, "skip": "none", "norm": "none", "init": "paired"} | settings
    model = ConvNeXt(ModelConfig(**given)).initialise(0).double()
    return nn.Sequential(*model.path[2].path), images(1, 8, 3, 3)


def test_the_jacobian_is_autograds() -> None:
    """One pass over copies against torch's own, of a block that changes the number of values."""
    body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)).double()
    x = images(1, 2, 4, 4)
    expected = torch.autograd.functional.jacobian(body, x).view(12, 32)
    torch.testing.assert_close(jacobian(body, x), expected)
    torch.testing.assert_close(singular_values(body, x), torch.linalg.svdvals(expected))
    assert singular_values(lambda x: body(x) * torch.inf, x).isnan().all()


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_delta_orthogonal_convolution_keeps_the_norm_of_every_image(padding_mode: str) -> None:
    """To 1e-5 with either padding, since only the kernel's centre is not 0; an orthogonal matrix spread over the kernel does not."""
    x = images(5, 16, 6, 6).float()
    for init, keeps in (("delta-orthogonal", True), ("orthogonal", False)):
        layer = nn.Conv2d(16, 16, 3, padding=1, bias=False, padding_mode=padding_mode)
        fill(layer.weight, "layers.7.weight", 0, ModelConfig(init=init))
        ratio = layer(x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        assert bool(((ratio - 1).abs() < 1e-5).all()) == keeps, ratio


def test_paired_blocks_are_isometries_where_independent_ones_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """333 linear blocks without skip and norm: all singular values within 1e-4 of 1 (weights are rounded to float32); of independent
    orthogonal weights the largest is below 1e-30, and after 10 blocks the least is 1e-8 of what it was."""
    monkeypatch.setitem(ACTIVATIONS, "tanh", LINEAR)
    values = singular_values(*blocks_of(333, activation="tanh"))
    assert len(values) == 72 and (values - 1).abs().max() < 1e-4
    assert singular_values(*blocks_of(333, activation="tanh", init="orthogonal")).max() < 1e-30
    assert singular_values(*blocks_of(10, activation="tanh", init="orthogonal")).min() < 1e-8


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_mirrored_blocks_are_the_identity_for_activations_whose_odd_part_is_linear(activation: str) -> None:
    """100 blocks with their activation: the image comes out as it went in, and all singular values are 1, within 1e-4."""
    body, x = blocks_of(100, activation=activation, init="mirrored")
    torch.testing.assert_close(body(x), x, rtol=0, atol=1e-4)
    assert (singular_values(body, x) - 1).abs().max() < 1e-4


def test_mirrored_blocks_with_a_norm_pass_the_gradient_on() -> None:
    """LayerNorm and GELU, 333 blocks: after the first, a block's input is normalised already. All but mean and scale, of which a pixel has
    one each, keep their singular value: 6 of 8 on each of 9 pixels."""
    values = singular_values(*blocks_of(333, activation="gelu", init="mirrored", norm="layernorm"))
    kept = values[: 6 * 9]
    assert kept.max() / kept.min() < 10 and kept.min() > 0.1 and kept.max() < 10
    assert values[6 * 9 :].max() < 1e-3


@pytest.mark.parametrize("init", ["paired", "mirrored"])
def test_pairs_are_transposed_and_differ_by_block(init: str) -> None:
    """In the reference: W2 is W1 transposed, bit for bit, W1's columns are orthonormal (half their squared norm in each half), dwconv a delta."""
    state = PlainConvNeXt(ModelConfig(blocks=(1, 1, 2, 1), width=4, patch_size=2, init=init, kernel_size=5)).initialise(3).state_dict()
    for block in ("stages.0.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1"):
        first, second = (state[f"{block}.pwconv{i}.weight"].flatten(1) for i in (1, 2))
        assert torch.equal(second, first.t())
        expected = torch.eye(first.shape[1]) * (2 if init == "mirrored" else 1)
        torch.testing.assert_close(first.t() @ first, expected, rtol=0, atol=1e-5)
        if init == "mirrored":
            assert torch.equal(first[: len(first) // 2], -first[len(first) // 2 :])
        kernel = state[f"{block}.dwconv.weight"][:, 0]
        assert torch.equal(kernel[:, 2, 2], torch.ones(len(kernel))) and kernel.count_nonzero() == len(kernel)
    assert not torch.equal(state["stages.2.blocks.0.pwconv1.weight"], state["stages.2.blocks.1.pwconv1.weight"])
