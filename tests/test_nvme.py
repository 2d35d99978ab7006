"""Optimiser states and parameters on a disk: every byte or an error, the same training as without, and sentences before it where that cannot be."""

import fcntl
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Launch, run_ranks
from test_engine import apart

from deepscale.checkpoints.tensor_file import TensorFile
from deepscale.errors import DiskError, UsageError
from deepscale.nvme import folder, transfer
from deepscale.nvme.transfer import BLOCK, CHUNK, Handle
from deepscale.paths import ds_config_path

Results = dict[str, Any]

# --------------------------------------------------------------------------------------------------------- tensors and files


@pytest.mark.parametrize("numel", [1, 1023, 1024, BLOCK // 4 + 1, CHUNK // 4 - 1, CHUNK // 4, 2 * CHUNK // 4 + 77])
@pytest.mark.parametrize("offset", [0, 1, 77])
def test_what_is_read_is_what_was_written_wherever_it_lies(tmp_path: Path, numel: int, offset: int) -> None:
    """At addresses that O_DIRECT would refuse, too; and nothing beside it is touched."""
    handle = Handle()
    written, room = torch.randn(numel + offset)[offset:], torch.zeros(numel + offset + 5)
    handle.async_pwrite(written, str(tmp_path / "file"))
    assert handle.wait() == 1
    handle.async_pread(room[offset : offset + numel], str(tmp_path / "file"))
    assert handle.wait() == 1
    assert torch.equal(room[offset : offset + numel], written)
    assert not room[:offset].any() and not room[offset + numel :].any()


def test_several_at_once_and_again_over_the_same_file(tmp_path: Path) -> None:
    handle, numels = Handle(), [5, 70_001, 1_200_003]
    for _ in range(3):
        tensors = [torch.randn(numel) for numel in numels]
        for i, tensor in enumerate(tensors):
            handle.async_pwrite(tensor, str(tmp_path / str(i)))
        assert handle.wait() == 3
        read = [torch.zeros(numel) for numel in numels]
        for i, tensor in enumerate(read):
            handle.async_pread(tensor, str(tmp_path / str(i)))
        assert handle.wait() == 3
        assert all(torch.equal(a, b) for a, b in zip(tensors, read, strict=True))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses writes beyond, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_error_of_the_disk_is_lost(tmp_path: Path) -> None:
    handle, tensor = Handle(), torch.ones(3 * CHUNK // 4)
    file = str(tmp_path / "file")
    with files_of_at_most(CHUNK):
        handle.async_pwrite(tensor, file)
        with pytest.raises(DiskError, match=r"nvme failed: .*file: File too large; make room there or type another --nvme-path"):
            handle.wait()
    handle.async_pread(tensor, file)
    with pytest.raises(DiskError, match=r"ends after .* bytes"):
        handle.wait()
    handle.async_pread(tensor, str(tmp_path / "missing"))
    with pytest.raises(DiskError, match="No such file"):
        handle.wait()
    handle.async_pwrite(tensor, file)
    assert handle.wait() == 1  # it goes on as if nothing had been


def test_a_buffer_is_known_by_its_memory(tmp_path: Path) -> None:
    buffer = Handle().new_cpu_locked_tensor(100, torch.zeros(1))
    assert Handle().is_pinned(buffer[50:60]) and not Handle().is_pinned(torch.zeros(100))
    assert Handle().free_cpu_locked_tensor(buffer) and not Handle().is_pinned(buffer)


# ---------------------------------------------------------------------------------------------------------------- the folder


def test_a_folder_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (None, "--offload nvme needs a folder on the disk: type --nvme-path DIR"),
        (str(tmp_path / "missing"), "missing does not exist; type a folder on a local disk, or make it: mkdir -p"),
        (str(tmp_path / "file"), "is not a folder"),
        ("/proc", "/proc cannot be written"),
    ):
        with pytest.raises(UsageError, match=words):
            folder.check(path)
    folder.check(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Usage(NamedTuple):
    """What shutil.disk_usage gives."""

    total: int
    used: int
    free: int


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * 2**30, 0, 2**30))
    folder.refuse_full(str(tmp_path), 400 * 2**20, 2)
    with pytest.raises(UsageError, match=r"has 1\.0 GiB free, and 2 ranks of this machine need 1\.1 GiB there; make room, type a folder"):
        folder.refuse_full(str(tmp_path), 550 * 2**20, 2)


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / name for name in ("deepscale-dead", "deepscale-alive", "mine"))
    for path in (dead, alive, other):
        path.mkdir()
        (path / "lock").touch()
    with (alive / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        own = [folder.own_folder(str(tmp_path)) for _ in range(2)]  # of this process, and in nobody's way
        assert sorted(tmp_path.iterdir()) == sorted([alive, other, *own])


def test_the_speed_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    speed = folder.speed_of(str(tmp_path))
    assert speed.read > 0 and speed.write > 0
    assert not [*tmp_path.iterdir()]


# -------------------------------------------------------------------------------------------------------- the same training

# Of the wide tensors' parts on each of two ranks some are above 1 MiB and some below.
WIDE = {"blocks": (1, 1, 5, 1), "width": 48, "stack_size": 5, "clip": 0.0, "zero": 3, "kernel": "torch", "layerscale_init": 1.0, "device": "cpu"}
STEPS, HALF, END = 2, 3, 6  # of training; of training that is saved
WRONG = {1: ("as libaio", "nothing"), 2: ("one number",)}


def cases_of(place: Path, ranks: int) -> Iterator[dict[str, Any]]:
    """A check; on one rank training without a disk, with it, and with the optimiser alone there; on two the same saved, and resumed."""
    disk = {**WIDE, "offload": "nvme", "nvme_path": str(place / "disk")}
    for wrong in WRONG[ranks]:
        yield {"name": f"wrong: {wrong}", "settings": disk, "wrong": wrong}
    if ranks == 1:
        own = json.loads(ds_config_path("zero3_nvme").read_text())
        del own["zero_optimization"]["offload_param"]
        (place / "optimizer.json").write_text(json.dumps(own))
        for name, settings in {"without": WIDE, "with": disk, "optimizer": disk | {"deepspeed_config": str(place / "optimizer.json")}}.items():
            yield {"name": name, "steps": STEPS, "settings": settings | {"accumulation": 2}}
        return
    saved = {"saves": [HALF, END], "last": END}
    yield {"name": "saved without", "settings": WIDE, "folder": str(place / "without"), "saves": [END], "last": END}
    yield {"name": "saved", "settings": disk, "folder": str(place / "with"), "asynchronous": True, **saved}
    yield {"name": "resumed", "settings": disk, "folder": str(place / "resumed"), "from": str(place / "with"), **saved}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture(scope="module")
def ranks(place: Path) -> dict[int, list[Results]]:
    """What every rank found, of one and of two."""
    pytest.importorskip("deepspeed")
    found = {}
    for number in (1, 2):
        folder = place / str(number)
        (folder / "disk").mkdir(parents=True)
        found[number], outputs = run_ranks("nvme_worker.py", [*cases_of(folder, number)], folder, number, timeout_s=280)
        assert not any(outputs), "the ranks are not silent:\n" + "\n".join(outputs)
    return found


@pytest.mark.parametrize(("number", "wrong"), [(number, wrong) for number, several in WRONG.items() for wrong in several])
def test_the_check_finds_what_is_wrong(ranks: dict[int, list[Results]], number: int, wrong: str) -> None:
    """DeepSpeed's own error among them, on every rank."""
    for rank in ranks[number]:
        sentence = rank[f"wrong: {wrong}"]
        assert (sentence is None) == (wrong == "nothing"), sentence
        if sentence is not None:
            assert all(word in sentence for word in ("--offload nvme", "wrong", "type --offload cpu", "zero3_offload.json"))


@pytest.mark.parametrize("name", ["with", "optimizer"])
def test_training_is_bit_for_bit_what_it_is_without_a_disk(ranks: dict[int, list[Results]], name: str) -> None:
    found, other = ranks[1][0][name], ranks[1][0]["without"]
    assert found["losses"] == other["losses"]
    assert [apart(a, b) for a, b in zip(found["gradients"], other["gradients"], strict=True)] == [0.0, 0.0]
    assert apart(found["state"], other["state"]) == 0.0
    assert torch.equal(found["evaluated"], other["evaluated"])


def test_states_and_parameters_are_on_the_disk_while_it_trains(ranks: dict[int, list[Results]]) -> None:
    files = ranks[1][0]["with"]["files"]
    for kind in ("_param", "_gradient_", "exp_avg-", "exp_avg_sq-"):
        assert any(kind in file for file in files), files


def test_a_checkpoint_holds_what_is_on_the_disk_and_fills_it_again(ranks: dict[int, list[Results]], place: Path) -> None:
    """On two ranks: training is that without a disk, bit for bit, so are the files, and so is the rest of a run from the half of it."""
    for rank, found in enumerate(ranks[2]):
        whole, resumed, without = (found[name] for name in ("saved", "resumed", "saved without"))
        assert whole["losses"] == without["losses"] and resumed["losses"] == whole["losses"][HALF:]
        assert apart(whole["state"], without["state"]) == 0.0
        assert torch.equal(resumed["evaluated"], whole["evaluated"]) and torch.equal(without["evaluated"], whole["evaluated"])
        first, *others = (place / "2" / name / f"step-{END:08d}" / f"rank-{rank}.safetensors" for name in ("without", "with", "resumed"))
        expected = TensorFile(first)
        for other in map(TensorFile, others):
            names = [name for name in expected.entries if not name.startswith("random/")]
            assert [name for name in names if not torch.equal(expected.read(name), other.read(name))] == []


def test_nothing_is_left_on_the_disk(ranks: dict[int, list[Results]], place: Path) -> None:
    assert [*(place / "1" / "disk").iterdir(), *(place / "2" / "disk").iterdir()] == []


TRAINING = [
    "--dataset", "synthetic", "--feed", "tensors", "--blocks", "1,1,5,1", "--width", "48", "--patch-size", "4", "--batch-size", "8",
    "--eval-images", "20", "--threads", "1", "--device", "cpu", "--kernel", "torch", "--max-steps", "4", "--record-every", "1",
]  # fmt: skip
FULL = """
import collections, errno, os
from deepscale import stop, train
from deepscale.nvme import transfer

write, times = os.pwrite, collections.Counter()

def until_the_third_step(file, view, at):
    name = os.readlink(f"/proc/self/fd/{file}"), at
    times[name] += "exp_avg_sq" in name[0]
    if times[name] == 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(file, view, at)

transfer.os.pwrite = until_the_third_step
stop.program(train.main)
"""


def test_a_run_of_the_launcher_ends_with_a_sentence_where_the_disk_is_full(launch: Launch, tmp_path: Path) -> None:
    """Two ranks with the file of ds_configs/, and records of weights on the disk; nothing is left there."""
    pytest.importorskip("deepspeed")
    (tmp_path / "disk").mkdir()
    (tmp_path / "full.py").write_text(FULL)
    arguments = [*TRAINING, "--no-tracking", "--deepspeed_config", str(ds_config_path("zero3_nvme")), "--nvme-path", "disk"]
    full = launch(*arguments, ranks=2, script=tmp_path / "full.py")
    assert full.returncode == 1, full.output
    assert "a rank rest in disk: it reads" in full.output and "two steps with it are equal to plain torch's" in full.output
    assert "step 1/4" in full.output and "step 3/4" not in full.output and "Traceback" not in full.output
    assert "the disk with the states of --offload nvme failed" in full.output and "No space left on device; make room there" in full.output
    assert [*(tmp_path / "disk").iterdir()] == []


def test_deepspeed_finds_our_reads_and_writes_where_it_looks_for_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.runtime.zero import partition_parameters

    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(partition_parameters, "AsyncPartitionedParameterSwapper", partition_parameters.AsyncPartitionedParameterSwapper)
    transfer.install()
    assert AsyncIOBuilder().load().aio_handle is Handle
