"""Which blocks a trained network uses: against hooks on the plain network, and removal against really leaving blocks out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepscale import use
from deepscale.activations import KeepAll, Recompute
from deepscale.config import ModelConfig
from deepscale.errors import UsageError
from deepscale.models.convnext import ConvNeXt
from deepscale.models.naming import load_plain
from deepscale.models.reference import PlainConvNeXt

BLOCKS = (2, 3, 6, 2)


class Feed:
    """Two batches of other sizes."""

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images in (batch(3, 0), batch(2, 1)):
            yield images, torch.zeros(len(images), dtype=torch.long)


def batch(images: int, seed: int) -> Tensor:
    return torch.randn(images, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(stack_size: int = 2, **settings: Any) -> tuple[ConvNeXt, PlainConvNeXt]:
    model = ModelConfig(blocks=BLOCKS, width=4, patch_size=2, **{"layerscale_init": 0.5, **settings})
    plain = PlainConvNeXt(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.3)
    stacked = ConvNeXt(model, stack_size=stack_size).double().eval()
    load_plain(stacked, plain.state_dict())
    return stacked, plain


@pytest.mark.parametrize(
    "settings", [{}, {"layerscale_shape": "channel"}, {"skip": "deepnorm", "layerscale_init": None}, {"skip": "reversible"}], ids=str
)
@pytest.mark.parametrize("stack_size", [1, 4])
def test_use_is_what_every_block_adds_over_what_it_is_given(settings: dict[str, Any], stack_size: int) -> None:
    """Against hooks on the plain blocks, float64, images weighing alike whatever their batch; the network is left as it was."""
    stacked, plain = pair(stack_size, **settings)
    seen: list[list[Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        (x,) = inputs
        x = torch.cat(x.chunk(2, 1)[::-1], 1) if module.coupled else x  # whose halves change places
        seen[-1].append((out - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1))

    for stage in plain.path:
        for block in stage.blocks:
            block.register_forward_hook(note)
    with torch.no_grad():
        for images, _ in Feed().epoch():
            seen.append([])
            plain(images)
    expected = torch.stack([torch.cat(values).mean() for values in zip(*seen, strict=True)])
    stacked.train()
    found = use.use_of_blocks(stacked, Feed())  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-10, atol=0)
    assert stacked.training and all(stack.observer is None and not stack._forward_pre_hooks for stack in use.stacks_of(stacked))
    assert use.block_names(stacked)[5] == "stages.2.blocks.0" and len(found) == len(use.block_names(stacked)) == 13


def test_a_closed_block_is_not_used() -> None:
    stacked, _ = pair(layerscale_init=0.5)
    with torch.no_grad():
        for stack in use.stacks_of(stacked):
            stack.gamma.zero_()
    assert use.use_of_blocks(stacked, Feed()) == [0.0] * 13  # type: ignore[arg-type]
    assert use.gammas(stacked) == [0.0] * 13


@pytest.mark.parametrize("policy", [KeepAll(), Recompute(2)], ids=str)
@pytest.mark.parametrize("gone", [[0], [12], [1, 5, 6, 7], list(range(13))], ids=str)
def test_without_blocks_is_the_network_that_does_not_have_them(gone: list[int], policy: Any) -> None:
    """Logits and gradients: left out, against a plain network whose block lists really lack them, and against gamma 0 (logits)."""
    stacked, plain = pair()
    closed, _ = pair()
    policy.apply(stacked)
    use.leave_out(stacked, gone)
    place = 0
    for stage in plain.path:
        kept = [block for i, block in enumerate(stage.blocks) if place + i not in gone]
        place += len(stage.blocks)
        stage.blocks = nn.ModuleList(kept)
    first = 0
    with torch.no_grad():
        for stack in use.stacks_of(closed):
            for i in range(stack.blocks):
                if first + i in gone:
                    stack.gamma[i] = 0.0
            first += stack.blocks
    images = batch(3, 0)
    ours, expected = stacked(images), plain(images)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(closed(images), expected, rtol=1e-11, atol=1e-13)
    ours.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(stacked.stem.conv.weight.grad, plain.stem["conv"].weight.grad, rtol=1e-9, atol=1e-12)
    use.leave_out(stacked, [])
    whole, _ = pair()
    assert torch.equal(stacked(images), whole(images))


def test_the_least_used_come_first() -> None:
    assert use.least_used([0.3, 0.1, 0.2, 0.1]) == [1, 3, 2, 0]


def test_a_network_without_skips_is_refused() -> None:
    with pytest.raises(UsageError, match="no blocks with a skip connection"):
        use.use_of_blocks(ConvNeXt(ModelConfig(depth=14, width=4, patch_size=4, skip="none")), Feed())  # type: ignore[arg-type]
