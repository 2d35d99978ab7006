"""What the network takes, whatever trains it: the sizes of its stages, bytes of activations, FLOPs.

What a block's activations take is its policy's knowledge (activations.py); here are the blocks of all stacks, and what stands
outside them. M = B * H * W rows of a stage on one rank, C its channels. A multiplication and an addition are two FLOPs.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from deepscale.activations import Block, policy_of
from deepscale.config import AUTO, IN_SEGMENTS, Config, ModelConfig
from deepscale.depth import STAGES
from deepscale.models import registry
from deepscale.models.convnext import block_spec, outer_norm, stack_blocks
from deepscale.plan_counted import counted_flops

STREAM_BYTES = 4
BRANCH_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PIXEL_BYTES = 4  # of a channel, normalised
EVALUATION_BATCH = 256  # images per rank that are evaluated at once; without gradients a batch keeps nothing
LARGE = 32 * 2**20  # bytes from which on malloc gives a tensor back to the system when it is freed
OUTER_MEANS = {"layernorm": 2}  # numbers that the outer norm keeps of every row


@dataclass(frozen=True)
class Images:
    """What comes in: images that a rank passes at once, their channels and side, and the classes they are sorted into."""

    micro: int
    channels: int = 3
    side: int = 32
    classes: int = 10

    @property
    def bytes(self) -> int:
        """Of a batch, normalised."""
        return self.micro * self.channels * self.side**2 * PIXEL_BYTES


@dataclass(frozen=True)
class Stage:
    """One stage: its block, the blocks of each of its stacks, and the convolution before them, of side `kernel` from `before` channels.

    Of a network that is cut into pipeline stages, what is in one of them: perhaps without the convolution (`outer`), or without stacks.
    """

    block: Block
    stacks: tuple[int, ...]
    before: int
    kernel: int
    parameters: int  # of blocks and convolution
    outer: bool = True

    @property
    def rows(self) -> int:
        """M."""
        return self.block.rows

    @property
    def channels(self) -> int:
        """C."""
        return self.block.spec.width

    @property
    def stream(self) -> int:
        """Bytes of one tensor (M, C) of the residual stream."""
        return self.block.stream

    @property
    def product(self) -> int:
        """FLOPs of the convolution before the blocks."""
        return 2 * self.rows * self.channels * self.before * self.kernel**2


def segment_of(config: Config) -> int:
    """Blocks recomputed together; 0 where none are."""
    return int(config.engine.segment or 0) if config.engine.activations in IN_SEGMENTS else 0


def data_ranks(config: Config, ranks: int) -> int:
    """Ranks, of so many in all, that share out the images of a step: those of a pipeline's stage."""
    return ranks // config.engine.pipeline_stages


def micro_batch(config: Config, ranks: int) -> int:
    """Images that one of `ranks` ranks passes at once."""
    return int(config.data.batch_size) // config.recipe.accumulation // data_ranks(config, ranks)


def images_of(config: Config, ranks: int, channels: int, image_size: int, classes: int) -> Images:
    """What one of `ranks` ranks passes at once."""
    return Images(micro_batch(config, ranks), channels, image_size, classes)


def stage_shapes(model: ModelConfig, micro: int, image_size: int) -> Iterator[tuple[int, int, int]]:
    """(blocks, rows M, channels C) of each stage."""
    side = image_size // int(model.patch_size)
    for s in range(STAGES):
        yield model.stage_blocks[s], micro * side**2, int(model.width) * 2**s
        side //= 2


def stages_of(config: Config, images: Images) -> list[Stage]:
    """The four stages; the first one's convolution is the stem."""
    model, stages = config.model, list[Stage]()
    norm = {"none": 0, "rmsnorm": 1}.get(outer_norm(model), 2)
    before, kernel = images.channels, int(model.patch_size)
    sizes = stack_blocks(model.stage_blocks, config.engine.stack_size)
    for own, (blocks, rows, width) in zip(sizes, stage_shapes(model, images.micro, images.side), strict=True):
        spec = block_spec(model, width)
        block = Block(spec, rows, STREAM_BYTES, BRANCH_BYTES[config.engine.precision], model.drop_path > 0 and model.drop_path_mode == "sample")
        normed = before if stages else width  # the stem's norm comes after its convolution
        outer = before * width * kernel**2 + width + norm * normed
        stages.append(Stage(block, tuple(own), before, kernel, blocks * spec.parameters + outer))
        before, kernel = width, 2
    return stages


@dataclass(frozen=True)
class Needs:
    """Bytes of one stage on the device.

    kept: what its forward pass leaves for backward. segment: what is computed again before one block's backward. work: what one block's
    and one stack's backward take besides. forward: what one block and one stack take in the forward pass beside what is kept.
    small: of segment and work, in tensors below 32 MiB. tensors: that the blocks keep.
    """

    kept: int
    segment: int
    work: int
    forward: int
    small: int
    tensors: int = 0


def needs_of(config: Config, stages: list[Stage], images: Images) -> list[Needs]:
    """What the stages need, by causes."""
    needs = []
    for s, (stage, outer) in enumerate(zip(stages, _kept_outside(config, stages, images), strict=True)):
        if not stage.stacks:
            needs.append(Needs(outer * stage.outer, 0, 2 * stage.stream * stage.outer, stage.stream * stage.outer, 0))
            continue
        policy = policy_of(config).at(s)
        kept = outer * stage.outer + policy.kept(stage.block, stage.stacks)
        segment = policy.working(stage.block, stage.stacks)
        folded, rows = _folded(config, stage), segment + _block_backward(config, stage)
        stack = folded + _unfolding(stage)
        small = 0 if stage.stream >= LARGE else rows if stage.block.hidden // 2 < LARGE else rows // 4
        small += stack if max(stage.stacks) * _matrix(stage) * STREAM_BYTES < LARGE else 0
        needs.append(
            Needs(kept, segment, _block_backward(config, stage) + stack, _block_forward(config, stage) + folded, small, policy.tensors(stage.stacks))
        )
    return needs


