"""Checkpoints on disk: the format, what is verified, what is refused, what is kept, and saves that fail. Plain torch, one process."""

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from deepscale.checkpoints import Saver, find, open_checkpoint, restore, saving, stored, tensor_file, writing
from deepscale.checkpoints.tensor_file import TensorFile
from deepscale.config import Config
from deepscale.engine import build_engine
from deepscale.errors import UsageError
from deepscale.files import sha256_of
from deepscale.models.convnext import ConvNeXt, cross_entropy

ALONE = stored.ALONE
SETTINGS = Config().replace(depth=14, patch_size=4, width=4, batch_size=2, engine="torch", precision="fp32", norm="batchnorm")
ABOUT = {"network": {"classes": 10}, "asked": {}, "settings": {"depth": 14}}


class Training:
    """A small network, its engine and a saver; `said` and `warned` are what the saver told."""

    def __init__(self, folder: Path, seed: int = 0, width: int = 4, **options: Any) -> None:
        settings = SETTINGS.replace(width=width)
        self.model = ConvNeXt(settings.model, stack_size=2).initialise(seed)
        self.engine = build_engine(self.model, settings, ALONE)
        self.said: list[str] = []
        self.warned: list[str] = []
        self.folder, self.steps = folder, 0
        options = {"asynchronous": False, "keep": 5, **options}
        self.saver = Saver(folder, self.model, self.engine, ALONE, about=ABOUT, say=self.said.append, warn=self.warned.append, **options)

    def step(self, steps: int = 1) -> "Training":
        for _ in range(steps):
            self.steps += 1
            images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(self.steps))
            self.engine.backward(cross_entropy(self.engine.forward(images), torch.tensor([1, 2])), last=True)
            self.engine.step()
        return self

    def save(self, best: float | None = None, **arrays: Any) -> Path:
        self.saver.save(self.steps, {"seen": self.steps, "rate": 0.1, "none": None}, arrays, best)
        return self.folder / f"step-{self.steps:08d}"

    def state(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ------------------------------------------------------------------------------------------------- the file


TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "nothing": torch.empty(0),
    "long": torch.arange(3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "large": torch.randn(3, 500_001),
}


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    written = tensor_file.write(tmp_path / "file", TENSORS, {"who": "ours"})
    assert written == ((tmp_path / "file").stat().st_size, sha256_of(tmp_path / "file"))
    assert same(safetensors.torch.load_file(tmp_path / "file"), TENSORS)
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"who": "ours"}


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    safetensors.torch.save_file({name: value.contiguous() for name, value in TENSORS.items()}, tmp_path / "file", {"who": "theirs"})
    with TensorFile(tmp_path / "file") as file:
        assert same({name: file.read(name) for name in file.entries}, TENSORS) and file.metadata == {"who": "theirs"}
        part = torch.empty(7)
        file.read_into("large", 499_999, part)
        assert torch.equal(part, TENSORS["large"].view(-1)[499_999:500_006])


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], data: Callable[[bytes], bytes] = lambda data: data) -> None:
    """Changes a file's header, and its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data(raw[8 + length :]))


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "beyond the end": lambda header: header["a"].update(
        shape=[3, 5], data_offsets=[header["a"]["data_offsets"][0], header["a"]["data_offsets"][0] + 60]
    ),
    "another dtype": lambda header: header["a"].update(dtype="F64"),
    "a dtype of pickles": lambda header: header["a"].update(dtype="OBJECT"),
    "overlapping": lambda header: header["a"].update(data_offsets=header["long"]["data_offsets"]),
    "negative": lambda header: header["a"].update(shape=[-3, -4]),
    "no numbers": lambda header: header["a"].update(shape=["3", 4]),
    "left out": lambda header: header.pop("a"),
    "no entry": lambda header: header.update(a=7),
    "metadata of numbers": lambda header: header.update(__metadata__={"a": 1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    tensor_file.write(tmp_path / "file", TENSORS, {})
    rewritten(tmp_path / "file", LIES[lie])
    with pytest.raises(UsageError, match=r"file is no intact safetensors file \(.+\)"):
        TensorFile(tmp_path / "file")


@pytest.mark.parametrize(
    "raw", [b"", b"123", b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"[]", (4).to_bytes(8, "little") + b"{}", b"\x00" * 64]
)
def test_bytes_that_are_no_file_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(UsageError, match="no intact safetensors file"):
        TensorFile(tmp_path / "file")


# ------------------------------------------------------------------------------------------------- round trip


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    run = Training(tmp_path).step(2)
    arrays = {"steps": np.arange(3), "names": np.array(["stem", "ähm"]), "empty": np.zeros((0, 4))}
    path = run.save(**arrays)
    assert names(tmp_path) == ["step-00000002"] and names(path) == ["arrays.npz", "manifest.json", "rank-0.safetensors"]
    found = find(tmp_path, run.warned.append)
    assert found is not None and found.path == path and found.step == 2 and found.ranks == 1
    assert found.progress == {"seen": 2, "rate": 0.1, "none": None}
    assert found.manifest["settings"] == {"depth": 14} and found.manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    back = found.arrays()
    assert back.keys() == arrays.keys() and all(np.array_equal(back[name], value) for name, value in arrays.items())
    assert same(found.weights(), run.state())
    assert not run.warned and len(run.said) == 1


def test_a_run_before_its_first_step_is_saved_too(tmp_path: Path) -> None:
    run, other = Training(tmp_path / "a"), Training(tmp_path / "b", seed=1)
    restore(open_checkpoint(run.save()), other.model, other.engine, ALONE, other.said.append)
    assert same(run.step(2).state(), other.step(2).state())


def test_objects_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pickle"):
        Training(tmp_path).save(array=np.array([{}], dtype=object))
    assert names(tmp_path) == []


def test_another_network_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Training(tmp_path / "a").step().save())
    other = Training(tmp_path / "b", width=8)
    before = other.state()
    with pytest.raises(UsageError, match=r"is another network's: stem.conv.weight is \(4, 3, 4, 4\) there and \(8, 3, 4, 4\) here"):
        restore(checkpoint, other.model, other.engine, ALONE, other.said.append)
    assert same(before, other.state())


# ------------------------------------------------------------------------------------------------- damage


def flipped(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def edited(path: Path, change: Callable[[dict[str, Any]], object], sign: bool = False) -> None:
    """Changes a manifest; with `sign` as one who knows the format."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if sign:
        for name, file in manifest["files"].items():
            if (path / name).is_file():
                file |= {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
        manifest["sha256"] = stored.signature(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def lied(path: Path, change: Callable[[dict[str, Any]], None], data: Callable[[bytes], bytes] = lambda data: data) -> None:
    rewritten(path / "rank-0.safetensors", change, data)
    edited(path, lambda manifest: None, sign=True)


def first_weight(header: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: header["weight/stem.conv.bias"]}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "missing file": (lambda path: (path / "rank-0.safetensors").unlink(), "rank-0.safetensors is no intact safetensors file"),
    "missing arrays": (lambda path: (path / "arrays.npz").unlink(), "arrays.npz is missing"),
    "truncated": (lambda path: (path / "rank-0.safetensors").write_bytes((path / "rank-0.safetensors").read_bytes()[:-1]), "header describes"),
    "emptied": (lambda path: (path / "rank-0.safetensors").write_bytes(b""), "rank-0.safetensors"),
    "lengthened": (lambda path: (path / "arrays.npz").open("ab").write(b"x"), "arrays.npz has .* bytes, .* were written"),
    "flipped bit": (lambda path: flipped(path / "rank-0.safetensors", -5000), "rank-0.safetensors was changed after it was written"),
    "flipped bit in the arrays": (lambda path: flipped(path / "arrays.npz", 10), "arrays.npz was changed after it was written"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text()[:100]),
        "manifest.json is not a manifest",
    ),
    "edited manifest": (lambda path: edited(path, lambda m: m.update(step=3)), "manifest.json was changed after it was written"),
    "no object": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not a manifest"),
    "another format": (lambda path: edited(path, lambda m: m.update(format=2), sign=True), "its format is 2, this deepscale reads format 1"),
    "names another file": (lambda path: edited(path, lambda m: m["files"].update({"../x.pt": {}}), sign=True), r"lists ../x.pt"),
    "no shapes": (lambda path: edited(path, lambda m: m.pop("tensors"), sign=True), "manifest.json is not a manifest"),
    "shapes below 0": (lambda path: edited(path, lambda m: m["tensors"].update({"head.linear.bias": [-2, -5]}), sign=True), "not a manifest"),
    "sizes of nothing": (lambda path: edited(path, lambda m: m["files"].update({"arrays.npz": {}})), "manifest.json was changed"),
    "a million ranks": (lambda path: edited(path, lambda m: m.update(ranks=10**12), sign=True), "does not fit"),
    "a link": (
        lambda path: ((path / "arrays.npz").rename(path / "elsewhere"), (path / "arrays.npz").symlink_to("elsewhere")),
        "arrays.npz is missing",
    ),
    "range outside": (
        lambda path: lied(
            path, lambda h: h["__metadata__"].update(deepscale=h["__metadata__"]["deepscale"].replace('conv.bias": 0', 'conv.bias": 2', 1))
        ),
        "of stem.conv.bias's 4 elements its files hold 2 to 6",
    ),
    "a foreign name": (lambda path: lied(path, lambda h: h.update({"weight/evil": h.pop("weight/stem.conv.bias")})), "is no part of this network"),
    "a kind of its own": (lambda path: lied(path, lambda h: h.update({"code/x": h.pop("weight/stem.conv.bias")})), "is no part of this network"),
    "another dtype": (
        lambda path: lied(path, lambda h: h["weight/stem.conv.bias"].update(dtype="U8", shape=[16])),
        r"weight/stem.conv.bias \(16,\), which is no part",
    ),
    "a pickle in its place": (
        lambda path: ((path / "rank-0.safetensors").write_bytes(pickle.dumps({"a": 1})), edited(path, lambda m: None, sign=True)),
        "no intact safetensors file",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, what: str) -> None:
    damage, words = DAMAGE[what]
    run = Training(tmp_path)
    first, second = run.step().save(), run.step().save()
    damage(second)
    warned: list[str] = []
    found = find(tmp_path, warned.append)
    assert found is not None and found.path == first
    assert len(warned) == 1 and warned[0].startswith(f"the checkpoint {second} is damaged and is not used: ")
    with pytest.raises(UsageError, match=words):
        open_checkpoint(second)
    assert open_checkpoint(tmp_path).path == first
    damage(first)
    assert find(tmp_path, warned.append) is None and len(warned) == 3
    with pytest.raises(UsageError, match=r"all checkpoints in .* are damaged"):
        open_checkpoint(tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.target),)

    def __init__(self, target: Path) -> None:
        self.target = str(target)


