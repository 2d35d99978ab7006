"""A network cut into stages against the same on one rank with plain torch: losses, gradients, records, evaluation, checkpoints, whole commands.

All cases run in pipeline_worker.py: two stages on two ranks; four stages, and two stages of two ranks each, on four.
"""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks

from deepscale import pipeline, world
from deepscale.config import Config, EngineConfig, parse
from deepscale.errors import UsageError
from deepscale.gradflow.flow import BLOCK_FIELDS, LAYER_FIELDS
from deepscale.models.convnext import ConvNeXt
from deepscale.world import World

pytest.importorskip("deepspeed")
import pipeline_worker

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
TINY = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "16", "--eval-images", "20",
    "--threads", "1", "--device", "cpu", "--kernel", "torch", "--lr", "0.01", "--layerscale-init", "1", "--precision", "fp32", "--zero", "0",
    "--accumulation", "4", "--clip", "0", "--max-steps", "6", "--eval-every", "3", "--record-every", "2",
]  # fmt: skip
KEPT = ["--checkpoint-dir", "kept", "--resume", "auto"]
PLAIN: dict[str, Any] = {"engine": "torch"}
# Of two ranks, bit for bit; of four, which round sums otherwise where two share out the images.
EQUAL: dict[str, dict[str, Any]] = {
    "z0": {},
    "z1 recomputed": {"zero": 1, "activations": "recompute", "segment": 1, "accumulation": 2},
    "z0 offloaded": {"activations": "offload", "segment": 2},
}
CLIPPED: dict[str, dict[str, Any]] = {"z0": {"clip": 0.1}, "z1": {"zero": 1, "clip": 0.1}}
Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    """The same cases on one rank with plain torch, which also saves and resumes what two stages have saved."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as every rank: more add sums up in another order
    cases = {f"equal {name}": own for name, own in EQUAL.items()} | {f"clipped {name}": own for name, own in CLIPPED.items()}
    found = {name: pipeline_worker.run({"stages": 1, "settings": own | PLAIN | {"zero": 0}}, ALONE) for name, own in cases.items()}
    pipeline_worker.run({"stages": 1, "settings": PLAIN, "folder": str(folder / "alone")}, ALONE)
    torch.set_num_threads(before)
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path, alone: Results) -> dict[int, list[Results]]:
    """Results of every rank of two and of four."""
    two = [{"name": f"equal {name}", "stages": 2, "settings": own} for name, own in EQUAL.items()]
    two += [{"name": f"clipped {name}", "stages": 2, "settings": own} for name, own in CLIPPED.items()]
    two += [{"name": "saves", "stages": 2, "settings": {"zero": 1}, "folder": str(folder / "two")}]
    two += [{"name": f"from {name}", "stages": 2, "settings": {"zero": 1}, "from": str(folder / name)} for name in ("two", "alone")]
    whole = {"name": "whole", "stages": 2, "folder": str(folder / "whole"), "arguments": [*TINY, "--pipeline-stages", "2"]}
    cut = {"name": "cut off", "stages": 2, "folder": str(folder / "parts"), "arguments": [*whole["arguments"], *KEPT], "ask": 3}
    two += [whole, cut, {"name": "rest", "stages": 2, "folder": str(folder / "parts"), "arguments": [*KEPT, "--pipeline-stages", "2"]}]
    two += [{"name": "bf16", "stages": 2, "settings": {"precision": "bf16"}}]  # last: it leaves a global flag behind
    four = [
        {"name": "four", "stages": 4, "settings": {}},
        {"name": "two of two z0", "stages": 2, "settings": {"clip": 0.1}},
        {"name": "two of two z1", "stages": 2, "settings": {"zero": 1, "clip": 0.1}, "folder": str(folder / "four")},
    ]
    (folder / "2").mkdir()
    (folder / "4").mkdir()
    with ThreadPoolExecutor(2) as pool:
        pair = pool.submit(run_ranks, "pipeline_worker.py", two, folder / "2", 2, 200)
        return {4: run_ranks("pipeline_worker.py", four, folder / "4", 4, 200)[0], 2: pair.result()[0]}


def differences(found: Results, expected: Results) -> tuple[float, float]:
    """Largest absolute differences of the gradients that are here, and of the whole state at the end."""
    assert found["gradients"] and found["state"].keys() == expected["state"].keys()
    pairs = [(gradient, expected["gradients"][name]) for name, gradient in found["gradients"].items()]
    states = [(found["state"][name], value) for name, value in expected["state"].items()]
    return tuple(max((a - b).abs().max().item() for a, b in own) for own in (pairs, states))  # type: ignore[return-value]


@pytest.mark.parametrize("name", EQUAL)
def test_two_stages_equal_one_rank_bit_for_bit(ranks: dict[int, list[Results]], alone: Results, name: str) -> None:
    """Micro batches are added up in the same order, so all is equal: every loss, gradient, weight, record of every layer, and the evaluation."""
    expected = alone[f"equal {name}"]
    names = set[str]()
    for rank in ranks[2]:
        found = rank[f"equal {name}"]
        assert found["losses"] == expected["losses"] and found["evaluated"] == expected["evaluated"]
        assert differences(found, expected) == (0.0, 0.0)
        assert not names & found["gradients"].keys()
        names |= found["gradients"].keys()
        for field in (*LAYER_FIELDS, *BLOCK_FIELDS):
            assert np.array_equal(getattr(found["flow"], field), getattr(expected["flow"], field), equal_nan=True), field
    assert names == expected["gradients"].keys() and len(set(expected["losses"])) == pipeline_worker.STEPS


def test_a_rank_has_memory_for_its_own_stage_alone(ranks: dict[int, list[Results]], alone: Results) -> None:
    """Of 24,586 parameters; no two stages have the same one."""
    whole = sum(value.numel() for value in alone["equal z0"]["state"].values())
    assert whole == 24_586 == alone["equal z0"]["own"]
    for found, name in ((ranks[2], "equal z0"), (ranks[4], "four")):
        own = [rank[name]["own"] for rank in found]
        assert sum(own) == whole and min(own) > 0


def test_four_stages_equal_one_rank(ranks: dict[int, list[Results]], alone: Results) -> None:
    for rank in ranks[4]:
        assert rank["four"]["losses"] == alone["equal z0"]["losses"] and differences(rank["four"], alone["equal z0"]) == (0.0, 0.0)


@pytest.mark.parametrize("name", [*CLIPPED, "two of two z0", "two of two z1"])
def test_gradients_are_clipped_by_the_norm_of_all_stages(ranks: dict[int, list[Results]], alone: Results, name: str) -> None:
    """DeepSpeed 0.19.8 by itself takes the first stage's at ZeRO 0: then the last loss is 4e-4 of it away. Rounding alone gives below 1e-7."""
    stage = name[-2:]
    for rank in ranks[4] if "two" in name else ranks[2]:
        found = rank[name if "two" in name else f"clipped {stage}"]
        assert found["losses"] == pytest.approx(alone["clipped z0"]["losses"], rel=1e-6)
        assert max(differences(found, alone["clipped z0"])) < 1e-5
    assert alone["clipped z0"]["losses"] != alone["equal z0"]["losses"]


