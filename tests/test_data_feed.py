"""The in-memory feed against a slow per-image version made of torchvision's functions, and its shards against their promise."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import free_port
from hypothesis import given, settings
from hypothesis import strategies as st

from deepscale.config import DataConfig
from deepscale.data import beton, open_feeds
from deepscale.data.augment import PADDING, Draws
from deepscale.data.splits import Source, Split, describe, digest, hold_out, interleaved, measure
from deepscale.data.synthetic import synthetic
from deepscale.data.tensors import EvalFeed, TrainFeed
from deepscale.errors import UsageError

CPU = torch.device("cpu")


def numbered(images: int, channels: int = 3, size: int = 8) -> Source:
    """Random pixels; each label is its image's index, so that a batch tells which images it holds."""
    pixels = np.random.default_rng(channels).integers(0, 256, (images, size, size, channels), dtype=np.uint8)
    split = Split(pixels, np.arange(images, dtype=np.int64))
    return Source(describe("noise", "Noise", ("one",), "memory", split, split, split), split, split, split)


def train_feed(source: Source, micro_batch: int, rank: int = 0, world_size: int = 1, **options: Any) -> TrainFeed:
    return TrainFeed(source.train, source.info, micro_batch=micro_batch, seed=7, rank=rank, world_size=world_size, device=CPU, **options)


def slow_augment(image: torch.Tensor, draws: Draws, index: int, jitter: bool) -> torch.Tensor:
    """One image uint8 (C, H, W) -> float (C, H, W), 0..255, by torchvision's own functions."""
    import torchvision.transforms.functional as plain  # here, so that the processes below start without it

    top, left = (int(value) for value in draws.crops[:, index])
    image = plain.crop(plain.pad(image, [PADDING]), top, left, *image.shape[1:])
    image = plain.hflip(image) if draws.flips[index] else image
    if not jitter:
        return image.float()
    steps = (plain.adjust_brightness, plain.adjust_contrast, plain.adjust_saturation)
    image = image.float() / 255
    for step in draws.order:
        image = steps[step](image, float(draws.factors[step, index]))
    return image * 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_batches_equal_torchvision_image_by_image(channels: int, jitter: float) -> None:
    source = numbered(40, channels)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (source.info.mean, source.info.std))
    for step, (images, labels) in enumerate(train_feed(source, 16, color_jitter=jitter).epoch(2)):
        draws = Draws.make(np.random.default_rng([7, 2, step]), 16, jitter)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        for index, label in enumerate(labels.tolist()):
            original = torch.from_numpy(source.train.images[label]).permute(2, 0, 1)
            expected = slow_augment(original, draws, index, jitter > 0)
            pixels = images[index] * std + mean
            if not jitter:
                assert torch.equal(pixels.round(), expected)  # exact in whole pixel values
            torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(images[index], (expected - mean) / std, atol=1e-4, rtol=1e-4)


def test_draws_reach_every_crop_and_factor() -> None:
    draws = Draws.make(np.random.default_rng(0), 20_000, 0.3)
    assert set(np.unique(draws.crops)) == set(range(2 * PADDING + 1))
    assert abs(draws.flips.mean() - 0.5) < 0.02
    assert draws.factors.min() >= 0.7 and draws.factors.max() <= 1.3 and draws.factors.std() > 0.15


def test_without_augmentation_pixels_are_those_of_the_file() -> None:
    source = numbered(12)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (source.info.mean, source.info.std))
    for images, labels in train_feed(source, 5, augment=False).epoch(0):
        expected = torch.from_numpy(source.train.images[labels.numpy()]).permute(0, 3, 1, 2)
        assert torch.equal((images * std + mean).round().to(torch.uint8), expected)


def test_any_step_can_be_made_again() -> None:
    feed = train_feed(numbered(50), 8, color_jitter=0.2)
    whole = list(feed.epoch(3))
    again = list(feed.epoch(3, start=4))
    assert len(whole) == feed.steps == 6 and len(again) == 2
    for (images, labels), (images_again, labels_again) in zip(whole[4:], again, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert not torch.equal(whole[0][1], next(iter(feed.epoch(4)))[1])


@settings(max_examples=60, deadline=None)
@given(images=st.integers(1, 70), micro_batch=st.integers(1, 9), world_size=st.integers(1, 5), epoch=st.integers(0, 3))
def test_training_shards_are_disjoint_and_complete_but_for_the_last_global_batch(images: int, micro_batch: int, world_size: int, epoch: int) -> None:
    source = numbered(images, channels=1, size=4)
    feeds = [train_feed(source, micro_batch, rank, world_size) for rank in range(world_size)]
    seen = [[labels.tolist() for _, labels in feed.epoch(epoch)] for feed in feeds]
    assert {len(batches) for batches in seen} == {images // (micro_batch * world_size)} == {feed.steps for feed in feeds}
    flat = [label for batches in seen for batch in batches for label in batch]
    assert len(set(flat)) == len(flat) == images - images % (micro_batch * world_size)


@settings(max_examples=60, deadline=None)
@given(images=st.integers(0, 70), batch=st.integers(1, 30), world_size=st.integers(1, 6), limit=st.none() | st.integers(1, 80))
def test_evaluation_counts_every_image_once(images: int, batch: int, world_size: int, limit: int | None) -> None:
    source = numbered(max(1, images), channels=1, size=4)
    split = Split(source.test.images[:images], source.test.labels[:images])
    feeds = [EvalFeed(split, source.info, batch=batch, rank=rank, world_size=world_size, device=CPU, limit=limit) for rank in range(world_size)]
    batches = [[labels.tolist() for _, labels in feed.epoch(0)] for feed in feeds]
    assert [len(each) for each in batches] == [feed.steps for feed in feeds]
    counted = images if limit is None else min(images, limit)
    assert sorted(label for each in batches for batch in each for label in batch) == list(range(counted))
    assert {feed.images for feed in feeds} == {counted}


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_sees_the_same_pixels_for_any_number_of_ranks(world_size: int) -> None:
    source = numbered(60)
    one = list(train_feed(source, 6 * world_size).epoch(1))
    parts = [list(train_feed(source, 6, rank, world_size).epoch(1)) for rank in range(world_size)]
    for step, (images, labels) in enumerate(one):
        assert torch.equal(images, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[step][1] for part in parts]))


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=6), prefix=st.integers(0, 60))
def test_validation_is_balanced_in_every_prefix(counts: list[int], prefix: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts), dtype=np.int64), counts))
    kept, held = hold_out(labels, "folder")
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert (labels[held] == label).sum() == (max(1, round(count * 0.1)) if count > 1 else 0)
    seen, every = Counter(labels[interleaved(labels)][:prefix].tolist()), Counter(labels.tolist())
    most = max(seen.values(), default=0)
    assert all(most - seen[label] <= 1 or seen[label] == every[label] for label in every)


