"""Saved and resumed under every engine, on one rank and on two, and from one to the other: bit for bit what an uninterrupted run computes.

All cases run in three processes at once (checkpoint_worker.py): one rank, and two ranks; each waits for what the other has saved. A run of
six steps saves after the third and the last; the run resumed from the third saves at once and after the last, so that their files can be compared.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks

from deepscale import ops
from deepscale.checkpoints import Checkpoint, open_checkpoint
from deepscale.checkpoints.stored import KINDS, Fragments, rank_file
from deepscale.checkpoints.tensor_file import TensorFile

pytest.importorskip("deepspeed")

HALF, END = 3, 6
Case = dict[str, Any]
Results = dict[str, Any]
ENGINES = {"torch": {"engine": "torch"}, **{f"z{stage}": {"zero": stage} for stage in range(4)}}
OFFLOADED = {f"{name} offloaded": ENGINES[name] | {"offload": "cpu"} for name in ("z1", "z2", "z3")}
BATCHNORM = {"norm": "batchnorm", "drop_path": 0.5}
ONE_RANK: dict[str, dict[str, Any]] = {
    **ENGINES,
    **OFFLOADED,
    "z1 cpu_adam": OFFLOADED["z1 offloaded"] | {"schedule": "constant"},
    "z3 cpu_adam": OFFLOADED["z3 offloaded"],
    "z2 accumulated": ENGINES["z2"] | {"accumulation": 2, "schedule": "cosine"},
    "torch batchnorm": ENGINES["torch"] | BATCHNORM,
    "z2 reversible": ENGINES["z2"] | {"skip": "reversible", "activations": "reconstruct", "drop_path": 0.5},
    "z0 fp16": ENGINES["z0"] | {"precision": "fp16"},
    "z2 fp16": ENGINES["z2"] | {"precision": "fp16"},
    "z3 bf16": ENGINES["z3"] | {"precision": "bf16"},
    "torch fp16": ENGINES["torch"] | {"precision": "fp16"},
}
TWO_RANKS: dict[str, dict[str, Any]] = {
    **ENGINES,
    "z3 offloaded": OFFLOADED["z3 offloaded"],
    "torch accumulated": ENGINES["torch"] | {"accumulation": 2},
    "z2 batchnorm": ENGINES["z2"] | BATCHNORM,
    "z1 fp16": ENGINES["z1"] | {"precision": "fp16"},
}
FAILING = ("loudly", "silently", "loudly, asynchronous", "silently, asynchronous")
# Saved on two ranks, resumed on one and saved, resumed on two.
THERE_AND_BACK = {
    "z2": ("z3", "z0"),
    "z3": ("torch", "z1"),
    "z2 batchnorm": ("torch batchnorm", "z2 batchnorm"),
    "z1 fp16": ("torch fp16", "z0 fp16"),
}


def pair(folder: Path, ranks: int, name: str, settings: dict[str, Any]) -> Iterator[Case]:
    """A run and the run resumed from its third step."""
    case = {"settings": settings, "saves": [HALF, END], "last": END, "cpu_adam": "cpu_adam" in name, "asynchronous": "batchnorm" in name}
    yield case | {"name": name, "folder": str(folder / f"{ranks} {name}")}
    yield case | {"name": f"{name} resumed", "folder": str(folder / f"{ranks} {name} resumed"), "from": str(folder / f"{ranks} {name}")}


def moved(folder: Path, ranks: int, name: str, settings: dict[str, Any], source: str) -> Case:
    """A run resumed from one on another number of ranks."""
    return {
        "name": f"{name} from {source}", "settings": settings, "saves": [HALF, END], "last": END,
        "folder": str(folder / f"{ranks} {name} from {source}"), "from": str(folder / source),
    }  # fmt: skip


def one_rank_cases(folder: Path) -> Iterator[Case]:
    full, low = ([name for name in ONE_RANK if any(p in name for p in ("fp16", "bf16")) is low] for low in (False, True))
    for names, precise in ((full, True), (low, False)):
        for name in names:
            yield from pair(folder, 1, name, ONE_RANK[name])
        for first, (name, _) in THERE_AND_BACK.items():
            if ("fp16" not in first) is precise:
                yield moved(folder, 1, name, ONE_RANK[name], f"2 {first}")


def two_rank_cases(folder: Path) -> Iterator[Case]:
    all_settings = ONE_RANK | TWO_RANKS
    returns = [moved(folder, 2, back, all_settings[back], f"1 {name} from 2 {first}") for first, (name, back) in THERE_AND_BACK.items()]
    for how in FAILING:
        case = {"settings": ENGINES["torch"], "saves": [HALF, END], "last": END, "fails": how.partition(",")[0], "asynchronous": "," in how}
        yield case | {"name": f"fails {how}", "folder": str(folder / f"fails {how}")}
    for name, settings in TWO_RANKS.items():
        if name == "z1 fp16":
            yield from (back for back in returns if "fp16" not in back["name"])
        yield from pair(folder, 2, name, settings)
    yield from (back for back in returns if "fp16" in back["name"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[dict[int, Future[tuple[list[Results], list[str]]]]]:
    """What the ranks found and printed, of one rank and of two."""
    ops.ensure_ops(["cpu_adam"], lambda line: None)
    cases = {1: list(one_rank_cases(folder)), 2: list(two_rank_cases(folder))}
    for ranks in cases:
        (folder / f"{ranks}").mkdir()
    with ThreadPoolExecutor(2) as pool:
        yield {ranks: pool.submit(run_ranks, "checkpoint_worker.py", cases[ranks], folder / f"{ranks}", ranks, 280) for ranks in cases}


def resumed(folder: Path, both: dict[int, Future[tuple[list[Results], list[str]]]], ranks: int, name: str) -> None:
    """The resumed run is the uninterrupted one in every bit: losses, outputs, random numbers, and every tensor of the checkpoints."""
    results, outputs = both[ranks].result()
    assert not any(outputs), outputs
    for rank, found in enumerate(results):
        if "cpu_adam" in name and not found["cpu_adam"]:
            pytest.skip("DeepSpeed's CPU optimiser cannot be built here")
        whole, again = found[name], found[f"{name} resumed"]
        assert len(whole["losses"]) == END and whole["losses"][HALF:] == again["losses"]
        assert torch.equal(whole["evaluated"], again["evaluated"]) and torch.equal(whole["drawn"], again["drawn"])
        assert whole["state"].keys() == again["state"].keys()
        assert all(torch.equal(value, again["state"][key]) for key, value in whole["state"].items())
        assert whole["loss_scale"] == again["loss_scale"]
        for step in (HALF, END):
            first, second = (open_checkpoint(folder / f"{ranks} {run}" / f"step-{step:08d}") for run in (name, f"{name} resumed"))
            assert {key: first.manifest[key] for key in ("optimizer_steps", "loss_scale", "progress", "tensors", "buffers")} == {
                key: second.manifest[key] for key in ("optimizer_steps", "loss_scale", "progress", "tensors", "buffers")
            }
            with TensorFile(first.path / rank_file(rank)) as one, TensorFile(second.path / rank_file(rank)) as other:
                assert list(one.entries) == list(other.entries)
                assert all(torch.equal(one.read(entry), other.read(entry)) for entry in one.entries)


@pytest.mark.parametrize("name", ONE_RANK)
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, both: dict[int, Any], name: str) -> None:
    resumed(folder, both, 1, name)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_a_resumed_run_is_the_uninterrupted_one_on_two_ranks(folder: Path, both: dict[int, Any], name: str) -> None:
    resumed(folder, both, 2, name)


def whole(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Weights and moments put together, and the ranks' average of running statistics."""
    with Fragments(checkpoint.path, checkpoint.manifest) as fragments:
        tensors = {f"{kind}/{name}": torch.full(shape, torch.nan) for name, shape in fragments.shapes.items() for kind in KINDS}
        for entry, tensor in tensors.items():
            kind, _, name = entry.partition("/")
            fragments.read_into(kind, name, 0, tensor.view(-1))
        return tensors | {f"buffer/{name}": fragments.averaged(name) for name in fragments.buffers}


