"""Grey and resampled images against Pillow's, and what a run gets and says of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_official import write_fashionmnist

from deepscale.config import DataConfig
from deepscale.data.shaping import luma, resampled, shaped
from deepscale.data.sources import load_source
from deepscale.data.splits import Source, digest, interleaved, measure
from deepscale.data.synthetic import synthetic


@pytest.fixture(scope="module")
def source() -> Source:
    return synthetic(train_images=1_100, test_images=50)


def test_luma_is_pillows(source: Source) -> None:
    """Every pixel, of images and of noise that reaches the ends of the range."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    for images in (source.test.images, noise, np.full((1, 2, 2, 3), 255, np.uint8)):
        expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
        np.testing.assert_array_equal(luma(images)[..., 0], expected)


@pytest.mark.parametrize("side", [8, 28, 31, 48])
def test_resampling_is_pillows(source: Source, side: int) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (20, 32, 32, 3), dtype=np.uint8) * 255
    images = np.concatenate([source.test.images, noise])
    expected = np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)) for image in images])
    np.testing.assert_array_equal(resampled(images, side), expected)
    assert (resampled(np.full((1, 32, 32, 1), 255, np.uint8), side) == 255).all()


def test_a_source_in_grey_at_28_pixels(source: Source) -> None:
    """More images than are made at once, each in its place; mean, std and digest are those of the new pixels."""
    made = shaped(source, grey=True, side=28)
    for name in ("train", "validation", "test"):
        before, after = getattr(source, name), getattr(made, name)
        np.testing.assert_array_equal(after.images, resampled(luma(before.images), 28))
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