@pytest.mark.parametrize(
    ("name", "per_class", "classes", "held"), [("cifar10", 5000, 10, 5000), ("cifar100", 500, 100, 2500), ("fashionmnist", 6000, 10, 6000)]
)
def test_official_validation_sizes(name: str, per_class: int, classes: int, held: int) -> None:
    labels = np.repeat(np.arange(classes, dtype=np.int64), per_class)
    kept, validation = hold_out(labels, name)
    assert len(validation) == held and set(np.bincount(labels[kept])) == {per_class - held // classes}


def test_measured_statistics_equal_numpys() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2500, 4, 4, 3), dtype=np.uint8)
    mean, std = measure(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), atol=0.01)
    np.testing.assert_allclose(std, images.std(axis=(0, 1, 2)), atol=0.01)


def test_synthetic_is_the_same_every_time_and_balanced() -> None:
    one, two = synthetic(classes=100, train_images=1000, test_images=400), synthetic(classes=100, train_images=1000, test_images=400)
    assert one.info == two.info and one.info.classes == 100
    assert one.info.digest == digest(one.train, one.validation, one.test)
    assert (one.info.train_images, one.info.validation_images, one.info.test_images) == (900, 100, 400)
    assert set(np.bincount(one.test.labels)) == {4}


def open_here(source: Source, micro_batch: int = 8, **options: Any) -> Any:
    data = DataConfig(dataset="synthetic", **options)
    return open_feeds(source, data, micro_batch=micro_batch, eval_batch=16, seed=0, device=CPU, say=lambda line: None)


def test_open_feeds_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise beton.FeedUnavailable("the disk is full")

    monkeypatch.setattr(beton, "open_train_feed", broken)
    source = synthetic(train_images=200, test_images=50)
    feeds = open_here(source, eval_images=10)
    assert (feeds.name, feeds.why) == ("tensors", "the disk is full")
    assert feeds.validation.images == feeds.test.images == 10 and feeds.train.steps == 180 // 8
    assert open_here(source, feed="tensors").why == "--feed tensors was given"
    with pytest.raises(UsageError, match="--feed ffcv is not possible: the disk is full; type --feed tensors"):
        open_here(source, feed="ffcv")


def test_a_batch_larger_than_the_set_is_refused_and_an_empty_validation_is_not() -> None:
    source = numbered(20)
    with pytest.raises(UsageError, match="a batch of 21 images is more than the 20 training images of Noise; type --batch-size 5"):
        open_here(source, 21, feed="tensors")
    nothing = Split(source.validation.images[:0], source.validation.labels[:0])
    feeds = open_here(replace(source, validation=nothing), feed="tensors")
    assert feeds.validation.steps == 0 and list(feeds.validation.epoch(0)) == []


def _two_ranks(rank: int, port: int, folder: str) -> None:
    """Rank 1 cannot use FFCV: both take the in-memory feed. Then rank 1 reads other images: both refuse."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    source = synthetic(train_images=100, test_images=20)
    works = TrainFeed(source.train, source.info, micro_batch=8, seed=0, rank=rank, world_size=2, device=CPU)

    def unequal(*_: Any, **__: Any) -> TrainFeed:
        if rank == 1:
            raise beton.FeedUnavailable("no compiler here")
        works.name = "ffcv"
        return works

    beton.open_train_feed = unequal  # type: ignore[assignment]
    common: dict[str, Any] = {"micro_batch": 8, "eval_batch": 8, "seed": 0, "rank": rank, "world_size": 2, "device": CPU}
    feeds = open_feeds(source, DataConfig(), **common)
    lines = [f"{feeds.name}: {feeds.why}"]
    other = replace(source, info=replace(source.info, digest=f"{rank}" * 64))
    try:
        open_feeds(other, DataConfig(), **common)
    except UsageError as error:
        lines.append(str(error))
    (Path(folder) / f"{rank}").write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


def test_ranks_agree_on_the_feed_and_on_the_images(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_two_ranks, (free_port(), str(tmp_path)), nprocs=2)
    first, second = ((tmp_path / name).read_text().splitlines() for name in "01")
    assert first[0] == "tensors: FFCV does not work on rank 1"
    assert second[0] == "tensors: no compiler here"
    assert all("ranks 0 and 1 read different images" in lines[1] for lines in (first, second))
