"""Image folders: what is read, what is kept, what is refused; against Pillow reading the same files."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepscale.config import DataConfig
from deepscale.data import cache, command
from deepscale.data.sources import CIFAR10_CLASSES, Source, load_source
from deepscale.data.splits import hold_out, interleaved
from deepscale.errors import UsageError

CLASSES = ("cat", "dog", "owl")


def write_images(root: Path, classes: tuple[str, ...] = CLASSES, train: int = 10, test: int = 4, ending: str = "png", size: int = 8) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{index:03}.{ending}")
    return root


def load(root: Path, dataset: str = "folder") -> tuple[Source, list[str]]:
    lines: list[str] = []
    return load_source(DataConfig(dataset=dataset, data_dir=str(root), download=False), lines.append), lines


def refused(root: Path, dataset: str = "folder") -> str:
    with pytest.raises(UsageError) as error:
        load(root, dataset)
    return str(error.value)


def test_pixels_labels_and_splits_are_those_of_the_files(tmp_path: Path) -> None:
    root = write_images(tmp_path)
    source, lines = load(root)
    files = {part: sorted((root / part).glob("*/*.png")) for part in ("train", "test")}
    pixels = {part: np.stack([np.asarray(Image.open(path)) for path in paths]) for part, paths in files.items()}
    labels = {part: np.array([CLASSES.index(path.parent.name) for path in paths]) for part, paths in files.items()}
    kept, held = hold_out(labels["train"], "folder")
    for split, part, chosen in (
        (source.train, "train", kept),
        (source.validation, "train", held),
        (source.test, "test", interleaved(labels["test"])),
    ):
        np.testing.assert_array_equal(split.images, pixels[part][chosen])
        np.testing.assert_array_equal(split.labels, labels[part][chosen])
    info = source.info
    assert (info.name, info.classes, info.class_names, info.channels, info.image_size) == ("folder", 3, CLASSES, 3, 8)
    assert (info.train_images, info.validation_images, info.test_images, info.location) == (27, 3, 12, str(root))
    assert lines == [f"decoding the 42 images of {root} (once: they are kept)"]


def test_decoded_images_are_kept_mapped_and_verified(tmp_path: Path) -> None:
    root = write_images(tmp_path, size=16)
    first, _ = load(root)
    again, lines = load(root)
    assert lines == [] and again.info == first.info and isinstance(again.train.images, np.memmap)
    kept = next(path for path in (root / ".deepscale").glob("images-*") if path.is_dir())
    with open(kept / "train_images.npy", "r+b") as file:  # one byte differs
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    repaired, lines = load(root)
    assert lines != [] and repaired.info == first.info
    os.truncate(kept / "test_images.npy", 100)
    assert load(root)[0].info == first.info
    assert not list((root / ".deepscale").glob("*.part"))


def test_a_changed_image_is_seen(tmp_path: Path) -> None:
    root = write_images(tmp_path)
    before, _ = load(root)
    path = root / "train" / "cat" / "000.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert load(root)[0].info.digest != before.info.digest


def test_a_folder_that_cannot_be_written_is_decoded_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path)
    (root / ".deepscale").write_text("a file where the folder should be")
    source, lines = load(root)
    assert source.info.train_images == 27 and "cannot be kept" in lines[0] and lines[1].startswith("decoding")
    (root / ".deepscale").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source, lines = load(root)
    assert source.info.train_images == 27 and any("No space left" in line for line in lines)
    assert not [path for path in (root / ".deepscale").iterdir() if path.is_dir()]


def test_sizes_and_modes_are_made_equal(tmp_path: Path) -> None:
    root = write_images(tmp_path)
    Image.new("RGB", (20, 30), (10, 20, 30)).save(root / "train" / "cat" / "000.png")  # the first image has an unusual size
    Image.new("L", (8, 8), 77).save(root / "test" / "dog" / "000.png")
    source, lines = load(root)
    assert source.info.image_size == 8 and "1 of 42 images were resized to 8x8 pixels, the most common size" in lines
    assert (source.test.images[source.test.labels == 1] == 77).all(axis=(1, 2, 3)).sum() == 1


def test_cifar10_as_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "cifar10", CIFAR10_CLASSES, 4, 2, "jpg", 32)
    for dataset in ("auto", "cifar10"):
        info = load(tmp_path, dataset)[0].info
        assert (info.name, info.label, info.mean) == ("cifar10", "CIFAR-10, JPEG re-encoded", (125.3, 123.0, 113.9))
    assert load(tmp_path / "cifar10", "auto")[0].info.digest == info.digest
    write_images(tmp_path / "png", CIFAR10_CLASSES, 2, 1, "png", 32)
    assert load(tmp_path / "png", "cifar10")[0].info.label == "CIFAR-10, image files"


def test_bad_folders_are_refused_with_a_sentence(tmp_path: Path) -> None:
    root = tmp_path / "images"
    assert "has no folder train/" in refused(root)
    (root / "train").mkdir(parents=True)
    assert "has no folder test/" in refused(root)
    (root / "test").mkdir()
    assert "no class folder" in refused(root)
    (root / "train" / "cat").mkdir()
    assert "only the class 'cat'" in refused(root)
    (root / "train" / "dog").mkdir()
    (root / "test" / "cat").mkdir()
    assert "'dog' is in train/ but not in test/ (1 such)" in refused(root)
    (root / "test" / "dog").mkdir()
    assert f"{root / 'train' / 'cat'} holds no image" in refused(root)


def test_unreadable_images_are_named_and_counted(tmp_path: Path) -> None:
    root = write_images(tmp_path)
    (root / "train" / "cat" / "003.png").write_bytes(b"")
    whole = (root / "test" / "owl" / "001.png").read_bytes()
    (root / "test" / "owl" / "001.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "dog" / "000.png").write_text("no image")
    (root / "train" / "dog" / "notes.txt").write_text("not looked at")
    message = refused(root)
    assert f"3 of 42 images in {root} cannot be read: test/owl/001.png, train/cat/003.png, train/dog/000.png; replace" in message
    assert not [path for path in (root / ".deepscale").iterdir() if path.is_dir()]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path)

    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    assert f"{root / 'train'} cannot be read (Permission denied)" in refused(root)


def test_a_file_in_the_way_of_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for dataset in ("auto", "cifar10", "folder", "fashionmnist"):
        assert f"{tmp_path / 'file'} is a file; give a folder" in refused(tmp_path / "file" / "below", dataset)
    assert load(tmp_path / "file", "synthetic")[0].info.name == "synthetic"


def _load_and_note(root: str, note: str) -> None:
    real = cache.keep

    def slowly(*arguments: object) -> None:
        time.sleep(1.5)
        real(*arguments)  # type: ignore[arg-type]

    from deepscale.data import folder

    folder.keep = slowly  # type: ignore[assignment]
    source, lines = load(Path(root))
    Path(note).write_text("\n".join([source.info.digest, *lines]))


def test_two_processes_at_once_decode_once(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    spawn = multiprocessing.get_context("spawn")
    notes = [tmp_path / "one", tmp_path / "two"]
    processes = [spawn.Process(target=_load_and_note, args=(str(root), str(note))) for note in notes]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (note.read_text().splitlines() for note in notes)
    assert one[0] == two[0]
    assert sum(line.startswith("decoding") for line in [*one, *two]) == 1


def test_the_command_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_images(tmp_path)
    command.main(["--dataset", "folder", "--data-dir", str(root)])
    shown = capsys.readouterr().out
    digest = load(root)[0].info.digest
    for expected in ("27 training, 3 validation, 12 test", "8x8 pixels, 3 channels", digest, "owl"):
        assert expected in shown
    with pytest.raises(UsageError, match="possible: auto, cifar10"):
        command.main(["--dataset", "imagenet"])
