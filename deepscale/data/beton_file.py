"""The .beton: FFCV's file of one data set's training images, made once, checked before each use.

Stored raw (no JPEG). A file is written in a working folder beside its place by a process of its own with a time limit, hashed,
recorded in a JSON beside it and renamed; a damaged one is named and written again. FFCV itself checks nothing: of a truncated
file it hands out wrong pixels. Its images always have three channels, so a greyscale image is stored as three equal ones.
FFCV: Leclerc et al. 2023, arXiv:2306.12517, https://github.com/libffcv/ffcv.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from deepscale.errors import UsageError
from deepscale.files import sha256_of

if TYPE_CHECKING:
    from deepscale.config import DataConfig
    from deepscale.data.splits import Pixels, Source

Say = Callable[[str], None]

FORMAT = 1
CHANNELS = (1, 3)
DEBIAN_PACKAGES = "g++ pkg-config libopencv-dev libturbojpeg0-dev libgl1"
INSTALL = f"type pip install 'deepscale[ffcv]' (Debian, Ubuntu: first apt-get install {DEBIAN_PACKAGES}), or --feed tensors"


class FeedUnavailable(UsageError):
    """FFCV cannot feed this run; the message is a sentence that says why, and what would help."""


def import_ffcv() -> None:
    """Imports FFCV, whose import sets torch's threads to 1: they are restored. Raises FeedUnavailable with the cause."""
    threads = torch.get_num_threads()
    try:
        importlib.import_module("ffcv")
    except Exception as error:  # a broken stack below it raises anything: OSError (libGL), SystemError (numba), AttributeError (numpy)
        cause = " ".join(str(error).split()) or type(error).__name__
        raise FeedUnavailable(f"FFCV cannot be imported ({cause}): {INSTALL}") from error
    finally:
        torch.set_num_threads(threads)


def beton_path(source: "Source", data: "DataConfig") -> Path:
    """Where the .beton of this data set's training split is: DATA_DIR/.deepscale/NAME-DIGEST.beton."""
    name = re.sub(r"[^\w.-]+", "_", source.info.name)
    return Path(data.data_dir) / ".deepscale" / f"{name}-{source.info.digest[:12]}.beton"


# ------------------------------------------------------------------------------------------------------------ verifying


def record_path(path: Path) -> Path:
    """The JSON beside a .beton: SHA-256, bytes and images of the file, and what it was made of."""
    return Path(f"{path}.json")


def verify_beton(path: Path) -> str | None:
    """None where `path` holds what its record says, else the sentence of what is wrong. Reads the whole file (about 0.3 s for CIFAR-10)."""
    if not path.is_file():
        return f"{path} does not exist"
    record = _record(path)
    if record is None:
        return f"{path} has no readable record {record_path(path).name} beside it"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"{path} is damaged: it has {size:,} bytes instead of {record['bytes']:,}"
    if sha256_of(path) != record["sha256"]:
        return f"{path} is damaged: its SHA-256 is not the recorded one"
    return None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(record_path(path).read_text())
    except (OSError, ValueError):
        return None
    fields = {"format": int, "sha256": str, "bytes": int, "images": int, "source": str}
    right = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in fields.items())
    return record if right and record["format"] == FORMAT else None


def _identity(source: "Source") -> dict[str, Any]:
    """What the file is made of; the digest covers the training split's pixels and labels in their order."""
    return {"images": len(source.train.labels), "source": source.info.digest}


def _wrong(source: "Source", path: Path) -> str | None:
    wrong = verify_beton(path)
    if wrong is None:
        record, identity = _record(path) or {}, _identity(source)
        if any(record.get(name) != value for name, value in identity.items()):
            wrong = f"{path} was made of other images than those of {source.info.label}"
    return wrong


# -------------------------------------------------------------------------------------------------------------- writing


