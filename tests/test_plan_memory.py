"""The planner's bytes, each term against what is counted where it can be counted; and what must hold between choices."""

import dataclasses
from typing import Any

import pytest
import torch

from deepscale.activations import policy_of
from deepscale.bench.kept import kept_bytes
from deepscale.bench.networks import configuration, random_batch
from deepscale.config import Config
from deepscale.engine import TorchEngine
from deepscale.machine import Machine
from deepscale.models.convnext import ConvNeXt, count_parameters, default_stack_size
from deepscale.plan_choices import Choice, at_depth, choose, deepest, placements, policies, preferred
from deepscale.plan_memory import Memory, fits, memory_of
from deepscale.plan_network import images_of, needs_of, stages_of
from deepscale.plan_revolve import scheduled
from deepscale.world import World

GIB = 2**30
GPU = Machine("cuda", 24 * GIB, 128 * GIB, True, 1)
REVERSIBLE = {"skip": "reversible", "activations": "reconstruct", "segment": None}
SHAPE = {"channels": 3, "image_size": 32, "classes": 10}


def settings(**values: Any) -> Config:
    """A configuration without any auto, of 1,004 layers."""
    wanted: dict[str, Any] = {"depth": 1004, "width": 16, "patch_size": 2, "batch_size": 16, "precision": "fp32", "engine": "deepspeed", "zero": 2}
    wanted |= {"offload": "none", "activations": "recompute", "segment": 4, "device": "cpu", "kernel": "torch", "eval_images": 8} | values
    found = Config().replace(**wanted)
    return found if found.engine.stack_size != "auto" else found.replace(stack_size=default_stack_size(found.model.stage_blocks))


def planned(ranks: int = 1, **values: Any) -> Memory:
    return memory_of(settings(**values), ranks, **SHAPE)


# -------------------------------------------------------------------------------------------------------------- counted terms


@pytest.mark.parametrize(
    "values",
    [{}, {"norm": "rmsnorm"}, {"norm": "none"}, {"norm": "batchnorm", "norm_scope": "blocks"}, {"layerscale_init": None}, REVERSIBLE],
    ids=str,
)
@pytest.mark.parametrize("depth", [14, 110])
def test_parameters_are_those_of_the_network(depth: int, values: dict[str, Any]) -> None:
    """By stage, in all, and as the planner says, against a network on the meta device."""
    own = settings(depth=depth, patch_size=4, **values)
    with torch.device("meta"):
        model = ConvNeXt(own.model, classes=7, channels=1)
    stages = stages_of(own, images_of(own, 1, 1, 32, 7))
    first = sum(p.numel() for p in [*model.stem.parameters(), *model.path[0].parameters()])
    assert [first, *(sum(p.numel() for p in stage.parameters()) for stage in model.path[1:])] == [stage.parameters for stage in stages]
    assert count_parameters(own.model, 7, 1) == memory_of(own, 1, 1, 32, 7).parameters == sum(p.numel() for p in model.parameters())


def test_states_of_plain_torch_are_those_that_exist() -> None:
    """Weights, gradients and AdamW's moments of a real network after a step, in bytes, but for the step counters."""
    own = settings(depth=26, width=8, engine="torch", zero=0)
    model = ConvNeXt(own.model).initialise(0)
    engine = TorchEngine(model, own, World(0, 1, 0, 1, torch.device("cpu")))
    engine.backward(engine.forward(torch.randn(4, 3, 32, 32)).sum(), last=True)
    weights, gradients = sum(p.nbytes for p in model.parameters()), sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    engine.step()
    moments = sum(value.nbytes for state in engine.optimizer.state.values() for value in state.values() if value.dim())
    states = memory_of(own, 1, **SHAPE).states
    assert (states.weights, states.gradients, states.optimizer) == (weights, gradients, moments)


@pytest.mark.parametrize(
    ("policy", "segment", "skip"),
    [
        ("keep", None, "identity"), ("selective", None, "identity"), ("recompute", 1, "identity"), ("recompute", 4, "identity"),
        ("keep", None, "reversible"), ("reconstruct", None, "reversible"),
    ],
)  # fmt: skip
def test_kept_bytes_are_those_that_live_on_after_a_forward_pass(policy: str, segment: int | None, skip: str) -> None:
    """Of a whole network, stem, downsamplings and head included; the head's own are not planned and below a thousandth."""
    own = configuration(depth=110, width=8, batch_size=4, engine="torch").replace(activations=policy, segment=segment, skip=skip)
    model = policy_of(own).apply(ConvNeXt(own.model, stack_size=own.engine.stack_size)).initialise(0)
    images, _ = random_batch(4)
    kept = sum(need.kept for need in needs_of(own, stages_of(own, images_of(own, 1, **SHAPE)), images_of(own, 1, **SHAPE)))
    assert kept - images.nbytes == pytest.approx(kept_bytes(model, images), rel=2e-3)


def test_what_is_kept_of_reversible_blocks_does_not_depend_on_the_depth() -> None:
    assert planned(**REVERSIBLE).kept == planned(depth=10_001, **REVERSIBLE).kept < planned(depth=10_001).kept / 10


# -------------------------------------------------------------------------------------------------------- ranks and stages