@pytest.mark.parametrize("first", THERE_AND_BACK)
def test_two_ranks_to_one_and_back(folder: Path, both: dict[int, Any], first: str) -> None:
    """What is held after resuming is what was saved, bit for bit, whatever ZeRO stage; the losses are those of the uninterrupted run."""
    name, back = THERE_AND_BACK[first]
    here, there = f"{name} from 2 {first}", f"{back} from 1 {name} from 2 {first}"
    (one,), (two, two_1) = both[1].result()[0], both[2].result()[0]
    saved, on_one, on_two = (open_checkpoint(folder / run / f"step-{HALF:08d}") for run in (f"2 {first}", f"1 {here}", f"2 {there}"))
    assert (saved.ranks, on_one.ranks, on_two.ranks) == (2, 1, 2)
    expected = whole(saved)
    for found in (on_one, on_two):
        assert found.manifest["optimizer_steps"] == saved.manifest["optimizer_steps"] and found.manifest["loss_scale"] == saved.manifest["loss_scale"]
        held = whole(found)
        assert held.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in held.items())
    tolerance = 5e-3 if "fp16" in first else 1e-5
    if "batchnorm" not in first:  # whose statistics, and stochastic depth's numbers, are the rank's own
        for losses in (one[here]["losses"], two[there]["losses"]):
            assert losses == pytest.approx(two[first]["losses"][HALF:], rel=tolerance)
    assert two[there]["losses"] == two_1[there]["losses"] and torch.equal(two[there]["evaluated"], two_1[there]["evaluated"])
    assert any("saved on 2 ranks, this run has 1" in line for line in one[here]["said"])
    assert any("saved on 1 ranks, this run has 2" in line for line in two[there]["said"])
    assert not torch.equal(two[there]["drawn"], two_1[there]["drawn"])


