"""Images in grey and of another side, made once, when a data set is in memory.

Grey is the luma of ITU-R BT.601, 0.299 red + 0.587 green + 0.114 blue, in Pillow's whole numbers. The side is changed by bilinear
resampling whose triangle widens with the factor (antialiased), as Pillow does it: columns, then rows, each rounded. All sums are of
whole numbers, so every machine makes the same pixels and the same digest.

Shapes as in splits.py: M images, H height, W width, C channels.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deepscale.data.splits import Pixels, Source, Split, digest, measure

LUMA = (19595, 38470, 7471)  # of 2**16
FRACTION = 22  # bits of a resampling weight
CHUNK = 1024  # images at once


def shaped(source: Source, grey: bool, side: int | None) -> Source:
    """The source in grey and with `side` pixels a side, as far as it is not; its mean and std are those of the new pixels, its label says it."""
    info, label = source.info, source.info.label
    grey, resample = grey and info.channels != 1, side is not None and side != info.image_size
    if not grey and not resample:
        return source
    label += ", in grey (ITU-R 601)" if grey else ""
    label += f", resampled to {side}x{side} (bilinear)" if resample else ""
    parts = [Split(_shaped(split.images, grey, side if resample else None), split.labels) for split in (source.train, source.validation, source.test)]
    mean, std = measure(parts[0].images)
    size, channels = side if side is not None else info.image_size, 1 if grey else info.channels
    return Source(replace(info, label=label, channels=channels, image_size=size, mean=mean, std=std, digest=digest(*parts)), *parts)


def _shaped(images: Pixels, grey: bool, side: int | None) -> Pixels:
    height, width, channels = images.shape[1:]
    made = np.empty((len(images), side or height, side or width, 1 if grey else channels), np.uint8)
    for first in range(0, len(images), CHUNK):
        part = images[first : first + CHUNK]
        part = luma(part) if grey else part
        made[first : first + CHUNK] = part if side is None else resampled(part, side)
    return made


def luma(images: Pixels) -> Pixels:
    """(M, H, W, 3) -> (M, H, W, 1)."""
    red, green, blue = (images[..., channel].astype(np.uint32) * weight for channel, weight in enumerate(LUMA))
    return ((red + green + blue + 2**15) >> 16).astype(np.uint8)[..., None]


def resampled(images: Pixels, side: int) -> Pixels:
    """(M, H, W, C) -> (M, side, side, C)."""
    rows, columns = _triangle(images.shape[1], side), _triangle(images.shape[2], side)
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float64)
    made = _rounded(rows @ _rounded(pixels @ columns.T))
    return np.ascontiguousarray(made.transpose(0, 2, 3, 1)).astype(np.uint8)


def _rounded(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels of weighted sums, which float64 holds exactly (below 2**31), in whatever order a matrix product adds them."""
    return np.clip(np.floor(sums / 2.0**FRACTION + 0.5), 0, 255)


def _triangle(size: int, side: int) -> NDArray[np.float64]:
    """What each of `size` old pixels gives to each of `side` new ones (side, size): whole numbers, of 2**FRACTION."""
    centre = (np.arange(side) + 0.5) * size / side
    distance = np.abs(np.arange(size) + 0.5 - centre[:, None]) / max(1.0, size / side)
    weights = np.maximum(0.0, 1.0 - distance)
    return np.floor(weights / weights.sum(axis=1, keepdims=True) * 2**FRACTION + 0.5)
