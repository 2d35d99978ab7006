"""Images in grey and of another side, made once, when a data set is in memory. Pillow makes them, image for image.

Grey is the luma of ITU-R BT.601; the side is changed by bilinear resampling whose triangle widens with the factor (antialiased). Pillow
adds whole numbers in both, so every machine makes the same pixels and the same digest.

Shapes as in splits.py: M images, H height, W width, C channels.
"""

from dataclasses import replace

import numpy as np

from deepscale.data.splits import Pixels, Source, Split, digest, measure
from deepscale.errors import MissingPackageError


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
    """(M, H, W, C) -> (M, side, side, 1 in grey). Raises MissingPackageError without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError("pillow", None, "--grey and --image-size") from None
    height, width, channels = images.shape[1:]
    made = np.empty((len(images), side or height, side or width, 1 if grey else channels), np.uint8)
    for pixels, place in zip(images, made, strict=True):
        image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        image = image.convert("L") if grey else image
        image = image if side is None else image.resize((side, side), Image.Resampling.BILINEAR)
        place[:] = np.asarray(image).reshape(place.shape)
    return made
