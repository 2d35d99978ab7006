"""Colour jitter inside FFCV's compiled pipeline: torchvision's ColorJitter(j, j, j) in one pass over each image.

FFCV's own RandomBrightness, RandomContrast and RandomSaturation come in a fixed order, cut to whole numbers after each, and take
55 microseconds per 32x32 image together. Here the three come in a random order per image, as in torchvision, in float32 that is rounded once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

RED, GREEN, BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)  # Pillow's grey; their sum is 1, so grey pixels stay grey


def jitter_image(image: NDArray[np.uint8], work: NDArray[np.float32], order: NDArray[np.int64], factors: NDArray[np.float32]) -> None:
    """Changes `image` (P, 3) in place; `work` (P, 3) is scratch.

    Step order[k] of 0 brightness, 1 contrast, 2 saturation is done with factors[k]: 0 gives black, the mean grey, each pixel's
    grey; 1 changes nothing. Plain Python for the tests; FFCV's compiler makes machine code of it.
    """
    pixels = len(image)
    for p in range(pixels):
        for c in range(3):
            work[p, c] = image[p, c]
    for k in range(3):
        factor = factors[k]
        rest = np.float32(1) - factor
        mean = np.float32(0)
        if order[k] == 1:
            for p in range(pixels):
                mean += RED * work[p, 0] + GREEN * work[p, 1] + BLUE * work[p, 2]
            mean /= np.float32(pixels)
        for p in range(pixels):
            grey = mean
            if order[k] == 2:
                grey = RED * work[p, 0] + GREEN * work[p, 1] + BLUE * work[p, 2]
            for c in range(3):
                work[p, c] = min(max(factor * work[p, c] + rest * grey, np.float32(0)), np.float32(255))
    for p in range(pixels):
        for c in range(3):
            image[p, c] = np.uint8(work[p, c] + np.float32(0.5))


def color_jitter(jitter: float) -> Any:
    """The operation for an FFCV pipeline of uint8 images (H, W, 3): factors are uniform in [1 - jitter, 1 + jitter], 0 <= jitter <= 1."""
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation

    class ColorJitter(Operation):  # type: ignore[misc]
        def generate_code(self) -> Callable[..., Any]:
            images_of, change = Compiler.get_iterator(), Compiler.compile(jitter_image)

            def jitter_batch(images, work):  # type: ignore[no-untyped-def]
                pixels = images.shape[1] * images.shape[2]
                for i in images_of(images.shape[0]):
                    factors = (1 - jitter + 2 * jitter * np.random.rand(3)).astype(np.float32)
                    change(images[i].reshape(pixels, 3), work[i].reshape(pixels, 3), np.random.permutation(3), factors)
                return images

            jitter_batch.is_parallel = True  # type: ignore[attr-defined]
            return jitter_batch

        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            return previous_state, AllocationQuery(previous_state.shape, np.dtype(np.float32))

    return ColorJitter()
