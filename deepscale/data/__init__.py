"""The images of a run: sources make arrays of them (sources.py), feeds make batches of the arrays.

Training is fed by FFCV (beton.py) where it works and is wanted, else by the in-memory feed (tensors.py); all ranks take
the same one. Validation and test always come from the in-memory feed, which is pixel-exact and needs no compilation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deepscale.config import AUTO, DataConfig
from deepscale.data.splits import DatasetInfo, Source
from deepscale.data.tensors import EvalFeed, TrainFeed
from deepscale.errors import DeepscaleError, UsageError

Say = Callable[[str], None]


class Feed(Protocol):
    """Batches of one split on one rank.

    `name` is "ffcv" or "tensors", `images` counts the split over all ranks, `steps` the batches of an epoch on this rank.
    """

    name: str
    images: int
    steps: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch from batch `start` on: images float32 (B, C, H, W), normalised, channels_last; labels int64 (B,)."""
        ...


@dataclass
class Feeds:
    """The feeds of a run. `name` fed the training; `why` says why it is not FFCV, or is empty."""

    info: DatasetInfo
    train: Feed
    validation: EvalFeed
    test: EvalFeed
    name: str
    why: str

    def limit_evaluation(self, images: int) -> None:
        """Validation and test read the first `images` of their class-balanced order."""
        self.validation.limit(images)
        self.test.limit(images)


def _over_ranks(value: int, device: torch.device) -> list[int]:
    """This value on every rank, by rank; of this process alone where nothing is distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    own = torch.tensor([value], dtype=torch.int64, device=device if torch.distributed.get_backend() == "nccl" else "cpu")
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, own)
    return [int(each) for each in every]


def _refuse_different_data(info: DatasetInfo, device: torch.device) -> None:
    seen = _over_ranks(int(info.digest[:15], 16), device)
    if len(set(seen)) > 1:
        odd = next(rank for rank, value in enumerate(seen) if value != seen[0])
        raise UsageError(f"ranks 0 and {odd} read different images (here: {info.label} from {info.location}); give all ranks the same --data-dir")


def _ffcv(source: Source, data: DataConfig, device: torch.device, options: dict[str, Any]) -> tuple[Feed | None, str]:
    """FFCV's training feed where it works on every rank, and else the reason."""
    feed: Feed | None = None
    why, error = "", None
    try:
        from deepscale.data import beton

        try:
            feed = beton.open_train_feed(source, data, device=device, **options)
        except beton.FeedUnavailable as unavailable:
            why = str(unavailable)
    except DeepscaleError as known:
        why, error = str(known), known
    works = _over_ranks(int(feed is not None), device)  # reached on every rank, or the others would wait for ever
    if error is not None:
        raise error
    if not all(works) and feed is not None:
        feed, why = None, f"FFCV does not work on rank {works.index(0)}"
    return feed, why


def _refuse_small_set(source: Source, global_batch: int) -> None:
    if global_batch > len(source.train.labels):
        raise UsageError(
            f"a batch of {global_batch:,} images is more than the {len(source.train.labels):,} training images of {source.info.label}; "
            f"type --batch-size {max(1, len(source.train.labels) // 4)}"
        )


def open_feeds(
    source: Source,
    data: DataConfig,
    *,
    micro_batch: int,
    eval_batch: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device,
    workers: int = 1,
    say: Say = print,
) -> Feeds:
    """The three feeds of a run on this rank; collective where torch.distributed is initialised.

    `micro_batch` and `eval_batch` are images per rank; `workers` are FFCV's threads. Raises UsageError for a batch that
    is larger than the training set, for `--feed ffcv` where FFCV does not work, and where ranks hold different images.
    """
    _refuse_small_set(source, micro_batch * world_size)
    _refuse_different_data(source.info, device)
    common: dict[str, Any] = {"micro_batch": micro_batch, "seed": seed, "rank": rank, "world_size": world_size}
    train, why = None, "--feed tensors was given"
    if data.feed != "tensors":
        train, why = _ffcv(source, data, device, {**common, "workers": workers, "say": say})
        if train is None and data.feed == "ffcv":
            raise UsageError(f"--feed ffcv is not possible: {why}; type --feed tensors, which needs no further package")
    if train is None:
        train = TrainFeed(source.train, source.info, device=device, augment=data.augment, color_jitter=data.color_jitter, **common)
    limit = None if data.eval_images == AUTO else int(data.eval_images)
    validation, test = (
        EvalFeed(split, source.info, batch=eval_batch, rank=rank, world_size=world_size, device=device, limit=limit)
        for split in (source.validation, source.test)
    )
    return Feeds(source.info, train, validation, test, train.name, "" if train.name == "ffcv" else why)
