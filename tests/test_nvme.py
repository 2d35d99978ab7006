"""Optimiser states and parameters on a disk: every byte or an error, the same training as without, and sentences before it where that cannot be."""

import fcntl
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import run_ranks
from test_engine import apart

from deepscale.errors import DiskError, UsageError
from deepscale.nvme import folder, transfer
from deepscale.nvme.transfer import BLOCK, CHUNK, Handle

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
STEPS = 3


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What every rank found."""
    pytest.importorskip("deepspeed")
    place = tmp_path_factory.mktemp("nvme")
    (place / "disk").mkdir()
    disk = {"offload": "nvme", "nvme_path": str(place / "disk")}
    own = json.loads((Path(__file__).parents[1] / "ds_configs" / "zero3_nvme.json").read_text())
    del own["zero_optimization"]["offload_param"]
    own["zero_optimization"]["stage3_prefetch_bucket_size"] = "auto"
    (place / "optimizer.json").write_text(json.dumps(own))
    cases: list[dict[str, Any]] = [{"name": f"wrong: {wrong}", "settings": {**WIDE, **disk}, "wrong": wrong} for wrong in WRONG]
    cases += [{"name": "without", "steps": STEPS, "settings": WIDE}]
    cases += [{"name": "with", "steps": STEPS, "settings": {**WIDE, **disk}}]
    optimizer = {**disk, "deepspeed_config": str(place / "optimizer.json")}
    cases += [{"name": "optimizer", "steps": STEPS, "settings": {**WIDE, **optimizer, "accumulation": 2}}]
    cases += [{"name": "accumulated", "steps": STEPS, "settings": {**WIDE, "accumulation": 2}}]
    results, outputs = run_ranks("nvme_worker.py", cases, place, request.param, timeout_s=280)
    assert not any(outputs), "the ranks are not silent:\n" + "\n".join(outputs)
    results[0]["left"] = os.listdir(place / "disk")
    return results


WRONG = ("as libaio", "one number", "nothing")


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_finds_what_is_wrong(ranks: list[Results], wrong: str) -> None:
    """DeepSpeed's own error among them, on every rank."""
    for rank in ranks:
        sentence = rank[f"wrong: {wrong}"]
        assert (sentence is None) == (wrong == "nothing"), sentence
        if sentence is not None:
            assert all(word in sentence for word in ("--offload nvme", "wrong", "type --offload cpu", "zero3_offload.json"))


@pytest.mark.parametrize(("name", "expected"), [("with", "without"), ("optimizer", "accumulated")])
def test_training_is_bit_for_bit_what_it_is_without_a_disk(ranks: list[Results], name: str, expected: str) -> None:
    for rank in ranks:
        found, other = rank[name], rank[expected]
        assert found["losses"] == other["losses"]
        assert [apart(a, b) for a, b in zip(found["gradients"], other["gradients"], strict=True)] == [0.0, 0.0]
        assert apart(found["state"], other["state"]) == 0.0
        assert torch.equal(found["evaluated"], other["evaluated"])


def test_states_and_parameters_are_on_the_disk_while_it_trains(ranks: list[Results]) -> None:
    files = ranks[0]["with"]["files"]
    for part in ("_param", "_gradient_", "exp_avg-", "exp_avg_sq-"):
        assert any(part in file for file in files), files


def test_nothing_is_left_on_the_disk(ranks: list[Results]) -> None:
    assert ranks[0]["left"] == []


def test_deepspeed_finds_our_reads_and_writes_where_it_looks_for_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.runtime.zero import partition_parameters

    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(partition_parameters, "AsyncPartitionedParameterSwapper", partition_parameters.AsyncPartitionedParameterSwapper)
    transfer.install()
    assert AsyncIOBuilder().load().aio_handle is Handle
