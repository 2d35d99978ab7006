"""ConvNeXt (arXiv:2201.03545) of any depth, made of BlockStacks.

The network of "Going Beyond the 1000-Layer Convolution Network": a p x p stem convolution and norm; four stages of width
C, 2C, 4C, 8C; before stages 2, 3 and 4 a norm and a 2x2 convolution of stride 2; head of global average pool, norm and
linear. `plain_names` maps every parameter to its name in the plain network (`reference.py`), in path order.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepscale.config import AUTO, Auto, ModelConfig, StackSize
from deepscale.depth import STAGES
from deepscale.models.block import BlockSpec
from deepscale.models.components import SKIPS, ChannelNorm
from deepscale.models.network import Network, PlainName
from deepscale.models.stack import BlockStack


def outer_norm(model: ModelConfig) -> str:
    """The norm outside the blocks: --norm-scope blocks leaves the published LayerNorm there."""
    return model.norm if model.norm_scope == "all" else "layernorm"


def block_spec(model: ModelConfig, channels: int) -> BlockSpec:
    """What the blocks of a stage of this width share."""
    gamma = "none" if model.gamma_init is None else model.layerscale_shape
    scale = SKIPS[model.skip].scale(sum(model.stage_blocks))
    branch = channels // 2 if SKIPS[model.skip].coupled else channels
    return BlockSpec(branch, model.kernel_size, model.activation, model.norm, model.skip, gamma, model.sync_batchnorm, scale)


def default_stack_size(stage_blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks per stack of each stage: about sqrt(blocks) in the third stage, which has most, and as many parameters in the others.

    A block has four times the parameters of one in the stage before. Stacks of equal parameters make what is whole at one time
    small, gradients before they are averaged and weights that ZeRO-3 has gathered, at no more tensors than stacks of equal blocks.
    """
    largest = math.sqrt(sum(stage_blocks))
    return tuple(min(blocks, max(1, round(largest * 4.0 ** (2 - s)))) for s, blocks in enumerate(stage_blocks))


def smallest_segment(stage_blocks: tuple[int, ...]) -> int:
    """Blocks recomputed together that hold least: a kept input is a tenth of what a block's backward needs, so sqrt(blocks / 10)."""
    return max(1, round(math.sqrt(sum(stage_blocks) / 10)))


