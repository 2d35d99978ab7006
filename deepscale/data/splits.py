"""What a data set is once it is in memory, and how its images are divided and ordered.

The validation split is held out of the training images class by class, the same for every run seed, so that runs with
different seeds choose on the same images. Validation and test keep a class-interleaved order: any prefix of them holds
the classes equally often, which makes evaluating the first n images a fair estimate.

Shapes: M images, H height, W width, C channels; pixels are uint8, 0..255.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

HELD_OUT = {"cifar100": 0.05}
HELD_OUT_ELSE = 0.10

# Mean and standard deviation per channel over the training images, of 255. CIFAR-10 as in the original study.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "fashionmnist": ((72.9,), (90.0,)),
}


@dataclass(frozen=True)
class DatasetInfo:
    """What a run records about its images.

    `image_size` is the side in pixels (H = W), `mean` and `std` are per channel and of 255, `digest` is the SHA-256 of
    all pixels and labels, `location` is where they came from.
    """

    name: str
    label: str
    classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    train_images: int
    validation_images: int
    test_images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    location: str


@dataclass(frozen=True)
class Split:
    """Images uint8 (M, H, W, C), memory-mapped where they rest in a cache, and labels int64 (M,)."""

    images: Pixels
    labels: Labels


@dataclass(frozen=True)
class Source:
    """A data set: what it is, and its three splits."""

    info: DatasetInfo
    train: Split
    validation: Split
    test: Split


def _deal(labels: Labels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All indices (M,), dealt like cards: the first of every class, the second of every class, ...; and each one's round."""
    # RandomState, not default_rng: its streams are frozen for ever, and this order must never change.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
    rounds = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    dealt = np.lexsort((labels[by_class], rounds))
    return by_class[dealt], rounds[dealt]


def interleaved(labels: Labels) -> NDArray[np.int64]:
    """An order (M,) of all images in which every prefix holds each class equally often (+-1 while the class lasts)."""
    return _deal(labels)[0]


def hold_out(labels: Labels, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (ascending) that stay in training and indices (class-interleaved) of the validation split.

    Every class gives the same fraction, and at least one image where it has two; a single image stays in training.
    """
    order, rounds = _deal(labels)
    counts = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
    fraction = HELD_OUT.get(name, HELD_OUT_ELSE)
    wanted = np.where(counts > 1, np.maximum(1, np.rint(counts * fraction)), 0)
    held = rounds < wanted[labels[order]]
    return np.sort(order[~held]), order[held]


def epoch_order(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order (images,) of all training images in one epoch, the same on every rank and for every feed."""
    order: NDArray[np.int64] = np.random.default_rng([seed, epoch]).permutation(images)
    return order


def measure(images: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of 255, over images (M, H, W, C); the std is at least 1."""
    height, width, channels = images.shape[1:]
    total, square = np.zeros(height * width * channels), np.zeros(height * width * channels)
    for first in range(0, len(images), 1024):
        flat = images[first : first + 1024].reshape(-1, total.size).astype(np.uint16)
        total += flat.sum(axis=0, dtype=np.uint32)
        square += np.square(flat, out=flat).sum(axis=0, dtype=np.uint32)  # 255^2 fits 16 bits, 1,024 of them 32
    pixels = max(1, len(images) * height * width)
    mean = total.reshape(-1, channels).sum(axis=0) / pixels
    variance = np.maximum(square.reshape(-1, channels).sum(axis=0) / pixels - mean**2, 1.0)
    return tuple(round(float(m), 2) for m in mean), tuple(round(float(s), 2) for s in np.sqrt(variance))


def digest(*splits: Split) -> str:
    """SHA-256 over shapes, pixels and labels of these splits, in their order."""
    total = hashlib.sha256()
    for split in splits:
        total.update(repr(split.images.shape).encode())
        total.update(np.ascontiguousarray(split.images).data.cast("B") if split.images.size else b"")
        total.update(split.labels.astype("<i8").tobytes())
    return total.hexdigest()


def describe(name: str, label: str, class_names: tuple[str, ...], location: str, train: Split, validation: Split, test: Split) -> DatasetInfo:
    """The record of three splits; mean and std are the published ones where there are such."""
    mean, std = STATISTICS[name] if name in STATISTICS else measure(train.images)
    return DatasetInfo(
        name=name,
        label=label,
        classes=len(class_names),
        class_names=class_names,
        channels=int(test.images.shape[3]),
        image_size=int(test.images.shape[1]),
        train_images=len(train.labels),
        validation_images=len(validation.labels),
        test_images=len(test.labels),
        mean=mean,
        std=std,
        digest=digest(train, validation, test),
        location=location,
    )


def divide(name: str, label: str, class_names: tuple[str, ...], location: str, train: Split, test: Split) -> Source:
    """A source of the training and test images as they came: holds out validation and orders validation and test."""
    kept, held = hold_out(train.labels, name)
    order = interleaved(test.labels)
    parts = (
        Split(train.images[kept], train.labels[kept]),
        Split(train.images[held], train.labels[held]),
        Split(test.images[order], test.labels[order]),
    )
    return Source(describe(name, label, class_names, location, *parts), *parts)