def test_a_checkpoint_goes_on_in_any_number_of_stages(folder: Path, ranks: dict[int, list[Results]], alone: Results) -> None:
    """Saved by two stages while training went on, by one rank, and by two stages of two ranks each; resumed by two stages and by one rank."""
    torch.set_num_threads(1)
    expected = alone["equal z0"]
    for name in ("from two", "from alone"):
        for rank in ranks[2]:
            assert rank[name]["losses"] == expected["losses"][pipeline_worker.HALF :] and differences(rank[name], expected) == (0.0, 0.0)
    found = pipeline_worker.run({"stages": 1, "settings": PLAIN, "from": str(folder / "two")}, ALONE)
    assert found["losses"] == expected["losses"][pipeline_worker.HALF :] and differences(found, expected) == (0.0, 0.0)
    found = pipeline_worker.run({"stages": 1, "settings": {**PLAIN, "clip": 0.1}, "from": str(folder / "four")}, ALONE)
    assert max(differences(found, alone["clipped z0"])) < 1e-5


def test_branches_in_bf16_come_close(ranks: dict[int, list[Results]], alone: Results) -> None:
    losses = ranks[2][0]["bf16"]["losses"]
    assert losses == pytest.approx(alone["equal z0"]["losses"], rel=0.02) and losses != alone["equal z0"]["losses"]