def kept_on_host(config: Config, stages: list[Stage]) -> int:
    """Bytes that the forward pass leaves in host memory."""
    return sum(policy_of(config).at(s).host(stage.block, stage.stacks) for s, stage in enumerate(stages))


def evaluated(config: Config) -> int:
    """Images that a rank evaluates at once."""
    return EVALUATION_BATCH if config.data.eval_images == AUTO else min(EVALUATION_BATCH, int(config.data.eval_images))


def evaluation_bytes(config: Config, images: Images, own: list[Stage]) -> int:
    """What one block and one stack of these stages take while images are evaluated, and the images."""
    batch = dataclasses.replace(images, micro=evaluated(config))
    nothing = ("reconstruct", None) if config.model.skip == "reversible" else ("recompute", 1)
    settings = config.replace(activations=nothing[0], segment=nothing[1], slots=None)
    stages = [stage for stage, here in zip(stages_of(config, batch), own, strict=True) if here.stacks]
    return 2 * batch.bytes + max((_block_forward(settings, stage) + _folded(config, stage) for stage in stages), default=0)


def _kept_outside(config: Config, stages: list[Stage], images: Images) -> list[int]:
    """Kept outside the stacks: the images; the input of every norm and convolution, in low precision the convolution's as a copy; mean and
    deviation of every row."""
    numbers = OUTER_MEANS.get(outer_norm(config.model), 0) * STREAM_BYTES
    branch, low = BRANCH_BYTES[config.engine.precision], config.engine.precision != "fp32"
    first = stages[0]
    kept = [images.bytes + (images.bytes // PIXEL_BYTES * branch if low else 0) + first.stream + first.rows * numbers]
    return kept + [s.stream + s.rows * s.channels * branch + s.rows * numbers for s in stages[:-1]]


def _block_forward(config: Config, stage: Stage) -> int:
    """A block's input and output; computed by torch's operators also its convolution, and what is made but not kept."""
    block = stage.block
    if block.spec.coupled:
        return 2 * block.coupled + block.input + _block_forward_of_branch(config, block)
    return _block_forward_of_branch(config, block)


def _block_forward_of_branch(config: Config, block: Block) -> int:
    if config.engine.kernel == "native":
        return 2 * block.input
    whole = block.input + block.standard + block.hidden
    return 3 * block.input + whole - {"keep": whole, "selective": whole - block.hidden}.get(config.engine.activations, 0)


def _block_backward(config: Config, stage: Stage) -> int:
    """Gradients on a block's output and its input; computed by torch's operators also on f(h) and h, on xhat and on its convolution."""
    coupled = 2 * stage.block.coupled + 2 * stage.block.input if stage.block.spec.coupled else 0
    return coupled + (2 * stage.block.input if config.engine.kernel == "native" else stage.block.hidden + 4 * stage.block.input)


def _folded(config: Config, stage: Stage) -> int:
    """A stack's weights made ready for its blocks: W1 and W2 times the norm's weight and gamma, or cast to the branch's precision."""
    low = config.engine.precision != "fp32"
    dropping = config.model.drop_path > 0 and config.model.drop_path_mode == "batch"
    factor = config.model.gamma_init is not None or stage.block.spec.scale != 1.0 or dropping
    folded = (config.model.norm != "none") + (factor and not low)
    matrix = max(stage.stacks) * _matrix(stage)
    return matrix * (folded * STREAM_BYTES + (2 * stage.block.branch_bytes if low else 0))


def _unfolding(stage: Stage) -> int:
    """Gradients of a stack's folded weights before they become those of its parameters, and a product of W1's size while they do."""
    return max(stage.stacks) * (stage.block.spec.parameters + _matrix(stage)) * STREAM_BYTES


def _matrix(stage: Stage) -> int:
    """Elements of W1, or of W2, of one block."""
    return 4 * stage.block.spec.channels**2


@dataclass(frozen=True)
class Flops:
    """Forward, backward, and what backward computes again."""

    forward: int
    backward: int
    again: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.again


def flops_of(config: Config, ranks: int, channels: int, image_size: int, classes: int) -> Flops:
    """FLOPs of one micro batch of one rank: products, convolutions and row means, as torch's FlopCounterMode counts them.

    Of an outer convolution backward computes two products, of the stem's one: images need no gradient.
    """
    images = images_of(config, ranks, channels, image_size, classes)
    if config.model.model != "convnext":
        return Flops(*counted_flops(config.model, registry.Images(channels, image_size, classes), images.micro), again=0)
    stages = stages_of(config, images)
    head = 2 * images.micro * stages[-1].channels * images.classes
    outer = sum(stage.product for stage in stages) + head
    backward, forward, again = 2 * outer - stages[0].product, outer, 0
    for s, stage in enumerate(stages):
        policy, first = policy_of(config).at(s), sum(stage.stacks) * stage.block.forward
        own = policy.again(stage.block, stage.stacks)
        forward, again = forward + first, again + own
        backward += policy.flops(stage.block, stage.stacks) - own - first
    return Flops(forward, backward, again)
