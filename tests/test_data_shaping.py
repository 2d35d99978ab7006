"""Grey and resampled images against Pillow's, and what a run gets and says of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_official import write_fashionmnist

from deepscale.config import DataConfig
from deepscale.data.shaping import shaped
from deepscale.data.sources import load_source
from deepscale.data.splits import Source, Split, digest, interleaved, measure
from deepscale.data.synthetic import synthetic


@pytest.fixture(scope="module")
def source() -> Source:
    return synthetic(train_images=1_100, test_images=50)


@pytest.mark.parametrize("side", [None, 8, 28, 31, 48])
def test_grey_and_resampling_against_the_formulas(source: Source, side: int | None) -> None:
    """Grey by ITU-R BT.601's weights, the side by the widened triangle in float64; Pillow rounds after each of its steps."""
    noise = np.random.default_rng(0).integers(0, 2, (20, 32, 32, 3), dtype=np.uint8) * 255
    images = np.concatenate([source.test.images, noise])
    grey = images @ np.array([0.299, 0.587, 0.114])
    made = shaped(dataclasses.replace(source, test=Split(images, np.zeros(len(images), np.int64))), grey=True, side=side).test.images[..., 0]
    if side is None:
        assert np.abs(made - grey).max() <= 0.51
        return
    centre = (np.arange(side) + 0.5) * 32 / side
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(32) + 0.5 - centre[:, None]) / max(1.0, 32 / side))
    weights /= weights.sum(axis=1, keepdims=True)
    assert np.abs(made - weights @ grey @ weights.T).max() <= 1.51  # half a level each for grey, columns and rows


def test_a_source_in_grey_at_28_pixels(source: Source) -> None:
    """Each in its place; mean, std and digest are those of the new pixels."""
    made = shaped(source, grey=True, side=28)
    for name in ("train", "validation", "test"):
        before, after = getattr(source, name), getattr(made, name)
        for old, new in zip(before.images[-5:], after.images[-5:], strict=True):
            expected = Image.fromarray(old).convert("L").resize((28, 28), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(new[..., 0], np.asarray(expected))
        np.testing.assert_array_equal(after.labels, before.labels)
    info = made.info
    assert (info.channels, info.image_size, info.label) == (1, 28, "synthetic, in grey (ITU-R 601), resampled to 28x28 (bilinear)")
    assert (info.mean, info.std) == measure(made.train.images)
    assert info.digest == digest(made.train, made.validation, made.test) != source.info.digest
    same = {"train_images", "validation_images", "test_images", "classes", "class_names", "name", "location"}
    assert all(getattr(info, name) == getattr(source.info, name) for name in same)


def test_what_is_so_already_stays(source: Source) -> None:
    assert shaped(source, grey=False, side=None) is source
    assert shaped(source, grey=False, side=32) is source
    grey = shaped(source, grey=True, side=None)
    assert grey.test.images.shape[1:] == (32, 32, 1)
    assert shaped(grey, grey=True, side=32) is grey
    assert shaped(source, grey=False, side=16).train.images.shape[1:] == (16, 16, 3)


def test_the_settings_reach_the_images(source: Source) -> None:
    data = DataConfig(dataset="synthetic", grey=True, image_size=28)
    assert load_source(data).info.label.endswith("resampled to 28x28 (bilinear)")
    plain = load_source(dataclasses.replace(data, grey=False, image_size="auto")).info
    assert (plain.channels, plain.image_size, plain.label) == (3, 32, "synthetic")


def test_fashionmnist_at_28_pixels_is_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame, no resampling, the published mean and standard deviation."""
    made = write_fashionmnist(tmp_path, monkeypatch)
    data = DataConfig(dataset="fashionmnist", data_dir=str(tmp_path), download=False, grey=True, image_size=28)
    read = load_source(data)
    order = interleaved(made["t10k_labels"].astype(np.int64))
    np.testing.assert_array_equal(read.test.images[..., 0], made["t10k"][order])
    assert (read.info.label, read.info.mean, read.info.std) == ("FashionMNIST", (72.9,), (90.0,))
    assert (read.info.train_images, read.info.validation_images) == (180, 20)  # 54,000 and 6,000 of the real 60,000
    small = load_source(dataclasses.replace(data, image_size=14))
    assert small.info.label == "FashionMNIST, resampled to 14x14 (bilinear)" and small.test.images.shape == (50, 14, 14, 1)