def test_a_planted_pickle_is_never_opened(tmp_path: Path) -> None:
    """Beside the files, and in the place of each of them with a manifest to match: what it would run is not run."""
    target = tmp_path / "owned"
    evil = pickle.dumps(Malicious(target))
    pickle.loads(evil)
    assert target.exists()
    target.unlink()
    run = Training(tmp_path / "run").step()
    path = run.save(names=np.array(["stem"]))
    for name in ("model.pt", "mp_rank_00_model_states.pt", "pytorch_model.bin", "data.pkl", "latest"):
        (path / name).write_bytes(evil)
        (path.parent / name).write_bytes(evil)
    checkpoint = open_checkpoint(path.parent)
    restore(checkpoint, run.model, run.engine, ALONE, run.said.append)
    assert checkpoint.arrays()["names"].tolist() == ["stem"] and checkpoint.weights()
    with (path / "arrays.npz").open("wb") as file:
        np.savez(file, names=np.array([Malicious(target)], dtype=object))
    edited(path, lambda manifest: None, sign=True)
    with pytest.raises(UsageError, match="cannot be read"):
        open_checkpoint(path).arrays()
    (path / "arrays.npz").write_bytes(evil)
    edited(path, lambda manifest: None, sign=True)
    with pytest.raises(UsageError, match="cannot be read"):
        open_checkpoint(path).arrays()
    assert not target.exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    assert find(tmp_path, pytest.fail) is None and find(tmp_path / "nowhere", pytest.fail) is None
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match=r"there is no checkpoint|no intact checkpoint"):
            open_checkpoint(path)