def write_beton(source: "Source", path: Path, say: Say = print, time_limit_s: float = 600) -> None:
    """Sees to it that `path` holds the training split; writes it where it is missing or wrong. Safe with several ranks at once.

    Raises FeedUnavailable where it cannot be written, or not within `time_limit_s`; then nothing half-written stays.
    """
    if _wrong(source, path) is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=time_limit_s + 60):
            wrong = _wrong(source, path)  # another rank may have written it while this one waited
            if wrong is not None:
                again = path.exists()
                say(f"{wrong}: writing it again" if again else f"writing {path} for FFCV (once per data set)")
                _write(source, path, time_limit_s)
    except Timeout:
        raise FeedUnavailable(f"another process has been writing {path} for {time_limit_s + 60:.0f} s; end it, or type --feed tensors") from None
    except OSError as error:
        raise FeedUnavailable(f"{path} cannot be written ({error.strerror or error}); give a writable --data-dir, or --feed tensors") from error


def _write(source: "Source", path: Path, time_limit_s: float) -> None:
    split = source.train
    if len(split.labels) == 0 or split.images.shape[-1] not in CHANNELS:
        raise FeedUnavailable(f"FFCV stores images of 1 or 3 channels, not {split.images.shape} images of {source.info.label}; type --feed tensors")
    import_ffcv()  # a sentence here instead of a traceback in the writing process
    needed = split.images.nbytes * (1 + 3 // split.images.shape[-1]) + 2**26
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise FeedUnavailable(f"{path.parent} has {free >> 20:,} MiB free and FFCV's file needs {needed >> 20:,}; make room, or type --feed tensors")
    work = Path(f"{path}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed while it held the lock
    work.mkdir()
    try:
        np.save(work / "images.npy", split.images)
        np.save(work / "labels.npy", split.labels)
        _run_writer(work, path, time_limit_s)
        made, made_record = work / "data.beton", work / "record.json"
        record = {"format": FORMAT, "sha256": sha256_of(made), "bytes": made.stat().st_size, **_identity(source)}
        made_record.write_text(json.dumps(record, indent=1) + "\n")
        made.replace(path)
        made_record.replace(record_path(path))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run_writer(work: Path, path: Path, time_limit_s: float) -> None:
    """FFCV's writer in a session of its own: it waits for ever for a worker that died, and forks, which a process with CUDA must not."""
    package_root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(part for part in (package_root, os.environ.get("PYTHONPATH")) if part)
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    # On one core numba's unloading of TBB waits for ever when the finished process exits.
    environment["NUMBA_THREADING_LAYER"] = "workqueue"
    code = "import sys; from deepscale.data.beton_file import write_in_this_process as write; write(sys.argv[1])"
    with (work / "messages").open("w+") as messages:
        command = [sys.executable, "-c", code, str(work)]
        writer = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=messages, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            writer.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            raise FeedUnavailable(f"FFCV's writer did not finish {path} within {time_limit_s:g} s and was stopped; type --feed tensors") from None
        finally:
            if writer.returncode != 0:
                _end_session(writer)
        if writer.returncode != 0:
            messages.seek(0)
            lines = [line.strip() for line in messages if line.strip()] or [f"exit code {writer.returncode}"]
            cause = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])
            raise FeedUnavailable(f"FFCV's writer failed on {path} ({cause}); type --feed tensors")


def _end_session(writer: "subprocess.Popen[bytes]") -> None:
    """Ends the writer and its workers. SIGTERM first: Python's resource tracker ignores it, and frees their shared memory."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # all ended already
            os.killpg(writer.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(5)
            return


class _Rows:
    """What FFCV's writer asks for: row i is (uint8 pixels (H, W, 3), label)."""

    def __init__(self, work: Path) -> None:
        self.images = np.load(work / "images.npy", mmap_mode="r")  # (M, H, W, C)
        self.labels = np.load(work / "labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> "tuple[Pixels, int]":
        image = self.images[index]
        return (image if image.shape[-1] == 3 else np.repeat(image, 3, axis=-1)), int(self.labels[index])


def write_in_this_process(folder: str) -> None:
    """FOLDER/images.npy and labels.npy to FOLDER/data.beton. One worker: the bytes of the file then do not depend on timing."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    signal.signal(signal.SIGCHLD, _end_with_worker)
    work = Path(folder)
    writer = DatasetWriter(str(work / "data.beton"), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(_Rows(work))


def _end_with_worker(signal_number: int, frame: FrameType | None) -> None:
    ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is not None and ended.si_status != 0:
        os._exit(1)  # FFCV would wait for ever; the worker has printed why it died
