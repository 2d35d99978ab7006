"""Official files made small: the same formats and names, with their own checksums in place of the published ones."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets

from deepscale.config import DataConfig
from deepscale.data import download, official
from deepscale.data.sources import CIFAR10_CLASSES, Source, load_source
from deepscale.data.splits import hold_out, interleaved
from deepscale.errors import UsageError

PER_CLASS = 4  # images of a class in each file


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def load(folder: Path, dataset: str, may_download: bool = False) -> tuple[Source, list[str]]:
    lines: list[str] = []
    return load_source(DataConfig(dataset=dataset, data_dir=str(folder), download=may_download), lines.append), lines


def refused(folder: Path, dataset: str, may_download: bool = False) -> str:
    with pytest.raises(UsageError) as error:
        load(folder, dataset, may_download)
    assert error.value.exit_code == 2
    return str(error.value)


def write_cifar(folder: Path, kind: Any, classes: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Writes the files and the archive of a CIFAR class of torchvision; returns pixels (M, 32, 32, 3) and labels."""
    random = np.random.default_rng(0)
    made: dict[str, list[np.ndarray]] = {"train": [], "train_labels": [], "test": [], "test_labels": []}
    lists: dict[str, list[list[str]]] = {"train": [], "test": []}
    inside = folder / kind.base_folder
    inside.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    for part, names in (("train", kind.train_list), ("test", kind.test_list)):
        for name, _ in names:
            labels = random.permutation(np.repeat(np.arange(classes), PER_CLASS))
            rows = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
            (inside / name).write_bytes(pickle.dumps({"data": rows, key: labels.tolist()}))
            lists[part].append([name, md5(inside / name)])
            made[part].append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            made[part + "_labels"].append(labels)
    class_names = list(CIFAR10_CLASSES) if classes == 10 else [f"class {index}" for index in range(classes)]
    meta = inside / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: class_names}))
    with tarfile.open(folder / kind.filename, "w:gz") as archive:
        archive.add(inside, kind.base_folder)
    monkeypatch.setattr(kind, "train_list", lists["train"])
    monkeypatch.setattr(kind, "test_list", lists["test"])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    monkeypatch.setattr(kind, "tgz_md5", md5(folder / kind.filename))
    return {name: np.concatenate(parts) for name, parts in made.items()}


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path / "data"
    made = write_cifar(folder, torchvision.datasets.CIFAR10, 10, monkeypatch)
    (folder / "cifar-10-python.tar.gz").rename(tmp_path / "archive")
    return folder, made


