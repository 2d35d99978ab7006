"""CIFAR-10, CIFAR-100 and FashionMNIST in their official files, in the layout of torchvision.datasets.

Names, addresses and checksums are torchvision's. Every file is checked before it is opened, and even then can only give arrays: of
CIFAR's pickles nothing is called but what makes NumPy's arrays; of an archive the wanted files alone are read, under names of ours;
nothing is unpacked beyond a limit. FashionMNIST's 28x28 pixels get a frame of zeros up to 32x32, which the label says, unless a size is asked for.

Krizhevsky 2009, Learning multiple layers of features from tiny images; Xiao et al. 2017, arXiv:1708.07747.
"""

import contextlib
import gzip
import os
import pickle
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepscale.data.cache import cache_folder, not_writable, one_at_a_time
from deepscale.data.download import DownloadError, download
from deepscale.data.splits import Pixels, Source, Split, divide
from deepscale.errors import MissingPackageError, UsageError
from deepscale.files import atomic

Say = Callable[[str], None]

# name -> (class of torchvision.datasets, label)
OFFICIAL = {
    "cifar10": ("CIFAR10", "CIFAR-10"),
    "cifar100": ("CIFAR100", "CIFAR-100"),
    "fashionmnist": ("FashionMNIST", "FashionMNIST"),
}
FRAMED = ", 28x28 padded to 32x32"

ADVICE = "give a folder that can be written: --data-dir FOLDER"
LARGEST_BYTES = 2**28  # of an unpacked file; CIFAR-100's images are the largest, 155 MB
ARRAY_PARTS = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class NotThereError(UsageError):
    """Official files are missing and cannot be had."""


def load_official(name: str, data_dir: Path, may_download: bool, say: Say, framed: bool = True) -> Source:
    """The data set `name` of OFFICIAL; `framed`: FashionMNIST with the frame that makes it 32x32.

    Raises NotThereError where files are missing and cannot be downloaded, UsageError for a damaged file, naming it, and
    MissingPackageError without torchvision.
    """
    kind, label = _torchvision_class(name), OFFICIAL[name][1]
    read = _read_fashionmnist if name == "fashionmnist" else _read_cifar
    class_names, train, test = read(kind, label, data_dir, may_download, say)
    if name == "fashionmnist" and framed:
        label += FRAMED
        train, test = (Split(_frame(split.images), split.labels) for split in (train, test))
    return divide(name, label, class_names, str(data_dir), train, test)


def _torchvision_class(name: str) -> Any:
    try:
        import torchvision.datasets
    except ImportError:
        raise MissingPackageError("torchvision", None, f"--dataset {name}") from None
    except RuntimeError as error:  # built for another torch: its operators are not found
        raise UsageError(f"torchvision does not fit the installed torch ({error}); type pip install --force-reinstall torchvision") from None
    return getattr(torchvision.datasets, OFFICIAL[name][0])


def _verify(path: Path, md5: str) -> None:
    from torchvision.datasets.utils import check_integrity

    if check_integrity(str(path), md5):
        return
    size_bytes = path.stat().st_size if path.is_file() else 0
    what = f"its checksum differs: {size_bytes:,} bytes, cut short or altered" if size_bytes else "it is empty"
    raise UsageError(f"{path} is not the official file ({what}); delete it and type the same command again, which downloads it where it may")


@contextlib.contextmanager
def _preparing(name: str, data_dir: Path, say: Say) -> Iterator[None]:
    """Inside, one process gets what is missing. A failed download is remembered for the processes that waited for it.

    Without that, each of the ranks that start together would wait in turn for a network that is not there.
    """
    start = time.time()
    note = cache_folder(data_dir) / f"{name}.failed"
    try:
        with one_at_a_time(data_dir, name, say):
            _raise_again(note, start)
            try:
                yield
            except DownloadError as error:
                note.write_text(f"{os.getppid()}\n{error}")
                raise
            note.unlink(missing_ok=True)
    except OSError as error:
        raise not_writable(data_dir, error) from None


def _raise_again(note: Path, start: float) -> None:
    if not note.is_file():
        return
    launcher, _, reason = note.read_text().partition("\n")
    same_launch = launcher == str(os.getppid()) and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if same_launch or note.stat().st_mtime >= start:
        raise DownloadError(reason)


def _not_there(label: str, data_dir: Path, missing: Path) -> NotThereError:
    return NotThereError(
        f"{label} is not complete in the folder {data_dir}: {missing.relative_to(data_dir)} is missing, and --no-download was given; "
        f"drop --no-download, or give the folder that has it: --data-dir FOLDER"
    )


def _obtain(urls: list[str], path: Path, md5: str, say: Say) -> None:
    """Downloads `path` from the first address that gives it."""
    reasons = []
    for url in urls:
        try:
            return download(url, path, md5, say)
        except DownloadError as error:
            reasons.append(str(error))
    raise DownloadError("; ".join(reasons))


@contextlib.contextmanager
def _advice(label: str, data_dir: Path) -> Iterator[None]:
    try:
        yield
    except DownloadError as error:
        raise NotThereError(
            f"{label} is not in the folder {data_dir} and cannot be downloaded ({error}); put its official files there, "
            f"give the folder that has them: --data-dir FOLDER, or type --dataset synthetic"
        ) from None


