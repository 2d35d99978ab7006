"""The networks that are measured, and one training step of them: the same step that training takes (loop.py)."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deepscale.activations import policy_of
from deepscale.config import Config
from deepscale.depth import blocks_for_depth
from deepscale.engine import Engine
from deepscale.loop import train_step
from deepscale.models.convnext import ConvNeXt, default_stack_size, use_kernel
from deepscale.models.reference import PlainConvNeXt
from deepscale.plan_choices import FAST_SEGMENT
from deepscale.world import World

IMAGE_SIZE = 32
CHANNELS = 3
CLASSES = 10
SEED = 0


def configuration(
    *,
    depth: int,
    width: int,
    batch_size: int,
    segment: int = FAST_SEGMENT,
    engine: str = "deepspeed",
    zero: int = 0,
    offload: str = "none",
    nvme_path: str | None = None,
    threads: int = 1,
    kernel: str = "torch",
    precision: str = "fp32",
) -> Config:
    """A configuration in which nothing is left to the planner: the published recipe on the CPU, at full resolution.

    `segment` blocks are recomputed together, 0 keeps all activations.
    """
    return Config().replace(
        depth=depth,
        width=width,
        patch_size=1,
        batch_size=batch_size,
        activations="recompute" if segment else "keep",
        segment=segment or None,
        stack_size=default_stack_size(blocks_for_depth(depth)),
        engine=engine,
        zero=zero,
        offload=offload,
        nvme_path=nvme_path,
        precision=precision,
        device="cpu",
        kernel=kernel,
        threads=threads,
        workers=1,
    )


def build(settings: Config, plain: bool = False) -> nn.Module:
    """The network with its initial values: stacked, or plain as published."""
    if plain:
        return PlainConvNeXt(settings.model, classes=CLASSES, channels=CHANNELS).initialise(SEED)
    return bare(settings).initialise(SEED)


def bare(settings: Config) -> ConvNeXt:
    """The stacked network without values, on torch's current device."""
    model = ConvNeXt(settings.model, classes=CLASSES, channels=CHANNELS, stack_size=settings.engine.stack_size)
    use_kernel(model, settings.engine.kernel)
    return policy_of(settings).apply(model)


def random_batch(images: int, channels_last: bool = True) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W), normal, in the feeds' memory order or contiguous, and labels (B,); always the same."""
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randn(images, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    return (pixels.contiguous(memory_format=torch.channels_last) if channels_last else pixels), labels


class Training:
    """Training steps of one network on one batch, or so many times a micro batch."""

    def __init__(self, engine: Engine, world: World, batch: tuple[Tensor, Tensor], accumulation: int = 1) -> None:
        self.engine, self.world, self.accumulation = engine, world, accumulation
        self.batches: Iterator[tuple[Tensor, Tensor]] = itertools.repeat(batch)
        self.losses: list[float] = []

    def step(self) -> None:
        """Forward, loss, backward, clipping, AdamW."""
        train_step(self.engine, self.batches, self.accumulation, self.world, self.note)

    def note(self, totals: Tensor) -> None:
        """Keeps a step's loss, from its sums."""
        loss, _, images = totals.tolist()
        self.losses.append(loss / images)