@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_as_written(dataset: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_cifar(tmp_path, getattr(torchvision.datasets, dataset.upper()), classes, monkeypatch)
    source, _ = load(tmp_path, dataset)
    kept, held = hold_out(made["train_labels"], dataset)
    order = interleaved(made["test_labels"])
    np.testing.assert_array_equal(source.train.images, made["train"][kept])
    np.testing.assert_array_equal(source.validation.labels, made["train_labels"][held])
    np.testing.assert_array_equal(source.test.images, made["test"][order])
    assert source.info.classes == classes and source.info.label == f"CIFAR-{classes}" and source.info.image_size == 32
    if dataset == "cifar10":
        assert load(tmp_path, "auto")[0].info == source.info


class _Opened:
    """Unpickling this makes a folder: proof that an unverified file was opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_damaged_files_are_named_and_never_unpickled(cifar10: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = cifar10
    path = folder / "cifar-10-batches-py" / "data_batch_3"
    good = path.read_bytes()
    for content, why in (
        (b"", "it is empty"),
        (good[:-100], "cut short or altered"),
        (pickle.dumps(_Opened(tmp_path / "ran")), "cut short or altered"),
    ):
        path.write_bytes(content)
        for dataset in ("cifar10", "auto"):
            message = refused(folder, dataset)
            assert str(path) in message and why in message and "delete it" in message
    assert not (tmp_path / "ran").exists()
    path.unlink()
    message = refused(folder, "cifar10")
    assert "cifar-10-batches-py/data_batch_3 is missing, and --no-download was given" in message
    (folder / "cifar-10-python.tar.gz").write_bytes(b"half an archi")
    assert f"{folder / 'cifar-10-python.tar.gz'} is not the official file" in refused(folder, "cifar10")


def test_an_archive_that_is_there_is_unpacked(cifar10: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = cifar10
    whole = load(folder, "cifar10")[0].info
    (tmp_path / "archive").rename(folder / "cifar-10-python.tar.gz")
    for name in ("data_batch_2", "test_batch", "batches.meta"):
        (folder / "cifar-10-batches-py" / name).unlink()
    assert load(folder, "cifar10")[0].info == whole
    assert not list((folder / ".deepscale").glob("*.part"))


@pytest.mark.parametrize("content", ["a call", "another class"])
def test_a_pickle_with_the_right_checksum_still_calls_nothing(
    content: str, cifar10: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if someone had made a file with the official one's MD5."""
    folder, _ = cifar10
    path = folder / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({"data": _Opened(tmp_path / "ran") if content == "a call" else memoryview}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", md5(path)]])
    named = {"a call": "posix.mkdir", "another class": "builtins.memoryview"}[content]
    assert f"{path} is not read (it names {named}, which is no part of an array)" in refused(folder, "cifar10")
    assert not (tmp_path / "ran").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "wanted",
    [
        member("cifar-10-batches-py/data_batch_2", tarfile.SYMTYPE, "../../outside"),
        member("cifar-10-batches-py/data_batch_2", tarfile.LNKTYPE, "../outside"),
        member("cifar-10-batches-py/data_batch_2", tarfile.CHRTYPE),
        member("cifar-10-batches-py/data_batch_2", tarfile.FIFOTYPE),
        member("cifar-10-batches-py/../cifar-10-batches-py/data_batch_2"),
        member("/cifar-10-batches-py/data_batch_2"),
        member("too large"),
    ],
    ids=lambda info: f"{info.type!r} {info.name}",
)
def test_an_archive_leads_nowhere_else(wanted: tarfile.TarInfo, cifar10: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names above the folder, absolute ones, links, devices and what is too large, in an archive with the right checksum: nothing is written."""
    folder, _ = cifar10
    (tmp_path / "outside").write_text("before")
    if wanted.name == "too large":
        wanted = member("cifar-10-batches-py/data_batch_2")
        monkeypatch.setattr(official, "LARGEST_BYTES", 3)
    (folder / "cifar-10-batches-py" / "data_batch_2").unlink()
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        for info in (member("../outside"), member(str(tmp_path / "outside")), member(".."), member("new", tarfile.SYMTYPE, ".."), wanted):
            packed.addfile(info, io.BytesIO(b"evil") if info.size else None)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(archive))
    before = sorted(path for path in tmp_path.rglob("*") if ".deepscale" not in path.parts)
    assert f"{archive} holds no file cifar-10-batches-py/data_batch_2" in refused(folder, "cifar10")
    assert sorted(path for path in tmp_path.rglob("*") if ".deepscale" not in path.parts) == before
    assert (tmp_path / "outside").read_text() == "before"


def write_fashionmnist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    made, resources = {}, []
    for part, count in (("train", 200), ("t10k", 50)):
        made[part] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        made[part + "_labels"] = (np.arange(count) % 10).astype(np.uint8)
        for name, values in ((f"{part}-images-idx3-ubyte.gz", made[part]), (f"{part}-labels-idx1-ubyte.gz", made[part + "_labels"])):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (raw / name).write_bytes(gzip.compress(head + values.tobytes()))
            resources.append((name, md5(raw / name)))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
    return made


def test_fashionmnist_is_padded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_fashionmnist(tmp_path, monkeypatch)
    source, lines = load(tmp_path, "fashionmnist")
    order = interleaved(made["t10k_labels"].astype(np.int64))
    assert source.test.images.shape == (50, 32, 32, 1) and lines == []
    np.testing.assert_array_equal(source.test.images[:, 2:30, 2:30, 0], made["t10k"][order])
    assert source.test.images.sum() == made["t10k"].sum(dtype=np.int64)  # the frame is zero
    assert (source.info.channels, source.info.label) == (1, "FashionMNIST, 28x28 padded to 32x32")
    packed = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    content = gzip.decompress(packed.read_bytes())
    packed.write_bytes(packed.read_bytes()[:-9])
    assert str(packed) in refused(tmp_path, "fashionmnist")
    packed.unlink()
    assert "is missing" in refused(tmp_path, "fashionmnist")
    packed.with_suffix("").write_bytes(content)  # unpacked by other tools
    again, lines = load(tmp_path, "fashionmnist")
    assert again.info == source.info and "checksums are known for the packed file alone" in lines[0]
    packed.with_suffix("").write_bytes(content[:-1])
    assert "cut short" in refused(tmp_path, "fashionmnist")


class Server(http.server.ThreadingHTTPServer):
    """Gives `content` to every request, but only its first `sent` bytes, and counts the requests."""

    content = b""
    sent = 1 << 40
    requests = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.sent])

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), _Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{running.server_port}/cifar")
        yield running
        running.shutdown()


def test_processes_that_start_together_download_once(cifar10: tuple[Path, Any], tmp_path: Path, server: Server) -> None:
    full, _ = cifar10
    server.content = (tmp_path / "archive").read_bytes()
    infos: list[Any] = []
    folder = tmp_path / "fresh"
    threads = [threading.Thread(target=lambda: infos.append(load(folder, "cifar10", may_download=True)[0].info)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert server.requests == 1 and len({info.digest for info in infos}) == 1 and len(infos) == 3
    assert infos[0].digest == load(full, "cifar10")[0].info.digest
    assert sorted(path.name for path in folder.iterdir()) == [".deepscale", "cifar-10-batches-py", "cifar-10-python.tar.gz"]


@pytest.mark.parametrize("sent", [0, 500, 1 << 40])
def test_a_broken_download_leaves_nothing_under_the_final_name(cifar10: tuple[Path, Any], tmp_path: Path, server: Server, sent: int) -> None:
    server.content = (tmp_path / "archive").read_bytes()[:-1] + b"?"  # not the official bytes, even when all are sent
    server.sent = sent
    folder = tmp_path / "fresh"
    message = refused(folder, "cifar10", may_download=True)
    assert "cannot be downloaded" in message and "--dataset synthetic" in message
    assert [path.name for path in folder.iterdir()] == [".deepscale"]
    source, lines = load(folder, "auto", may_download=True)
    assert source.info.name == "synthetic" and lines[-1].startswith("!!! SYNTHETIC IMAGES instead of CIFAR-10")


def test_without_a_network_the_answer_comes_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "CONNECT_S", 0.5)
    with socket.socket() as silent:  # takes the connection and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        start = time.monotonic()
        assert "did not answer within" in refused(tmp_path, "cifar100", may_download=True)
        assert time.monotonic() - start < 10
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert "FashionMNIST is not in the folder" in refused(tmp_path, "fashionmnist", may_download=True)
    source, lines = load(tmp_path, "auto")
    assert source.info.name == "synthetic" and "SYNTHETIC" in lines[0]


def test_ranks_of_one_launch_do_not_wait_in_turn_for_a_network_that_is_not_there(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    messages = {refused(tmp_path, "cifar10", may_download=True) for _ in range(4)}
    assert server.requests == 1 and len(messages) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    for dataset in ("cifar10", "auto"):
        assert f"the data folder {tmp_path} cannot be written (Read-only file system)" in refused(tmp_path, dataset, may_download=True)