def _read_cifar(kind: Any, label: str, data_dir: Path, may_download: bool, say: Say) -> tuple[tuple[str, ...], Split, Split]:
    folder = data_dir / kind.base_folder
    files = {folder / name: md5 for name, md5 in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]}
    missing = [path for path in files if not path.exists()]
    if missing:
        if not (may_download or (data_dir / kind.filename).exists()):
            raise _not_there(label, data_dir, missing[0])
        with _advice(label, data_dir), _preparing(label, data_dir, say):
            _complete_cifar(kind, data_dir, list(files), say)
    for path, md5 in files.items():
        _verify(path, md5)
    class_names = tuple(str(name) for name in _unpickle(folder / kind.meta["filename"])[kind.meta["key"]])
    train, test = (_batches([folder / name for name, _ in names]) for names in (kind.train_list, kind.test_list))
    return class_names, train, test


def _batches(paths: list[Path]) -> Split:
    """The images of CIFAR's files, (M, 3072) channel by channel, one file after the other."""
    parts = [_unpickle(path) for path in paths]
    pixels = np.concatenate([np.asarray(part["data"], np.uint8).reshape(-1, 3, 32, 32) for part in parts])
    labels = np.concatenate([np.asarray(part["labels" if "labels" in part else "fine_labels"], np.int64) for part in parts])
    return Split(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels)


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of arrays, lists and texts. Whatever else a pickle names, and could call, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # NumPy's name of it before version 2
        if (module, name) in ARRAY_PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content: dict[str, Any] = _ArraysOnly(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not read ({error}); delete it and type the same command again") from None
    return content


def _complete_cifar(kind: Any, data_dir: Path, files: list[Path], say: Say) -> None:
    """Puts the missing ones of `files` in place, out of the archive, which is downloaded where it is missing too."""
    archive = data_dir / kind.filename
    missing = [path for path in files if not path.exists()]
    if missing and not archive.exists():
        _obtain([kind.url], archive, kind.tgz_md5, say)
    if missing:
        _verify(archive, kind.tgz_md5)
        _extract(archive, missing)


def _extract(archive: Path, missing: list[Path]) -> None:
    """Unpacks the missing files alone. The archive's names are only compared: none of them leads anywhere."""
    wanted = {f"{path.parent.name}/{path.name}": path for path in missing}
    try:
        with tarfile.open(archive) as packed:
            for member in packed:
                content = packed.extractfile(member) if member.name in wanted and member.isreg() and member.size <= LARGEST_BYTES else None
                if content is not None:
                    with atomic(wanted.pop(member.name), ADVICE) as temporary, content, temporary.open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UsageError(f"{archive} cannot be unpacked ({error}); delete it and type the same command again") from None
    if wanted:
        raise UsageError(f"{archive} holds no file {next(iter(wanted))}; delete it and type the same command again")


def _read_fashionmnist(kind: Any, label: str, data_dir: Path, may_download: bool, say: Say) -> tuple[tuple[str, ...], Split, Split]:
    raw = data_dir / kind.__name__ / "raw"
    resources: list[tuple[str, str]] = kind.resources
    arrays = [_read_resource(kind, label, data_dir, raw / name, md5, may_download, say) for name, md5 in resources]
    splits = []
    for images, labels, path in ((arrays[0], arrays[1], resources[0][0]), (arrays[2], arrays[3], resources[2][0])):
        if images.ndim != 3 or labels.shape != images.shape[:1] or images.shape[1:] != (28, 28) or labels.max(initial=0) >= len(kind.classes):
            raise UsageError(f"{raw / path} and its labels do not belong together; delete the folder {raw} and type the same command again")
        splits.append(Split(images[..., None], labels.astype(np.int64)))
    return tuple(kind.classes), splits[0], splits[1]


def _read_resource(kind: Any, label: str, data_dir: Path, path: Path, md5: str, may_download: bool, say: Say) -> Pixels:
    unpacked = path.with_suffix("")
    if not path.exists() and unpacked.is_file():
        say(f"{unpacked} is used as it is: checksums are known for the packed file alone")
        return _idx(unpacked, unpacked.read_bytes())
    if not path.exists():
        if not may_download:
            raise _not_there(label, data_dir, path)
        with _advice(label, data_dir), _preparing(label, data_dir, say):
            if not path.exists():  # another process may have got it meanwhile
                _obtain([mirror + path.name for mirror in kind.mirrors], path, md5, say)
    _verify(path, md5)
    try:
        with gzip.open(path) as file:
            return _idx(path, file.read(LARGEST_BYTES))
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be unpacked ({error}); delete it and type the same command again") from None


def _idx(path: Path, content: bytes) -> Pixels:
    """The array of an IDX file of unsigned bytes: 0, 0, 8, number of axes, their lengths as big-endian 32 bit, values."""
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 4 else 0
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * axes], ">u4").astype(int)) if len(content) >= 4 + 4 * axes else ()
    if not axes or len(content) != 4 + 4 * axes + int(np.prod(shape)):
        raise UsageError(f"{path} is empty, cut short or no IDX file ({len(content):,} bytes); delete it and type the same command again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _frame(images: Pixels) -> Pixels:
    """(M, 28, 28, 1) -> (M, 32, 32, 1)."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
