"""Crop, flip, colour jitter and normalisation of a whole batch at once.

What torchvision's RandomCrop(padding=4), RandomHorizontalFlip and ColorJitter do image by image, in that order. Colour
works on floats, without torchvision's rounding to whole numbers between its steps. Random numbers are drawn on the host
for the global batch and each rank takes its part: an image is augmented the same whatever the number of ranks.

Shapes: B images of this rank's batch, G images of the global batch, H W C as in splits.py; images lie as (B, H, W, C)
in memory throughout, which is torch's channels_last once the axes are named (B, C, H, W).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PADDING = 4  # pixels of zero around the image before the crop
GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


@dataclass(frozen=True)
class Draws:
    """The random choices of a batch.

    `crops` int64 (2, B): first row and column of the crop in the padded image, 0 .. 2 * PADDING; `flips` bool (B,);
    `factors` float32 (3, B): brightness, contrast, saturation; `order`: the order of these three, one for the batch.
    """

    crops: NDArray[np.int64]
    flips: NDArray[np.bool_]
    factors: NDArray[np.float32]
    order: tuple[int, ...]

    @staticmethod
    def make(random: np.random.Generator, count: int, jitter: float) -> "Draws":
        """Choices for `count` images; factors are uniform in [1 - jitter, 1 + jitter]."""
        crops = random.integers(0, 2 * PADDING + 1, (2, count))
        flips = random.random(count) < 0.5
        factors = (1 + jitter * (2 * random.random((3, count)) - 1)).astype(np.float32)
        return Draws(crops, flips, factors, tuple(int(step) for step in random.permutation(3)))

    def part(self, part: slice) -> "Draws":
        """The choices of these images alone."""
        return Draws(self.crops[:, part], self.flips[part], self.factors[:, part], self.order)


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A small array on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def crop(images: Tensor, crops: NDArray[np.int64]) -> Tensor:
    """Images uint8 (B, H, W, C) cropped to (B, H, W, C) out of themselves padded by zeros; `crops` int64 (2, B)."""
    count, height, width, channels = images.shape
    padded = images.new_zeros((count, height + 2 * PADDING, width + 2 * PADDING, channels))
    padded[:, PADDING:-PADDING, PADDING:-PADDING] = images
    image, row, pixel, byte = padded.stride()
    # Every possible crop as a view (B, row, column, H, W * C): one gather picks a crop per image and copies whole rows.
    shape = (count, 2 * PADDING + 1, 2 * PADDING + 1, height, width * channels)
    strides = (image, row, pixel, row, byte)
    if images.device.type == "cpu":  # numpy copies row by row here, torch byte by byte: 4x slower
        windows = np.lib.stride_tricks.as_strided(padded.numpy(), shape, strides)
        picked = torch.from_numpy(windows[np.arange(count), crops[0], crops[1]])
    else:
        at = to_device(crops, images.device)
        picked = padded.as_strided(shape, strides)[torch.arange(count, device=images.device), at[0], at[1]]
    return picked.view(count, height, width, channels)


def flip(images: Tensor, flips: NDArray[np.bool_]) -> Tensor:
    """Images (B, H, W, C), in place: those with a true entry in `flips` (B,) are mirrored left to right."""
    chosen = to_device(np.flatnonzero(flips), images.device)
    return images.index_copy_(0, chosen, images.index_select(0, chosen).flip(2))


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * other).clamp_(0, 255)


def _grey(images: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, 1); one channel stays as it is."""
    if images.shape[3] != 3:
        return images
    red, green, blue = images[..., 0:1], images[..., 1:2], images[..., 2:3]
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


COLOUR_STEPS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda images, factor: _blend(images, 0.0, factor),  # brightness
    lambda images, factor: _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factor),  # contrast
    lambda images, factor: _blend(images, _grey(images), factor),  # saturation; one channel is its own grey
)


def colour(images: Tensor, draws: Draws) -> Tensor:
    """Images float32 (B, H, W, C), 0..255, with brightness, contrast and saturation changed per image."""
    factors = to_device(draws.factors, images.device).view(3, -1, 1, 1, 1)
    for step in draws.order:
        images = COLOUR_STEPS[step](images, factors[step])
    return images


class Normalise:
    """(image - mean) / std per channel, `mean` and `std` of 255: uint8 or float32 (B, H, W, C) -> float32 (B, C, H, W)."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int, device: torch.device) -> None:
        # One factor per value of a whole image: long runs of memory are faster than runs of three channels.
        deviation = torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / deviation).repeat(size * size).float().to(device)
        self.shift = (-torch.tensor(mean, dtype=torch.float64) / deviation).repeat(size * size).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images, channels_last."""
        flat = images.reshape(images.shape[0], -1)
        flat = flat.float() if flat.dtype == torch.uint8 else flat
        return flat.mul_(self.scale).add_(self.shift).view(images.shape).permute(0, 3, 1, 2)
