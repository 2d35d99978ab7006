"""VGG08 and VGG38 of the University of Edinburgh's MLP coursework 2 (2021), after Simonyan and Zisserman (arXiv:1409.1556).

An entry convolution to `width` filters (no bias), BatchNorm and LeakyReLU, whatever the norm elsewhere; three stages of n processing blocks
and a reduction block that halves the resolution; global average pool; linear. A layer is a convolution or the linear one: 8 + 6n of them.
The original's initial weights are torch's defaults (--init torch).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepscale.config import ModelConfig
from deepscale.errors import UsageError
from deepscale.models.components import BatchNorm
from deepscale.models.network import Network
from deepscale.models.registry import Images

STAGES = 3
SLOPE = 0.01  # of LeakyReLU below 0


def _norm(model: ModelConfig) -> nn.Module:
    assert isinstance(model.width, int)
    return BatchNorm(model.width, model.sync_batchnorm) if model.norm == "batchnorm" else nn.Identity()


class ProcessingBlock(nn.Module):
    """leaky(conv2_norm(conv2(leaky(conv1_norm(conv1(x))))) + x): (B, C, H, W) -> the same; `+ x` with a skip connection only."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert isinstance(model.width, int)
        self.conv1 = nn.Conv2d(model.width, model.width, 3, padding=1, bias=False)
        self.conv1_norm = _norm(model)
        self.conv2 = nn.Conv2d(model.width, model.width, 3, padding=1, bias=False)
        self.conv2_norm = _norm(model)
        self.skip = model.skip == "identity"

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2_norm(self.conv2(F.leaky_relu(self.conv1_norm(self.conv1(x)), SLOPE)))
        return F.leaky_relu(y + x if self.skip else y, SLOPE)


class ReductionBlock(nn.Module):
    """leaky(conv2_norm(conv2(pool(leaky(conv1_norm(conv1(x)))))) + pool(x)): (B, C, H, W) -> (B, C, H / 2, W / 2).

    The convolutions have a bias. `+ pool(x)`, the coursework's open question, with a skip connection of --skip-scope all only.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert isinstance(model.width, int)
        self.conv1 = nn.Conv2d(model.width, model.width, 3, padding=1)
        self.conv1_norm = _norm(model)
        self.conv2 = nn.Conv2d(model.width, model.width, 3, padding=1)
        self.conv2_norm = _norm(model)
        self.skip = model.skip == "identity" and model.skip_scope == "all"

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(F.leaky_relu(self.conv1_norm(self.conv1(x)), SLOPE), 2)
        y = self.conv2_norm(self.conv2(y))
        return F.leaky_relu(y + F.avg_pool2d(x, 2) if self.skip else y, SLOPE)


class Entry(nn.Module):
    """Convolution without bias, BatchNorm, LeakyReLU."""

    def __init__(self, model: ModelConfig, channels: int) -> None:
        super().__init__()
        assert isinstance(model.width, int)
        self.conv = nn.Conv2d(channels, model.width, 3, padding=1, bias=False)
        self.norm = BatchNorm(model.width, model.sync_batchnorm)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class VGG(Network):
    """images (B, channels, H, W) -> logits (B, classes)."""

    def __init__(self, model: ModelConfig, images: Images) -> None:
        super().__init__()
        assert isinstance(model.width, int)
        if images.side < 2**STAGES:
            raise UsageError(
                f"images of {images.side} pixels are too small for the three halvings of --model vgg; possible: from {2**STAGES} pixels on"
            )
        self.config = model
        self.entry = Entry(model, images.channels)
        processing = (model.built_depth - 8) // (2 * STAGES)
        self.blocks = nn.ModuleList(
            block for _ in range(STAGES) for block in (*(ProcessingBlock(model) for _ in range(processing)), ReductionBlock(model))
        )
        self.head = nn.Linear(model.width, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))
