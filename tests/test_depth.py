"""Depth against blocks: the counts that the original study states, and what must hold for every depth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepscale.config import ModelConfig
from deepscale.depth import MAX_DEPTH, MIN_DEPTH, blocks_for_depth, depth_of_blocks
from deepscale.errors import UsageError
from deepscale.models.convnext import count_parameters
from deepscale.models.reference import PlainConvNeXt

PUBLISHED = {
    26: (1, 1, 5, 1),
    1_004: (28, 28, 250, 28),
    1_607: (45, 45, 400, 45),
    10_001: (278, 278, 2_499, 278),
}
# Parameters at widths 64, 128, 256, 512 with a scalar gamma per block and 10 classes, as published.
PARAMETERS = {1_004: 196_499_672, 1_607: 314_436_193, 10_001: 1_953_654_031}


@pytest.mark.parametrize(("depth", "blocks"), PUBLISHED.items())
def test_published_depths_have_the_published_blocks(depth: int, blocks: tuple[int, ...]) -> None:
    assert blocks_for_depth(depth) == blocks
    assert depth_of_blocks(blocks) == depth


@pytest.mark.parametrize(
    ("asked", "built"), [(14, 14), (15, 17), (24, 26), (27, 29), (1_000, 1_001), (10_000, 10_001), (100_000, 100_001), (1_000_000, 1_000_001)]
)
def test_a_depth_is_rounded_up_to_the_next_reachable_one(asked: int, built: int) -> None:
    """Reachable are 2 + 3 n layers, n from 4."""
    assert depth_of_blocks(blocks_for_depth(asked)) == built
    assert ModelConfig(depth=asked).built_depth == built


@settings(max_examples=300, deadline=None)
@given(st.integers(MIN_DEPTH, MAX_DEPTH))
def test_every_depth_is_built_within_one_block_and_in_the_ratio(depth: int) -> None:
    """At least what was asked and less than a block more; stages 1, 2 and 4 equal and within half a block of a twelfth."""
    blocks = blocks_for_depth(depth)
    first, second, third, fourth = blocks
    assert depth <= depth_of_blocks(blocks) < depth + 3
    assert min(blocks) >= 1
    assert first == second == fourth
    assert first == 1 or abs(first - sum(blocks) / 12) <= 0.5
    assert third == sum(blocks) - 3 * first


@settings(max_examples=100, deadline=None)
@given(st.integers(MIN_DEPTH, MAX_DEPTH - 1))
def test_a_greater_depth_never_has_fewer_blocks(depth: int) -> None:
    assert sum(blocks_for_depth(depth + 1)) - sum(blocks_for_depth(depth)) in (0, 1)


@pytest.mark.parametrize("depth", [-1, 0, 1, 13, 1_000_001, 10**9])
def test_a_depth_out_of_range_is_refused_with_the_range(depth: int) -> None:
    with pytest.raises(UsageError, match=rf"--depth {depth} is out of range: 14 .* to 1,000,000 layers; type for example --depth 1004"):
        blocks_for_depth(depth)


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameters_are_exactly_the_published_ones(depth: int) -> None:
    """The stacked and the plain network against the published counts, on the meta device: nothing is allocated."""
    model = ModelConfig(depth=depth, width=64, patch_size=1)
    with torch.device("meta"):
        plain = PlainConvNeXt(model)
    assert {p.device.type for p in plain.parameters()} == {"meta"}
    assert sum(p.numel() for p in plain.parameters()) == PARAMETERS[depth]
    assert count_parameters(model) == PARAMETERS[depth]


def test_parameters_follow_gamma_and_classes() -> None:
    """Against counts by hand: no gamma is one parameter less a block, gamma per channel C instead of 1, 100 classes 90 more rows of the head."""
    base = ModelConfig(depth=26, width=8, patch_size=1)
    scalar = count_parameters(base)
    channels = [8, 16, *[32] * 5, 64]
    assert count_parameters(ModelConfig(depth=26, width=8, patch_size=1, layerscale_init=None)) == scalar - len(channels)
    assert count_parameters(ModelConfig(depth=26, width=8, patch_size=1, layerscale_shape="channel")) == scalar - len(channels) + sum(channels)
    assert count_parameters(base, classes=100) == scalar + 90 * (64 + 1)
    assert count_parameters(base, channels=1) == scalar - 2 * 8
