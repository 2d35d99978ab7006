"""The .beton and its feed, against the arrays they were made of and against the tensor feed.

FFCV compiles for 5-10 s per feed: the feeds are made once per module and shared.
"""

import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepscale.config import DataConfig
from deepscale.data import beton, beton_file
from deepscale.data.augment import Draws, colour
from deepscale.data.beton_jitter import jitter_image
from deepscale.data.splits import Source, Split, describe, epoch_order
from deepscale.data.tensors import TrainFeed

IMAGES, SIZE, BATCH = 200, 16, 32
PLAIN = {"augment": False}

try:
    beton_file.import_ffcv()
    WHY_NOT = ""
except beton.FeedUnavailable as unavailable:
    WHY_NOT = str(unavailable)
needs_ffcv = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "FFCV works")


def make_source(channels: int = 3, images: int = IMAGES) -> Source:
    """Random pixels; each label is its image's index, so that a batch tells which images it holds."""
    random = np.random.default_rng(channels)
    pixels = random.integers(0, 256, (images, SIZE, SIZE, channels), dtype=np.uint8)
    if channels == 3:
        pixels[: images // 2] = random.integers(60, 200, (images // 2, 1, 1, 1), dtype=np.uint8)  # one grey each, for the jitter
    split = Split(pixels, np.arange(images, dtype=np.int64))
    return Source(describe("noise", "Noise", ("one",), "memory", split, split, split), split, split, split)


def open_feed(source: Source, folder: Path, rank: int = 0, world_size: int = 1, **settings: Any) -> beton.FfcvFeed:
    data = DataConfig(data_dir=str(folder), **settings)
    return beton.open_train_feed(
        source, data, micro_batch=BATCH, seed=3, rank=rank, world_size=world_size, device="cpu", workers=1, say=lambda line: None
    )


def pixels_of(images: torch.Tensor, source: Source) -> np.ndarray:
    """Normalised (B, C, H, W) back to whole numbers (B, H, W, C)."""
    mean, std = np.array(source.info.mean), np.array(source.info.std)
    return np.rint(images.permute(0, 2, 3, 1).double().numpy() * std + mean).astype(int)


def write_with_log(folder: str, log: str) -> None:
    """Of a process of its own: writes the module's .beton and logs what it says."""

    def say(line: str) -> None:
        with Path(log).open("a") as file:
            file.write(line + "\n")

    source = make_source()
    beton.write_beton(source, beton.beton_path(source, DataConfig(data_dir=folder)), say)


@pytest.fixture(scope="module")
def source() -> Source:
    return make_source()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A data folder whose .beton two processes wanted to write at once, and the lines they said."""
    folder = tmp_path_factory.mktemp("data")
    log = folder / "log"
    fork = multiprocessing.get_context("fork")  # spares each the seconds of importing FFCV
    writers = [fork.Process(target=write_with_log, args=(str(folder), str(log))) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    return folder, log.read_text().splitlines()


@pytest.fixture(scope="module")
def plain(source: Source, written: tuple[Path, list[str]]) -> beton.FfcvFeed:
    return open_feed(source, written[0], **PLAIN)


@pytest.fixture
def path(source: Source, written: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the written file and its record, to damage."""
    good = beton.beton_path(source, DataConfig(data_dir=str(written[0])))
    copy = beton.beton_path(source, DataConfig(data_dir=str(tmp_path)))
    copy.parent.mkdir()
    shutil.copy(good, copy)
    shutil.copy(beton_file.record_path(good), beton_file.record_path(copy))
    return copy


@pytest.fixture
def copies_instead_of_writing(written: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV's writer, which takes seconds to start, replaced by a copy of what it wrote for the same source."""
    good = next((written[0] / ".deepscale").glob("*.beton"))
    monkeypatch.setattr(beton_file, "_run_writer", lambda work, path, limit: shutil.copy(good, work / "data.beton"))


# ---------------------------------------------------------------------------------------------------------------- feed


@needs_ffcv
def test_reading_is_exact(plain: beton.FfcvFeed, source: Source) -> None:
    info = source.info
    seen = []
    for images, labels in plain.epoch(0):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.shape == (BATCH, 3, SIZE, SIZE) and labels.shape == (BATCH,)
        assert images.is_contiguous(memory_format=torch.channels_last)
        raw = source.train.images[labels.numpy()]
        assert np.array_equal(pixels_of(images, source), raw)
        expected = ((raw - np.array(info.mean)) / np.array(info.std)).transpose(0, 3, 1, 2)
        assert np.abs(images.numpy() - expected).max() < 2e-6
        seen += labels.tolist()
    assert (plain.name, plain.images, plain.steps, plain.reproducible) == ("ffcv", IMAGES, IMAGES // BATCH, False)
    assert len(seen) == len(set(seen)) == plain.steps * BATCH


@needs_ffcv
def test_order_and_images_are_those_of_the_tensor_feed(plain: beton.FfcvFeed, source: Source) -> None:
    tensors = TrainFeed(source.train, source.info, micro_batch=BATCH, seed=3, device=torch.device("cpu"), augment=False)
    orders = []
    for epoch, start in ((0, 0), (1, 0), (0, 0), (0, 4), (1, plain.steps)):
        mine, theirs = list(plain.epoch(epoch, start)), list(tensors.epoch(epoch, start))
        assert len(mine) == len(theirs) == plain.steps - start
        for (images, labels), (expected, expected_labels) in zip(mine, theirs, strict=True):
            assert torch.equal(labels, expected_labels)
            torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)
        orders.append([label for _, labels in mine for label in labels.tolist()])
    assert orders[0] == orders[2] != orders[1]
    assert orders[3] == orders[0][4 * BATCH :]


@given(images=st.integers(1, 500), micro_batch=st.integers(1, 20), world_size=st.integers(1, 3), epoch=st.integers(0, 5))
def test_shards_are_disjoint_and_complete(images: int, micro_batch: int, world_size: int, epoch: int) -> None:
    order = epoch_order(images, 1, epoch)
    shards = [beton.Shard(micro_batch, rank, world_size).of(order) for rank in range(world_size)]
    steps = images // (micro_batch * world_size)
    assert [len(shard) for shard in shards] == [steps * micro_batch] * world_size
    together = np.concatenate(shards)
    assert len(set(together.tolist())) == len(together) > images - micro_batch * world_size
    dealt = [shard[step * micro_batch :][:micro_batch] for step in range(steps) for shard in shards]
    assert np.array_equal(np.concatenate([*dealt, order[len(together) :]]), order)


@needs_ffcv
def test_augmented_images_are_shifted_and_flipped_ones_of_this_rank(source: Source, written: tuple[Path, list[str]]) -> None:
    feed = open_feed(source, written[0], rank=1, world_size=2)
    random_half = range(IMAGES // 2, IMAGES)
    padded = np.pad(source.train.images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    found = []
    for epoch in range(4):
        own = beton.Shard(BATCH, 1, 2).of(epoch_order(IMAGES, 3, epoch))
        batches = list(feed.epoch(epoch))
        assert len(batches) == feed.steps == IMAGES // (2 * BATCH)
        assert np.array_equal(torch.cat([labels for _, labels in batches]).numpy(), own)
        for images, labels in batches:
            for image, label in zip(pixels_of(images, source), labels.tolist(), strict=True):
                windows = np.lib.stride_tricks.sliding_window_view(padded[label], (SIZE, SIZE), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
                both = np.stack([windows, windows[:, :, :, ::-1]])  # (flip, row, column, H, W, C)
                matches = np.argwhere((both == image).all(axis=(3, 4, 5)))
                assert len(matches) >= 1
                if label in random_half:
                    found.append(matches[0])
    for axis, values in enumerate((2, 9, 9)):  # all flips, rows and columns, none much oftener than the others
        counts = np.bincount([match[axis] for match in found], minlength=values)
        assert len(counts) == values and counts.min() > 0 and counts.max() < 2.5 * len(found) / values


@needs_ffcv
def test_jitter_changes_every_image_within_its_range(source: Source, written: tuple[Path, list[str]]) -> None:
    feed = open_feed(source, written[0], augment=False, color_jitter=0.2)
    ratios = []
    for images, labels in feed.epoch(0):
        raw = source.train.images[labels.numpy()].astype(float)
        made = pixels_of(images, source)
        assert made.min() >= 0 and made.max() <= 255
        grey = labels.numpy() < IMAGES // 2  # of one value each, which contrast and saturation leave as they are
        assert np.ptp(made[grey], axis=(1, 2, 3)).max() == 0
        ratios.append(made[grey][:, 0, 0, 0] / raw[grey][:, 0, 0, 0])
        assert not (made[~grey] == raw[~grey]).all(axis=(1, 2, 3)).any()
    ratio = np.concatenate(ratios)
    assert ratio.min() > 0.79 and ratio.max() < 1.21
    assert ratio.min() < 0.84 and ratio.max() > 1.16 and 0.07 < ratio.std() < 0.16  # uniform in 0.8 .. 1.2: 0.115


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_jitter_equals_the_tensor_feeds(order: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    factors = random.uniform(0.4, 1.6, (3, len(images))).astype(np.float32)  # by step: brightness, contrast, saturation
    none = np.zeros(len(images))
    expected = colour(torch.from_numpy(images).float(), Draws(none.astype(int), none > 0, factors, order)).numpy()
    for image, wanted, own in zip(images, expected, factors.T, strict=True):
        jitter_image(image.reshape(-1, 3), np.empty((36, 3), np.float32), np.array(order), own[list(order)])
        assert np.abs(image - wanted).max() < 0.6  # rounded; the weights of grey differ in the fourth digit


@needs_ffcv
def test_greyscale_images_keep_their_one_channel(tmp_path: Path) -> None:
    grey = make_source(channels=1)
    for images, labels in open_feed(grey, tmp_path, **PLAIN).epoch(0):
        assert images.shape == (BATCH, 1, SIZE, SIZE)
        assert np.array_equal(pixels_of(images, grey), grey.train.images[labels.numpy()])


@needs_ffcv
@pytest.mark.parametrize("batches", [0, 1, 4, 6])
def test_epoch_closed_early_leaves_no_thread(plain: beton.FfcvFeed, batches: int) -> None:
    threads, start = threading.active_count(), time.perf_counter()
    epoch = plain.epoch(0)
    for _ in range(batches):
        next(epoch)
    epoch.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads
    assert time.perf_counter() - start < 2
    assert len(list(plain.epoch(1))) == plain.steps


@needs_ffcv
def test_batches_stay_what_they_were(plain: beton.FfcvFeed) -> None:
    batches = [(images, images.clone()) for images, _ in plain.epoch(0)]
    assert all(torch.equal(images, copy) for images, copy in batches)


@needs_ffcv
def test_torch_threads_stay(plain: beton.FfcvFeed, source: Source, written: tuple[Path, list[str]]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        beton_file.import_ffcv()
        data = DataConfig(data_dir=str(written[0]), augment=False)
        beton.FfcvFeed(beton.beton_path(source, data), source.info, data, beton.Shard(BATCH, 0, 1), 0, torch.device("cpu"), 1)
        assert torch.get_num_threads() == 3
        seen = {torch.get_num_threads() for _ in plain.epoch(0)}
        assert seen == {3} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@needs_ffcv
def test_reading_thread_that_dies_is_named(plain: beton.FfcvFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda error: None)
    monkeypatch.setattr(plain._loader, "code", ([(None, [])], []))
    with pytest.raises(beton.FeedUnavailable, match="reading thread died"):
        list(plain.epoch(0))


# ---------------------------------------------------------------------------------------------------------------- file


@needs_ffcv
def test_two_processes_at_once_write_once(written: tuple[Path, list[str]], source: Source) -> None:
    folder, said = written
    assert len(said) == 1 and said[0].startswith("writing ")
    path = beton.beton_path(source, DataConfig(data_dir=str(folder)))
    assert beton.verify_beton(path) is None
    assert path.name == f"noise-{source.info.digest[:12]}.beton"
    assert {each.name for each in path.parent.iterdir()} == {path.name, f"{path.name}.json", f"{path.name}.lock"}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_record(path: Path) -> None:
    record = beton_file.record_path(path)
    record.write_text(json.dumps({**json.loads(record.read_text()), "source": "0" * 64}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"damaged: it has [\d,]+ bytes instead of"),
    "tampered": (flip_byte, "damaged: its SHA-256 is not the recorded one"),
    "empty": (lambda path: path.write_bytes(b""), "damaged: it has 0 bytes instead of"),
    "missing": (lambda path: path.unlink(), "does not exist"),
    "no record": (lambda path: beton_file.record_path(path).unlink(), "has no readable record"),
    "record cut off": (lambda path: beton_file.record_path(path).write_text("[1"), "has no readable record"),
    "record incomplete": (lambda path: beton_file.record_path(path).write_text('{"sha256": "0"}'), "has no readable record"),
}


@needs_ffcv
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("copies_instead_of_writing")
def test_damaged_file_is_named_and_written_again(damage: str, path: Path, source: Source) -> None:
    good = path.read_bytes()
    harm, sentence = DAMAGES[damage]
    harm(path)
    wrong = beton.verify_beton(path)
    assert wrong is not None and str(path) in wrong and re.search(sentence, wrong)
    said: list[str] = []
    beton.write_beton(source, path, said.append)
    assert beton.verify_beton(path) is None and path.read_bytes() == good
    assert said == [f"writing {path} for FFCV (once per data set)" if damage == "missing" else f"{wrong}: writing it again"]


@needs_ffcv
@pytest.mark.usefixtures("copies_instead_of_writing")
def test_file_of_other_images_is_written_again(path: Path, source: Source) -> None:
    change_record(path)
    said: list[str] = []
    beton.write_beton(source, path, said.append)
    assert said == [f"{path} was made of other images than those of Noise: writing it again"]
    assert json.loads(beton_file.record_path(path).read_text())["source"] == source.info.digest
    beton.write_beton(source, path, said.append)
    assert len(said) == 1


@needs_ffcv
def test_writer_whose_worker_dies_is_no_hang(tmp_path: Path, source: Source) -> None:
    floats = Split(source.train.images.astype(np.float32), source.train.labels)  # type: ignore[arg-type]
    broken = dataclasses.replace(source, train=floats)
    path = beton.beton_path(broken, DataConfig(data_dir=str(tmp_path)))
    with pytest.raises(beton.FeedUnavailable, match="ValueError: Image type has to be uint8"):
        beton.write_beton(broken, path, lambda line: None, time_limit_s=100)
    assert [each.name for each in path.parent.iterdir()] == [f"{path.name}.lock"]


@pytest.fixture
def sleeping_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for Python that starts a child and waits: a writer that hangs. Gives the file of the child's process id."""
    script, child = tmp_path / "python", tmp_path / "child"
    script.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {child}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    yield child


@needs_ffcv
def test_writer_that_hangs_is_stopped_with_its_workers(tmp_path: Path, source: Source, sleeping_python: Path) -> None:
    path = beton.beton_path(source, DataConfig(data_dir=str(tmp_path / "data")))
    start = time.perf_counter()
    with pytest.raises(beton.FeedUnavailable, match=r"did not finish .* within 0.5 s"):
        beton.write_beton(source, path, lambda line: None, time_limit_s=0.5)
    assert time.perf_counter() - start < 5
    assert [each.name for each in path.parent.iterdir()] == [f"{path.name}.lock"]
    child = int(sleeping_python.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path, source: Source) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(beton.FeedUnavailable, match=r"cannot be written .*--data-dir"):
        beton.write_beton(source, beton.beton_path(source, DataConfig(data_dir=str(tmp_path / "file"))))


@needs_ffcv
def test_full_disk_and_strange_channels_are_sentences(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    path = beton.beton_path(source, DataConfig(data_dir=str(tmp_path)))
    strange = dataclasses.replace(source, train=Split(np.zeros((4, 8, 8, 2), np.uint8), np.arange(4)))
    with pytest.raises(beton.FeedUnavailable, match="1 or 3 channels"):
        beton.write_beton(strange, path, lambda line: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1 << 20))  # type: ignore[attr-defined]
    with pytest.raises(beton.FeedUnavailable, match="has 1 MiB free"):
        beton.write_beton(source, path, lambda line: None)


@pytest.mark.parametrize(
    "error", [ImportError("libGL.so.1: cannot open shared object file"), OSError("no libturbojpeg"), SystemError("initialization")]
)
def test_ffcv_that_does_not_import_is_a_sentence(error: Exception, tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        torch.set_num_threads(1)
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    before = torch.get_num_threads()
    with pytest.raises(beton.FeedUnavailable) as refused:
        open_feed(source, tmp_path)
    for part in (str(error), "pip install 'deepscale[ffcv]'", "libturbojpeg0-dev", "--feed tensors"):
        assert part in str(refused.value)
    assert torch.get_num_threads() == before
    assert not list(tmp_path.iterdir())
