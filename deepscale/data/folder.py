"""Image folders: {train,test}/<class>/<image>, decoded once and kept beside the images as arrays.

All images become RGB squares of one side: that of the most common size (its shorter side), or a given one.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepscale.data.cache import SPLITS, cache_folder, empty_pixels, keep, one_at_a_time, recall
from deepscale.data.splits import Labels, Source, Split, describe, hold_out, interleaved
from deepscale.errors import MissingPackageError, UsageError

Say = Callable[[str], None]

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
FORMAT = 1  # of the kept arrays; part of their key
CHUNK = 256  # images per task of a decoding thread
NAMED = 5  # unreadable images that an error names


@dataclass(frozen=True)
class Listing:
    """The files of an image folder: paths and labels int64 (M,) of train and test in order of class and name."""

    root: Path
    class_names: tuple[str, ...]
    paths: dict[str, list[Path]]
    labels: dict[str, Labels]
    key: str

    @property
    def jpeg(self) -> bool:
        """Whether all images are JPEG files."""
        return all(path.suffix.lower() in (".jpg", ".jpeg") for paths in self.paths.values() for path in paths)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in a folder, sorted; none where it does not exist."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")))


def _class_names(root: Path) -> tuple[str, ...]:
    layout = "an image folder holds {train,test}/<class>/<image>"
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise UsageError(f"the image folder {root} has no folder {part}/; {layout}: give such a folder with --data-dir")
    train, test = class_folders(root / "train"), class_folders(root / "test")
    if len(train) < 2:
        found = f"only the class {train[0]!r}" if train else "no class folder"
        raise UsageError(f"{root / 'train'} holds {found}; {layout}, with two classes or more")
    if train != test:
        odd = sorted(set(train) ^ set(test))
        where = "train/ but not in test/" if odd[0] in train else "test/ but not in train/"
        raise UsageError(f"the classes of train and test differ in {root}: {odd[0]!r} is in {where} ({len(odd)} such); make them the same")
    return train


def list_images(root: Path) -> Listing:
    """Lists an image folder. Raises UsageError for a missing part, no or one class, differing classes, or an empty class."""
    names = _class_names(root)
    key = hashlib.sha256(f"{FORMAT}".encode())
    paths: dict[str, list[Path]] = {"train": [], "test": []}
    labels: dict[str, Labels] = {}
    for part in ("train", "test"):
        counts = []
        for name in names:
            entries = sorted(os.scandir(root / part / name), key=lambda entry: entry.name)
            images = [entry for entry in entries if entry.name.lower().endswith(ENDINGS) and not entry.name.startswith(".") and entry.is_file()]
            if not images:
                raise UsageError(f"{root / part / name} holds no image; possible endings: {', '.join(ENDINGS)}")
            for entry in images:
                stat = entry.stat()
                key.update(f"{part}/{name}/{entry.name}:{stat.st_size}:{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
            paths[part] += [Path(entry.path) for entry in images]
            counts.append(len(images))
        labels[part] = np.repeat(np.arange(len(names), dtype=np.int64), counts)
    return Listing(root, names, paths, labels, key.hexdigest())


def load_folder(root: Path, data_dir: Path, say: Say, *, name: str = "folder", label: str = "", side: int | None = None) -> Source:
    """The image folder `root` as a data set called `name`, its arrays kept in `data_dir`'s cache where that can be written.

    `label` defaults to the folder's name; `side` in pixels to the most common size. Raises UsageError, see `list_images`,
    and for images that cannot be read, which it names and counts; MissingPackageError without Pillow.
    """
    listing = list_images(root)
    label = label or f"image folder {root.name or root.resolve().name}"
    key = hashlib.sha256(f"{listing.key} {name} {label} {side}".encode()).hexdigest()
    final = cache_folder(data_dir) / f"images-{key[:16]}"
    source = recall(final)
    if source is None:
        make = partial(_decode, listing, name, label, side, say)
        try:
            with one_at_a_time(data_dir, final.name, say):
                source = recall(final) or _keep(make, final)  # another process may have made it meanwhile
        except OSError as error:
            say(f"the decoded images cannot be kept in {cache_folder(data_dir)} ({error.strerror or error}): they are decoded at every start")
            source = make(None)
    return replace(source, info=replace(source.info, location=str(root)))


def _keep(make: Callable[[Path], Source], final: Path) -> Source:
    """The source as it reads back from the cache. Raises OSError where it cannot be kept."""
    work = final.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir()
    try:
        keep(make(work), work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    kept = recall(final)
    if kept is None:
        raise OSError(f"{final} reads back different")
    return kept


def _decode(listing: Listing, name: str, label: str, side: int | None, say: Say, work: Path | None) -> Source:
    """Decodes every image straight into its place in the split that it belongs to; in files in `work`, or in memory."""
    kept, held = hold_out(listing.labels["train"], name)
    order = interleaved(listing.labels["test"])
    chosen = {"train": ("train", kept), "validation": ("train", held), "test": ("test", order)}
    paths = {split: [listing.paths[part][index] for index in indices] for split, (part, indices) in chosen.items()}
    total = sum(len(each) for each in paths.values())
    say(f"decoding the {total:,} images of {listing.root}{' (once: they are kept)' if work else ''}")
    size = side or _first_side(paths["train"])
    while True:
        pixels = {split: empty_pixels(work, split, (len(paths[split]), size, size, 3)) for split in SPLITS}
        sizes: Counter[tuple[int, int]] = Counter()
        unreadable = [path for split in SPLITS for path in _fill(pixels[split], paths[split], sizes)]
        if unreadable:
            raise _unreadable(sorted(unreadable), total, listing.root)
        common = side or min(sizes.most_common(1)[0][0])
        if common == size:
            break
        size = common  # the first image's size was not the usual one: once more, at the right size
    if odd := total - sizes[(size, size)]:
        say(f"{odd:,} of {total:,} images were resized to {size}x{size} pixels{'' if side else ', the most common size'}")
    parts = [Split(pixels[split], listing.labels[part][indices]) for split, (part, indices) in chosen.items()]
    return Source(describe(name, label, listing.class_names, str(listing.root), *parts), *parts)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError("pillow", None, "reading image files") from None
    return Image


def _first_side(paths: list[Path]) -> int:
    """A first guess of the common side: that of the first image that opens."""
    pillow = _pillow()
    for path in paths:
        try:
            with pillow.open(path) as image:
                return int(min(image.size))
        except Exception:
            continue
    return 1


def _fill(pixels: NDArray[np.uint8], paths: list[Path], sizes: Counter[tuple[int, int]]) -> list[Path]:
    """Decodes `paths` into `pixels` (M, S, S, 3), counts the `sizes` (width, height), and returns what cannot be read."""
    pillow = _pillow()
    unreadable: list[Path] = []
    side = pixels.shape[1]

    def decode(first: int) -> list[tuple[int, int]]:
        seen = []
        for index in range(first, min(first + CHUNK, len(paths))):
            try:
                with pillow.open(paths[index]) as image:
                    rgb = image.convert("RGB")
            except Exception:  # Pillow raises a dozen kinds for a broken file; each means the same here
                unreadable.append(paths[index])
                continue
            seen.append(rgb.size)
            pixels[index] = np.asarray(rgb if rgb.size == (side, side) else rgb.resize((side, side), pillow.Resampling.BILINEAR))
        return seen

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for seen in pool.map(decode, range(0, len(paths), CHUNK)):
            sizes.update(seen)
    return unreadable


def _unreadable(paths: list[Path], total: int, root: Path) -> UsageError:
    names = ", ".join(str(path.relative_to(root)) for path in paths[:NAMED])
    more = ", ..." if len(paths) > NAMED else ""
    return UsageError(f"{len(paths):,} of {total:,} images in {root} cannot be read: {names}{more}; replace or delete them")
