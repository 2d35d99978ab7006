"""Which data set a run gets, and from where.

| asked | taken, in this order |
|---|---|
| auto | as cifar10; the synthetic set, with a loud line, where CIFAR-10 is neither there nor to be had |
| cifar10 | official files; an image folder with CIFAR-10's classes in DATA_DIR/cifar10 or DATA_DIR; a download |
| cifar100, fashionmnist | official files; a download |
| folder | the image folder DATA_DIR |
| synthetic | made in memory |

A damaged file ends the run in every case: nobody should train on something else than the files that lie there. What was read is then
brought to --grey and --image-size (shaping.py).
"""

from collections.abc import Callable
from pathlib import Path

from deepscale.config import AUTO, DataConfig
from deepscale.data.cache import checked_folder
from deepscale.data.folder import class_folders, list_images, load_folder
from deepscale.data.official import OFFICIAL, NotThereError, load_official
from deepscale.data.shaping import shaped
from deepscale.data.splits import DatasetInfo, Source, Split
from deepscale.data.synthetic import synthetic
from deepscale.errors import MissingPackageError, UsageError

__all__ = ["DatasetInfo", "Source", "Split", "load_source"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = ("cifar-10-batches-py", "cifar-10-python.tar.gz")  # either one: official files are meant


def load_source(data: DataConfig, say: Callable[[str], None] = print) -> Source:
    """The data set of these settings, prepared first where it is not.

    `say` takes lines for the screen. Safe for several processes at once on one data folder. Raises UsageError (files
    missing, damaged or unreadable; folder not writable; no network) and MissingPackageError, never for `auto` without data.
    """
    side = None if data.image_size == AUTO else int(data.image_size)
    return shaped(_as_it_comes(data, say), data.grey, side)


def _as_it_comes(data: DataConfig, say: Callable[[str], None]) -> Source:
    if data.dataset == "synthetic":
        return synthetic(data.synthetic_classes)
    folder = checked_folder(data.data_dir)
    try:
        return _from_files(data, folder, say)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder} cannot be read ({error.strerror or error}); check it, or give another --data-dir FOLDER"
        ) from None


def _from_files(data: DataConfig, folder: Path, say: Callable[[str], None]) -> Source:
    if data.dataset == "folder":
        return load_folder(folder, folder, say)
    if data.dataset in OFFICIAL and data.dataset != "cifar10":
        return load_official(data.dataset, folder, data.download, say, framed=data.image_size == AUTO)
    try:
        return _cifar10(folder, data.download, say)
    except (NotThereError, MissingPackageError) as error:
        if data.dataset != AUTO:
            raise
        say(f"!!! SYNTHETIC IMAGES instead of CIFAR-10: {error}")
        return synthetic()


def _cifar10(folder: Path, may_download: bool, say: Callable[[str], None]) -> Source:
    if not any((folder / name).exists() for name in CIFAR10_FILES):
        for root in (folder / "cifar10", folder):
            if class_folders(root / "train") == CIFAR10_CLASSES:
                label = "CIFAR-10, JPEG re-encoded" if list_images(root).jpeg else "CIFAR-10, image files"
                return load_folder(root, folder, say, name="cifar10", label=label, side=32)
    return load_official("cifar10", folder, may_download, say)