def test_ranks_share_what_a_stage_cuts_up() -> None:
    for stage, shared in ((1, {"optimizer"}), (2, {"optimizer"}), (3, {"optimizer", "weights"})):
        alone, many = (dataclasses.asdict(planned(ranks, zero=stage, batch_size=64).states) for ranks in (1, 8))
        for name in ("weights", "optimizer"):
            assert many[name] == pytest.approx(alone[name] / (8 if name in shared else 1), rel=1e-4), (stage, name)


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_higher_stage_takes_less_on_a_gpu(ranks: int) -> None:
    """Beside the whole parameters that ZeRO-3 gathers for a moment, of a network in which these are few."""
    peaks = [planned(ranks, zero=stage, device="cuda", depth=10_001, batch_size=64).device for stage in (1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3


def test_offload_moves_states_to_the_host() -> None:
    here, away = (planned(device="cuda", offload=offload) for offload in ("none", "cpu"))
    assert here.host == 0 and away.host >= here.states.optimizer
    assert away.device < here.device
    both = planned(device="cuda", zero=3, offload="cpu")
    assert both.states.weights == 0 and both.states.weights_host == both.parameters * 4


def test_a_file_that_offloads_the_optimiser_alone_is_planned_so(tmp_path: Any) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}')
    found = planned(zero=3, offload="cpu", deepspeed_config=str(file), device="cuda").states
    assert found.weights > 0 and found.weights_host == 0 and found.optimizer_host > 0


@pytest.mark.parametrize("grown", [{"width": 32}, {"batch_size": 32}, {"depth": 2000}, {"patch_size": 1}, {"activations": "keep", "segment": None}])
def test_more_takes_more(grown: dict[str, Any]) -> None:
    assert planned(**grown).total > planned().total


def test_policies_keep_less_and_less() -> None:
    policies = (("keep", None), ("selective", None), ("recompute", 4), ("revolve", 4), ("offload", 4))
    kept = [planned(activations=name, segment=segment, device="cuda").kept for name, segment in policies]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 5


# -------------------------------------------------------------------------------------------------------------------- choices


def test_what_is_preferred_is_the_fastest_first() -> None:
    own = Config().replace(depth=1004, width=64, patch_size=1, batch_size=64)
    alone = preferred(own, GPU)
    assert alone[0] == Choice(0, "none", "keep", None)
    assert {(choice.zero, choice.offload) for choice in alone} == {(0, "none"), (2, "cpu"), (3, "cpu")}
    assert [choice.offload for choice in alone] == sorted((choice.offload for choice in alone), reverse=True)
    several = preferred(own, dataclasses.replace(GPU, ranks=4))
    assert several[0].zero == 1 and {choice.zero for choice in several} == {1, 2, 3}
    on_cpu = preferred(own, Machine("cpu", GIB, GIB, False, 1))
    assert {(choice.zero, choice.offload) for choice in on_cpu} == {(0, "none")} and {choice.activations for choice in on_cpu} == {
        "keep", "selective", "recompute", "revolve",
    }  # fmt: skip


@pytest.mark.parametrize(
    "given", [{"zero": 3}, {"offload": "cpu"}, {"activations": "selective"}, {"segment": 7}, {"segment": None}, {"engine": "torch"}], ids=str
)
def test_what_is_given_by_hand_stands_alone(given: dict[str, Any]) -> None:
    own = Config().replace(depth=1004, **given)
    found = [Choice(*place, *policy) for place in placements(own) for policy in policies(own)]
    assert found
    for choice in found:
        values = dataclasses.asdict(choice)
        assert all(
            values[name] == value for name, value in given.items() if name in values and not (name == "segment" and choice.activations == "keep")
        )


@pytest.mark.parametrize("place", [(0, "none"), (2, "cpu"), (3, "cpu")])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_one_block_more_than_the_deepest_does_not_fit(place: tuple[int, str], policy: str) -> None:
    own = Config().replace(width=64, patch_size=1, batch_size=64, precision="bf16", device="cuda", kernel="torch", layerscale_init=0.0)
    found = deepest(own, place, policy, GPU, **SHAPE)
    assert found is not None and 1000 < found < 100_000

    def possible(depth: int) -> bool:
        deep = at_depth(own, depth)
        return any(fits(memory_of(Choice(*place, *own).apply(deep), 1, **SHAPE), GPU) for own in policies(deep) if own[0] == policy)

    assert possible(found) and not possible(found + 1)


def test_where_not_even_fourteen_layers_fit_there_is_no_depth() -> None:
    own = Config().replace(width=512, patch_size=1, batch_size=64, precision="bf16", device="cuda", kernel="torch", layerscale_init=0.0)
    assert deepest(own, (0, "none"), "keep", dataclasses.replace(GPU, device_bytes=2**20), **SHAPE) is None


def test_the_choice_that_is_taken_is_the_first_that_fits() -> None:
    own = settings().replace(zero="auto", offload="auto", activations="auto", segment="auto", device="cuda", width=64, patch_size=1, batch_size=64)
    for gib in (24, 8, 5, 3):
        machine = dataclasses.replace(GPU, device_bytes=int(gib * GIB))
        options = [scheduled(choice.apply(own), machine, **SHAPE) for choice in preferred(own, machine)]
        expected = next(option for option in options if fits(memory_of(option, 1, **SHAPE), machine))
        assert choose(own, machine, **SHAPE) == expected
