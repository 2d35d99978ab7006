"""Depth in layers <-> blocks per stage.

The original study's count ("Going Beyond the 1000-Layer Convolution Network"): a layer is a convolution or linear layer
on the path from image to logits: the stem, three per block, the head. The three downsampling convolutions are not counted.
Blocks follow the stage ratio 1:1:9:1.
"""

from deepscale.errors import UsageError

STAGES = 4
LAYERS_PER_BLOCK = 3
MIN_DEPTH = LAYERS_PER_BLOCK * STAGES + 2
MAX_DEPTH = 1_000_000


def blocks_for_depth(depth: int) -> tuple[int, int, int, int]:
    """Blocks per stage of the smallest network with at least `depth` layers.

    n = ceil((depth - 2) / 3) blocks; stages 1, 2 and 4 get max(1, round(n / 12)), stage 3 the rest.

    Raises UsageError outside 14 ... 1,000,000 layers.

    >>> blocks_for_depth(26), blocks_for_depth(1_004), blocks_for_depth(10_000)
    ((1, 1, 5, 1), (28, 28, 250, 28), (278, 278, 2499, 278))
    """
    if not MIN_DEPTH <= depth <= MAX_DEPTH:
        raise UsageError(
            f"--depth {depth} is out of range: {MIN_DEPTH} (one block in each of {STAGES} stages) to {MAX_DEPTH:,} layers; "
            f"type for example --depth 1004"
        )
    total = -(-(depth - 2) // LAYERS_PER_BLOCK)
    side = max(1, round(total / 12))
    return side, side, total - 3 * side, side


def depth_of_blocks(blocks: tuple[int, ...]) -> int:
    """Layers of a network with these blocks per stage: stem + 3 per block + head."""
    return LAYERS_PER_BLOCK * sum(blocks) + 2
