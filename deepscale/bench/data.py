"""`deepscale bench data`: CPU time per training image of the feeds, against a torchvision PIL DataLoader that does the same."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepscale.bench.options import Options, say
from deepscale.bench.report import Goal, Report, Row, ratio
from deepscale.config import DataConfig
from deepscale.data import Feed
from deepscale.data.splits import Source, Split, describe
from deepscale.data.tensors import TrainFeed
from deepscale.errors import MissingPackageError, UsageError

GOAL_FEED = Goal(10.0, at_least=True)
SIDE, CHANNELS, CLASSES = 32, 3, 10
SEED = 0
CPU = torch.device("cpu")
WARM_UP = 3  # batches
Feeds = dict[str, "PilFeed | Feed"]


def main(arguments: list[str]) -> None:
    """Measures epochs of the feeds in turn. Raises MissingPackageError without torchvision or Pillow."""
    options = Options("data", "CPU microseconds per image (all threads): crop, flip and normalisation of random pixels of CIFAR-10's size.")
    options.size("images", 50_000, "images of an epoch")
    options.size("batch-size", 64, "images per batch")
    options.size("rounds", 5, "epochs of each feed")
    options.size("threads", 1, "threads of torch, and FFCV's workers")
    options.parser.add_argument("--feed", choices=("both", "tensors", "ffcv"), default="both", help="what to measure (default: both)")
    values, report = options.parse(arguments)
    if values.images < WARM_UP * values.batch_size:
        raise UsageError(f"--images {values.images} is less than {WARM_UP} batches; type --images {10 * values.batch_size} or more")
    torch.set_num_threads(values.threads)
    source = _source(values.images)
    with tempfile.TemporaryDirectory(prefix="deepscale-bench-") as folder:
        feeds = _feeds(values, source, folder, report)
        microseconds = _measure(feeds, values.rounds)
    report.rows = [Row(_label(name), "CPU us/image", taken) for name, taken in microseconds.items()]
    report.rows += [
        ratio(f"torchvision / {name}", microseconds["torchvision"], taken, GOAL_FEED) for name, taken in microseconds.items() if name != "torchvision"
    ]
    report.publish(values.json)


def _label(name: str) -> str:
    return {"torchvision": "torchvision, PIL and DataLoader", "tensors": "deepscale, tensors in memory", "ffcv": "deepscale, FFCV"}[name]


def _source(images: int) -> Source:
    """Random pixels as a data set; validation and test, which are not read, hold an image of each class."""
    random = np.random.default_rng(SEED)

    def split(count: int) -> Split:
        return Split(random.integers(0, 256, (count, SIDE, SIDE, CHANNELS), dtype=np.uint8), np.arange(count) % CLASSES)

    splits = split(images), split(CLASSES), split(CLASSES)
    names = tuple(str(index) for index in range(CLASSES))
    return Source(describe("cifar10", "random pixels of CIFAR-10's size", names, "made in memory", *splits), *splits)


def _feeds(values: argparse.Namespace, source: Source, folder: str, report: Report) -> Feeds:
    """The feeds to measure; one that is not possible leaves a note."""
    feeds: Feeds = {"torchvision": PilFeed(source, values.batch_size)}
    if values.feed != "ffcv":
        feeds["tensors"] = TrainFeed(source.train, source.info, micro_batch=values.batch_size, seed=SEED, device=CPU)
    if values.feed != "tensors":
        from deepscale.data.beton import FeedUnavailable, open_train_feed

        try:
            feeds["ffcv"] = open_train_feed(
                source,
                DataConfig(data_dir=folder),
                micro_batch=values.batch_size,
                seed=SEED,
                rank=0,
                world_size=1,
                device=CPU,
                workers=values.threads,
                say=say,
            )
        except FeedUnavailable as unavailable:
            if values.feed == "ffcv":
                raise UsageError(f"--feed ffcv cannot be measured: {unavailable}") from None
            report.notes.append(f"FFCV is not measured: {unavailable}")
    return feeds


class PilFeed:
    """The usual pipeline: every image a PIL image, transformed by torchvision, collated by a DataLoader of this process."""

    def __init__(self, source: Source, batch_size: int) -> None:
        try:
            from torchvision import transforms
        except ImportError:
            raise MissingPackageError("torchvision", None, "deepscale bench data") from None
        scaled = [np.asarray(values) / 255 for values in (source.info.mean, source.info.std)]
        transform = transforms.Compose(
            [transforms.RandomCrop(SIDE, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*scaled)]
        )
        pictures = _Pictures(source.train, transform)
        self.loader = DataLoader(pictures, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=0)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (B, C, H, W), normalised, and labels (B,)."""
        yield from self.loader


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Images of an array, one by one, as torchvision's CIFAR10 gives them."""

    def __init__(self, split: Split, transform: Callable[[object], Tensor]) -> None:
        try:
            from PIL import Image
        except ImportError:
            raise MissingPackageError("pillow", None, "deepscale bench data") from None
        self.open, self.transform = Image.fromarray, transform
        self.images, self.labels = split.images, split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.open(self.images[index])), int(self.labels[index])


def _measure(feeds: Feeds, rounds: int) -> dict[str, tuple[float, ...]]:
    """CPU microseconds per image of each feed in each round, in turn, after some batches of warm-up."""
    for feed in feeds.values():
        _read(feed, epoch=0, batches=WARM_UP)
    taken: dict[str, list[float]] = {name: [] for name in feeds}
    for number in range(1, rounds + 1):
        for name, feed in feeds.items():
            say(f"{name}: epoch {number} of {rounds}")
            begin = time.process_time()
            images = _read(feed, number)
            taken[name].append(1e6 * (time.process_time() - begin) / images)
    return {name: tuple(each) for name, each in taken.items()}


def _read(feed: "PilFeed | Feed", epoch: int, batches: int | None = None) -> int:
    """Images of the first `batches` of an epoch, or of all."""
    with closing(feed.epoch(epoch)) as reading:  # type: ignore[type-var]
        return sum(len(labels) for _, labels in islice(reading, batches))