def split_evenly(blocks: int, largest: int) -> list[int]:
    """`blocks` in as few parts of at most `largest` as possible, sizes differing by at most one."""
    parts = -(-blocks // largest)
    return [blocks * (i + 1) // parts - blocks * i // parts for i in range(parts)]


def stack_blocks(stage_blocks: tuple[int, ...], stack_size: StackSize | Auto = AUTO) -> list[list[int]]:
    """Blocks of each stack of each stage; `stack_size` is the most, one number for all stages or one for each."""
    size = default_stack_size(stage_blocks) if stack_size == AUTO else stack_size
    sizes = (size,) * STAGES if isinstance(size, int) else size
    return [split_evenly(blocks, largest) for blocks, largest in zip(stage_blocks, sizes, strict=True)]


def stack_tensors(model: ModelConfig, stack_size: StackSize | Auto = AUTO) -> list[list[int]]:
    """Elements of each parameter of each stack, in path order: the stacks that ConvNeXt builds. Counted, nothing is allocated."""
    assert isinstance(model.width, int), "resolve auto first (plan.py)"
    stacks = []
    for s, sizes in enumerate(stack_blocks(model.stage_blocks, stack_size)):
        shapes = block_spec(model, model.width * 2**s).shapes().values()
        stacks += [[n * math.prod(shape) for shape in shapes] for n in sizes]
    return stacks


class Convolution(nn.Module):
    """norm after (stem) or before (downsampling) a strided convolution, on channels-last memory; gives the residual stream."""

    def __init__(self, kind: str, sync: bool, channels: tuple[int, int], side: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        if norm_first:  # parameters are listed in path order
            self.norm = ChannelNorm(kind, channels[0], sync)
        self.conv = nn.Conv2d(channels[0], channels[1], side, side)
        if not norm_first:
            self.norm = ChannelNorm(kind, channels[1], sync)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return stream(self.conv(self._normalise(x)) if self.norm_first else self._normalise(self.conv(x)))

    def _normalise(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Head(nn.Module):
    """Global average pool, norm, linear: (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, kind: str, sync: bool, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(kind, channels, sync)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.mean((2, 3))))


class Stage(nn.Module):
    """Downsampling (but for the first stage), then the stage's blocks in stacks."""

    def __init__(self, downsample: Convolution | None, stacks: list[BlockStack]) -> None:
        super().__init__()
        self.downsample = downsample
        self.stacks = nn.ModuleList(stacks)
        self.path = tuple(stacks)  # the same stacks, with their type


class ConvNeXt(Network):
    """images (B, channels, H, W) -> logits (B, classes).

    `width` and `patch_size` must be resolved numbers. `stack_size` (stack_blocks) changes no value.
    """

    def __init__(self, model: ModelConfig, *, classes: int = 10, channels: int = 3, stack_size: StackSize | Auto = AUTO) -> None:
        super().__init__()
        assert isinstance(model.width, int) and isinstance(model.patch_size, int), "resolve auto first (plan.py)"
        self.config = model
        blocks = model.stage_blocks
        kind, sync, total, sizes = outer_norm(model), model.sync_batchnorm, sum(blocks), stack_blocks(blocks, stack_size)
        self.stem = Convolution(kind, sync, (channels, model.width), model.patch_size, norm_first=False)
        stages, done = [], 0
        for s in range(STAGES):
            width = model.width * 2**s
            downsample = Convolution(kind, sync, (width // 2, width), 2, norm_first=True) if s else None
            stacks, first = [], 0
            for n in sizes[s]:
                rates = drop_rates(model.drop_path, done + first, n, total)
                stacks.append(BlockStack(block_spec(model, width), first, n, rates, model.drop_path_mode == "batch"))
                first += n
            stages.append(Stage(downsample, stacks))
            done += blocks[s]
        self.stages = nn.ModuleList(stages)
        self.path = tuple(stages)  # the same stages, with their type
        self.head = Head(kind, sync, model.width * 2 ** (STAGES - 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.path:
            if stage.downsample is not None:
                x = stage.downsample(x)
            dtype = x.dtype
            for stack in stage.path:
                x = stack(x)
            x = x.to(dtype)  # reversible blocks give float64
        return self.head(x)

    def stacks(self) -> Iterator[tuple[str, BlockStack]]:
        """(prefix of its blocks' names in the plain network, stack) of every stack, in path order."""
        for s, stage in enumerate(self.path):
            for stack in stage.path:
                yield f"stages.{s}.blocks", stack

    def parts(self) -> list[nn.Module]:
        """The modules that a pass calls one after the other; of reversible blocks, whose stream has another dtype within a stage, none."""
        if self.config.skip == "reversible":
            return []
        stages = [[] if stage.downsample is None else [stage.downsample] for stage in self.path]
        return [self.stem, *(part for own, stage in zip(stages, self.path, strict=True) for part in (*own, *stage.path)), self.head]

    def plain(self) -> nn.Module:
        """The reference of the same sizes, without values."""
        from deepscale.models.reference import PlainConvNeXt

        return PlainConvNeXt(self.config, classes=self.head.linear.out_features, channels=self.stem.conv.in_channels)

    def plain_names(self) -> Iterator[tuple[str, PlainName]]:
        """(name in the plain network, place here) of every parameter, in path order from image to logits."""
        for own in _names(self.stem, "stem."):
            yield own, PlainName(own, None)
        for s, stage in enumerate(self.path):
            if stage.downsample is not None:
                for own in _names(stage.downsample, f"stages.{s}.downsample."):
                    yield own, PlainName(own, None)
            for t, stack in enumerate(stage.path):
                for i in range(stack.blocks):
                    for name in stack.spec.shapes():
                        plain = f"stages.{s}.blocks.{stack.first + i}.{name}"
                        yield plain, PlainName(f"stages.{s}.stacks.{t}.{name.replace('.', '_')}", i)
        for own in _names(self.head, "head."):
            yield own, PlainName(own, None)


def _names(module: nn.Module, prefix: str) -> Iterator[str]:
    return (prefix + name for name, _ in module.named_parameters())


def use_kernel(model: nn.Module, kernel: str) -> None:
    """What computes the blocks from now on: "torch" (its operators), or "native", which must be loaded (deepscale/kernel.py sees to both)."""
    for module in model.modules():
        if isinstance(module, BlockStack):
            module.kernel = kernel


def drop_rates(last: float, first: int, blocks: int, total: int) -> tuple[float, ...] | None:
    """Stochastic depth's rates of these blocks, growing linearly from 0 to `last` over all blocks (arXiv:1603.09382)."""
    return tuple(last * (first + i) / max(1, total - 1) for i in range(blocks)) if last else None


def stream(x: Tensor) -> Tensor:
    """The residual stream is at least float32: 3,333 additions of 1/3,333 to 1.0 leave 1.0 in bfloat16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def decays(plain_name: str) -> bool:
    """Weight decay goes by role: convolution and linear weights, never biases, norms or gamma, whatever their dimensions."""
    owner, _, kind = plain_name.rpartition(".")
    return kind == "weight" and not owner.endswith("norm")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two optimiser groups, with and without decay, by role."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # frozen
            continue
        groups[decays(name.replace("_weight", ".weight"))].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def count_parameters(model: ModelConfig, classes: int = 10, channels: int = 3) -> int:
    """Parameters of the network, counted: nothing is allocated."""
    assert isinstance(model.width, int), "resolve auto first (plan.py)"
    blocks = sum(n * block_spec(model, model.width * 2**s).parameters for s, n in enumerate(model.stage_blocks))
    return blocks + _count_outside(dataclasses.replace(model, blocks=(1,) * STAGES), classes, channels)


@functools.lru_cache(maxsize=1024)
def _count_outside(model: ModelConfig, classes: int, channels: int) -> int:
    """Parameters of a network on the meta device that belong to none of its blocks."""
    with torch.device("meta"):
        network = ConvNeXt(model, classes=classes, channels=channels)
    return sum(p.numel() for name, p in network.named_parameters() if ".stacks." not in name)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in at least float32."""
    return F.cross_entropy(stream(logits), labels)
