"""The plain ConvNeXt, as published: separate modules, autograd throughout, 1x1 convolutions, a transpose around each norm.

The reference beside the stacked network of `convnext.py`, and what it is measured against: same initial values, equal
outputs, losses and gradients. Use that one for anything else.
"""

import torch
from torch import Tensor, nn

from deepscale.config import ModelConfig
from deepscale.depth import STAGES
from deepscale.models.components import ACTIVATIONS, SKIPS, ChannelNorm, RunningStatistics
from deepscale.models.convnext import block_spec, drop_rates, outer_norm
from deepscale.models.initial import fill_all


class TransposedNorm(ChannelNorm):
    """The published code's norm over channels of (B, C, H, W): to (B, W, H, C) and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 3)).transpose(1, 3)


class PlainBlock(nn.Module):
    """x + gamma * scale * pwconv2(f(pwconv1(norm(dwconv(x))))); x and scale as --skip says. `channels` are the branch's."""

    def __init__(self, model: ModelConfig, channels: int, drop_rate: float) -> None:
        super().__init__()
        skip = SKIPS[model.skip]
        self.drop_whole = model.drop_path_mode == "batch"
        self.adds, self.coupled, self.scale, self.drop_rate = skip.adds, skip.coupled, skip.scale(sum(model.stage_blocks)), drop_rate
        self.dwconv = nn.Conv2d(channels, channels, model.kernel_size, padding=model.kernel_size // 2, groups=channels)
        self.norm = TransposedNorm(model.norm, channels, model.sync_batchnorm)
        self.pwconv1 = nn.Conv2d(channels, 4 * channels, 1)
        self.activation = ACTIVATIONS[model.activation].forward
        self.pwconv2 = nn.Conv2d(4 * channels, channels, 1)
        self.gamma = None
        if model.gamma_init is not None:
            self.gamma = nn.Parameter(torch.empty(1 if model.layerscale_shape == "scalar" else channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.coupled:
            branch = self.branch(x)
            return x if branch is None else x + branch if self.adds else branch
        first, second = x.chunk(2, 1)
        branch = self.branch(second)
        return torch.cat((second, first if branch is None else first + branch), 1)

    def branch(self, x: Tensor) -> Tensor | None:
        """What the block adds; None where stochastic depth leaves it out."""
        dropping = self.training and self.drop_rate > 0
        if dropping and self.drop_whole and torch.rand((), device="cpu") < self.drop_rate:
            return None
        branch = self.pwconv2(self.activation(self.pwconv1(self.norm(self.dwconv(x)))))
        if self.gamma is not None:
            branch = branch * self.gamma[:, None, None]
        branch = branch * self.scale
        if dropping and self.drop_whole:
            branch = branch / (1 - self.drop_rate)
        elif dropping:
            kept = torch.rand(x.shape[0], device=x.device) >= self.drop_rate
            branch = branch * (kept.to(x.dtype) / (1 - self.drop_rate))[:, None, None, None]
        return branch


class PlainStage(nn.Module):
    """Downsampling, then blocks."""

    def __init__(self, downsample: nn.ModuleDict | None, blocks: list[PlainBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class PlainConvNeXt(nn.Module):
    """images (B, channels, H, W) -> logits (B, classes)."""

    def __init__(self, model: ModelConfig, *, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        assert isinstance(model.width, int) and isinstance(model.patch_size, int), "resolve auto first (plan.py)"
        self.config = model
        kind, sync, blocks = outer_norm(model), model.sync_batchnorm, model.stage_blocks
        self.stem = nn.ModuleDict(
            {"conv": nn.Conv2d(channels, model.width, model.patch_size, model.patch_size), "norm": TransposedNorm(kind, model.width, sync)}
        )
        rates = drop_rates(model.drop_path, 0, sum(blocks), sum(blocks)) or (0.0,) * sum(blocks)
        stages = []
        for s in range(STAGES):
            width = model.width * 2**s
            down = nn.ModuleDict({"norm": TransposedNorm(kind, width // 2, sync), "conv": nn.Conv2d(width // 2, width, 2, 2)}) if s else None
            first = sum(blocks[:s])
            branch = block_spec(model, width).channels
            stages.append(PlainStage(down, [PlainBlock(model, branch, rates[first + i]) for i in range(blocks[s])]))
        self.stages = nn.ModuleList(stages)
        self.path = tuple(stages)  # the same stages, with their type
        last = model.width * 2 ** (STAGES - 1)
        self.head = nn.ModuleDict({"norm": ChannelNorm(kind, last, sync), "linear": nn.Linear(last, classes)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem["norm"](self.stem["conv"](x))
        for stage in self.path:
            if stage.downsample is not None:
                x = stage.downsample["conv"](stage.downsample["norm"](x))
            for block in stage.blocks:
                x = block(x)
        return self.head["linear"](self.head["norm"](x.mean((2, 3))))

    @torch.no_grad()
    def initialise(self, seed: int) -> "PlainConvNeXt":
        """Writes the same initial values as the stacked network's."""
        fill_all(self.named_parameters(), seed, self.config)
        for module in self.modules():
            if isinstance(module, RunningStatistics):
                module.reset_parameters()
        return self