def test_a_run_that_was_cut_off_equals_one_that_was_not(ranks: dict[int, list[Results]]) -> None:
    """Whole commands: what the tracker is told, of losses, rates, gradients of all layers and evaluation."""
    whole, first, rest = (ranks[2][0][name] for name in ("whole", "cut off", "rest"))
    assert (whole["code"], first["code"], rest["code"]) == (0, 75, 0)
    assert list(first["metrics"]["train/loss"]) == [1, 2, 3] and list(rest["metrics"]["train/loss"]) == [4, 5, 6]
    curves = {curve for curve in whole["metrics"] if not curve.startswith("perf/")}
    assert {"train/loss", "train/lr", "val/loss", "test/accuracy", "grad/first_layer_mean_abs", "depth_last/signal_std"} <= curves
    for curve in curves:
        assert {**first["metrics"].get(curve, {}), **rest["metrics"].get(curve, {})} == whole["metrics"][curve], curve


# ----------------------------------------------------------------------------------------------------------- without ranks


def test_parts_one_after_the_other_are_the_network() -> None:
    config = Config().replace(depth=26, width=4, patch_size=4, layerscale_init=1.0)
    model = ConvNeXt(config.model, stack_size=2).initialise(0)
    x = images = torch.randn(3, 3, 32, 32)
    for part in model.parts():
        x = part(x)
    assert torch.equal(x, model(images))
    assert {id(p) for part in model.parts() for p in part.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("costs", "stages"), [([1, 5, 5, 1, 5, 5, 1], 2), ([10, 1, 1, 1], 3), ([1] * 9, 4), ([3, 1, 4, 1, 5, 9, 2, 6], 3), ([7], 1)])
def test_a_cut_is_within_a_part_of_the_best(costs: list[float], stages: int) -> None:
    """Against all cuts that there are."""
    edges = pipeline.cut(costs, stages)
    assert edges[0] == 0 and edges[-1] == len(costs) and edges == sorted(set(edges))
    worst = [
        max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *inner, len(costs))))
        for inner in itertools.combinations(range(1, len(costs)), stages - 1)
    ]
    assert max(sum(costs[a:b]) for a, b in itertools.pairwise(edges)) <= min(worst) + max(costs)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--engine torch", "--engine torch has no pipeline"),
        ("--zero 2", "DeepSpeed's pipeline has ZeRO stages 0 and 1.* --zero 2 was given: type --zero 1"),
        ("--zero 3", "--zero 3 was given: type --zero 1"),
        ("--zero 1 --offload cpu", "type --offload none"),
        ("--precision fp16", "type --precision bf16 or fp32"),
        ("--model mlp", "only --model convnext is cut into stages"),
        ("--skip reversible", "leave one of them out"),
        ("--norm batchnorm", "type --norm layernorm"),
        ("--freeze 2", "leave it out"),
        ("--activations revolve", "type --activations recompute"),
    ],
)
def test_what_is_not_possible_is_said(typed: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"^--pipeline-stages 2: .*{says}"):
        parse(["--pipeline-stages", "2", *typed.split()])
    parse(typed.split())


def test_stages_must_divide_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--pipeline-stages 2 needs a multiple of 2 ranks, and there is 1; type deepspeed --num_gpus 2"):
        world.join(EngineConfig(pipeline_stages=2, device="cpu"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"a multiple of 3 ranks, and there are 4; type deepspeed --num_gpus 6"):
        world.join(EngineConfig(pipeline_stages=3, device="cpu"))
    with pytest.raises(UsageError, match=r"--pipeline-stages 9 are more than the 5 parts"):
        pipeline.cut([1] * 5, 9)


def test_places_of_ranks_in_a_pipeline() -> None:
    """Two stages of three ranks each, as DeepSpeed's own topology counts them."""
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    topology = PipeDataParallelTopology(num_pp=2, num_dp=3)
    for rank in range(6):
        place = World(rank, 6, rank, 6, torch.device("cpu"), stages=2)
        assert (place.stage, place.data_rank) == (topology.get_coord(rank).pipe, topology.get_coord(rank).data) and place.data_size == 3
    assert (ALONE.stage, ALONE.data_rank, ALONE.data_size) == (0, 0, 1)
    assert dataclasses.replace(ALONE, rank=1, size=2).data_rank == 1