# ------------------------------------------------------------------------------------------------- what is kept


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    run = Training(tmp_path, keep=2)
    for accuracy in (0.1, 0.5, None, 0.3, 0.5, 0.2):
        run.step().save(best=accuracy)
    assert names(tmp_path) == ["best.json", "step-00000002", "step-00000005", "step-00000006"]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "accuracy": 0.5}
    again = Training(tmp_path, keep=1)
    again.steps = 6
    again.step().save(best=0.6)
    assert names(tmp_path) == ["best.json", "step-00000007"]


def test_leftovers_of_killed_saves_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.abc-1.tmp").mkdir()
    (tmp_path / ".step-00000003.abc-1.tmp" / "rank-0.safetensors").write_bytes(b"half")
    for name in ("lock", "notes.txt", "step-x", "step-00000001.mine"):
        (tmp_path / name).touch()
    Training(tmp_path, keep=1).step().save()
    assert names(tmp_path) == ["lock", "notes.txt", "step-00000001", "step-00000001.mine", "step-x"]


def test_a_step_is_saved_once_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    run = Training(tmp_path).step()
    path = run.save()
    written = (path / "manifest.json").stat().st_ino
    run.save()
    assert (path / "manifest.json").stat().st_ino == written and len(run.said) == 1
    flipped(path / "rank-0.safetensors", -1)
    again = Training(tmp_path).step()
    assert open_checkpoint(again.save()).step == 1 and names(tmp_path) == ["step-00000001"]