def test_what_an_fp16_run_resumes_with_is_no_fresh_scale(folder: Path, both: dict[int, Any]) -> None:
    both[1].result(), both[2].result()
    stored = [open_checkpoint(folder / run / f"step-{HALF:08d}").manifest for run in ("1 z0 fp16", "1 z2 fp16", "1 torch fp16", "2 z1 fp16")]
    assert all(manifest["loss_scale"] != [65536.0, 0] for manifest in stored)
    assert any(manifest["optimizer_steps"] < HALF for manifest in stored)


@pytest.mark.parametrize("how", FAILING)
def test_a_rank_that_cannot_write_leaves_no_other_waiting(folder: Path, both: dict[int, Any], how: str) -> None:
    """Even where it cannot say so: one warning, training goes on as if nothing had been saved, and the next save is good."""
    for found in (results := both[2].result()[0]):
        assert found[f"fails {how}"]["losses"] == found["torch"]["losses"]
    warned = [line for line in results[0][f"fails {how}"]["said"] if "not saved" in line]
    assert warned == [f"the checkpoint of step {HALF} was not saved: the file: No space left on device; training goes on, there is none yet"]
    assert [path.name for path in (folder / f"fails {how}").iterdir()] == [f"step-{END:08d}"]
    assert open_checkpoint(folder / f"fails {how}").ranks == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_find_the_same_checkpoint(both: dict[int, Any], ranks: int) -> None:
    for result in both[ranks].result()[0]:
        assert result["found"]["steps"] == [2, 1]
        (line,) = result["found"]["warned"]
        assert line.endswith(
            f"step-00000002 is damaged and is not used: rank-{ranks - 1}.safetensors was changed after it was written (its SHA-256 is another)"
        )