# ------------------------------------------------------------------------------------------------- saves that fail, and asynchronous ones


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(tensor_file if name == "_blocks" else writing, name, fail)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("where", ["sync", "_blocks", "signature"])
def test_a_save_that_fails_is_a_warning_and_the_last_good_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, where: str
) -> None:
    run = Training(tmp_path, asynchronous=asynchronous).step()
    run.save()
    run.saver.wait()
    with monkeypatch.context() as broken:
        failing(broken, where, OSError(28, "No space left on device", "there"))
        run.step().save()
        run.saver.wait()
    reason = "the checkpoint of step 2 was not saved: there: No space left on device; training goes on, "
    assert run.warned == [f"{reason}the last good one is {tmp_path / 'step-00000001'}"]
    assert names(tmp_path) == ["step-00000001"]
    run.save()
    run.saver.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and len(run.warned) == 1


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = Training(tmp_path / "file" / "below").step()
    run.save()
    assert len(run.warned) == 1 and "Not a directory" in run.warned[0] and "there is none yet" in run.warned[0]


def test_what_is_written_wrongly_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(tmp_path).step()
    blocks, calls = tensor_file._blocks, []

    def other_when_read_back(*arguments: Any) -> Any:
        calls.append(arguments)
        for block in blocks(*arguments):
            yield block if len(calls) == 1 else bytes(len(block))

    monkeypatch.setattr(tensor_file, "_blocks", other_when_read_back)
    run.save()
    assert names(tmp_path) == [] and "reads back otherwise than it was written" in run.warned[0]


def test_an_asynchronous_save_is_of_the_moment_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while it writes; the next save waits for it."""
    go, write = threading.Event(), tensor_file.write

    def held_up(*arguments: Any) -> tensor_file.Written:
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(tensor_file, "write", held_up)
    run = Training(tmp_path, asynchronous=True).step()
    expected = run.state()
    path = run.save()
    run.step(2)
    assert not path.exists() and not same(expected, run.state())
    threading.Timer(0.2, go.set).start()
    second = run.save()
    assert path.exists()
    run.saver.close()
    assert same(open_checkpoint(path).weights(), expected) and same(open_checkpoint(second).weights(), run.state())
    assert not run.warned


@pytest.mark.parametrize("free", [1_000, 1_000_000_000])
def test_saving_is_asynchronous_where_the_copy_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    machine = saving.machine.Machine("cpu", free, free, False, 1)
    monkeypatch.setattr(saving.machine, "measure_machine", lambda place: machine)
    run = Training(tmp_path, asynchronous=None).step()
    run.save()
    assert run.saver.asynchronous is (free > 1_000_000)
    run.saver.close()
    assert any("does not fit beside it" in line for line in run.said) is (free < 1_000_000)


def test_a_run_that_goes_on_from_an_earlier_step_puts_later_checkpoints_aside(tmp_path: Path) -> None:
    """They would count among the last that are kept, and be found before its own."""
    run = Training(tmp_path, keep=2)
    for _ in range(4):
        run.step().save()
    again = Training(tmp_path, keep=2).step()
    path = again.save(best=0.5)
    assert len(again.warned) == 2 and "is of a later step than this run has reached" in again.warned[0]
    assert [name for name in names(tmp_path) if not name.startswith("aside-step-")] == ["best.json", "step-00000001"]
    found = find(tmp_path, again.warned.append)
    assert found is not None and found.path == path and len(names(tmp_path)) == 4
    again.step().save()
    Training(tmp_path, keep=2).step().save()  # puts step 2 aside, and nothing is left of what was there
    assert [name.rpartition("-")[0] for name in names(tmp_path) if name.startswith("aside-")] == ["aside-step-00000002"]


def test_what_cannot_be_removed_is_a_warning_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(tmp_path, keep=1).step()
    run.save()
    failing(monkeypatch, "_remove", OSError(13, "Permission denied", "there"))
    path = run.step().save()
    assert run.warned == [f"older checkpoints were not removed: there: Permission denied; training goes on, the last good one is {path}"]
    assert open_checkpoint(path).step == 2
