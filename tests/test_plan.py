"""The planner: every auto resolved, what is given by hand kept, and what does not fit refused with what does.

Machines are made up (a `Machine` is four numbers): CPU_16GIB and the like stand for what is free, FAKE_GPU_24GIB for a GPU that no test needs.
Times come from `cost_model`, a number per floating point operation, but for the one test that measures.
"""

import dataclasses
import itertools
import time
from typing import Any

import pytest
import torch

from deepscale import memory, plan
from deepscale.config import AUTO, Config, flat
from deepscale.depth import MAX_DEPTH
from deepscale.engine import TorchEngine
from deepscale.errors import UsageError
from deepscale.machine import Machine, measure_machine
from deepscale.models.convnext import ConvNeXt, count_parameters
from deepscale.plan import Plan
from deepscale.plan_choices import FAST_SEGMENT
from deepscale.plan_network import Images, flops_of
from deepscale.world import World

GIB = 2**30
CPU_16GIB = Machine("cpu", 16 * GIB, 16 * GIB, False, 1)
FAKE_GPU_24GIB = Machine("cuda", 24 * GIB, 64 * GIB, True, 1)
FAKE_OLD_GPU_24GIB = dataclasses.replace(FAKE_GPU_24GIB, bf16=False)
SIZES = ("width", "patch_size", "batch_size")
# What the planner leaves to others, who record it: data set and feed (their name), validations (the length of an epoch).
LEFT_OPEN = {"dataset", "image_size", "feed", "eval_images", "eval_every", "record_every", "async_save"}


@dataclasses.dataclass(frozen=True)
class Alone(World):
    """A rank of several that agrees with itself, where no process group is."""

    def agree(self, value: Any) -> Any:
        return value


def resolve(machine: Machine = CPU_16GIB, image_size: int = 32, classes: int = 10, channels: int = 3, **settings: Any) -> Plan:
    world = Alone(0, machine.ranks, 0, machine.ranks, torch.device(machine.device))
    return plan.resolve(Config().replace(**settings), world, machine, channels=channels, image_size=image_size, classes=classes)


def sizes(found: Plan) -> tuple[Any, ...]:
    return tuple(flat(found.config)[name] for name in SIZES)


def cost_model(config: Config, world: World, images: Images) -> float:
    """Seconds of a step on a machine of 1 GFLOP/s."""
    return flops_of(config, world.size, images.channels, images.side, images.classes).total / 1e9


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a second; nothing is skipped as impossible on any machine."""
    monkeypatch.setattr(plan, "measure_step_s", lambda config, world, images: 1.0)
    monkeypatch.setattr(plan, "CORE_FLOPS", float("inf"))


# ------------------------------------------------------------------------------------------------------- every auto, by hand


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("machine", [CPU_16GIB, FAKE_GPU_24GIB], ids=["cpu", "gpu"])
@pytest.mark.parametrize("depth", [14, 1004, 10_000])
def test_every_auto_is_resolved_and_the_same_plan_comes_out_twice(machine: Machine, ranks: int, depth: int) -> None:
    machine = dataclasses.replace(machine, ranks=min(ranks, 4) if depth == 14 else ranks)  # 14 layers are 4 blocks
    found = resolve(machine, depth=depth)
    assert {name for name, value in flat(found.config).items() if value == AUTO} <= LEFT_OPEN
    assert resolve(machine, depth=depth) == found
    # Planning a plan changes nothing: what was resolved counts as given by hand.
    again = plan.resolve(found.config, Alone(0, machine.ranks, 0, 1, torch.device(machine.device)), machine, channels=3, image_size=32, classes=10)
    assert again.config == found.config
    assert found.config.model.depth == found.config.model.built_depth >= depth
    assert any(f"{found.config.model.built_depth:,} layers" in note for note in found.notes)
    assert found.memory.device <= 0.9 * machine.device_bytes


BY_HAND: list[dict[str, Any]] = [
    {"width": 24}, {"width": 512, "depth": 26}, {"patch_size": 2}, {"batch_size": 48}, {"width": 1, "batch_size": 2}, {"zero": 0}, {"zero": 1},
    {"zero": 2}, {"zero": 3}, {"zero": 2, "offload": "cpu"}, {"zero": 3, "offload": "cpu"}, {"offload": "none"}, {"precision": "fp16"},
    {"precision": "bf16"}, {"precision": "fp32"}, {"activations": "recompute"}, {"activations": "keep", "depth": 26}, {"stack_size": 3},
    {"workers": 5}, {"segment": 2, "activations": "recompute"}, {"segment": 7}, {"segment": None, "depth": 26}, {"threads": 3},
    {"layerscale_init": None}, {"layerscale_init": 1e-6}, {"blocks": (1, 2, 3, 4)}, {"engine": "torch"}, {"accumulation": 4, "batch_size": 8},
    {"lr": 0.5, "clip": 0.0}, {"skip": "reversible"}, {"skip": "reversible", "activations": "keep", "depth": 26},
]  # fmt: skip


@pytest.mark.parametrize("machine", [CPU_16GIB, FAKE_GPU_24GIB, dataclasses.replace(FAKE_GPU_24GIB, ranks=2)], ids=["cpu", "gpu", "2 gpus"])
@pytest.mark.parametrize("given", BY_HAND, ids=str)
def test_a_value_given_by_hand_is_kept(given: dict[str, Any], machine: Machine) -> None:
    found = flat(resolve(machine, **{"depth": 1004, **given}).config)
    assert {name: found[name] for name in given if name != "depth"} == {name: value for name, value in given.items() if name != "depth"}


def test_a_segment_given_by_hand_says_whether_blocks_are_recomputed() -> None:
    """With activations left open: a number means recompute, none that nothing is recomputed by blocks, even where the other would fit."""
    for segment, policy in ((3, "recompute"), (None, "keep"), (AUTO, "keep")):
        found = resolve(depth=26, segment=segment).config.engine
        assert (found.activations, found.segment) == (policy, segment if segment != AUTO else None)
    assert resolve(depth=26, activations="recompute").config.engine.segment == FAST_SEGMENT


def test_reversible_blocks_are_reconstructed_unless_told() -> None:
    """Even where everything could be kept."""
    for machine, depth in itertools.product((CPU_16GIB, FAKE_GPU_24GIB), (26, 10_000)):
        found = resolve(machine, depth=depth, skip="reversible").config.engine
        assert (found.activations, found.segment) == ("reconstruct", None)


def test_layerscale_is_resolved_from_the_skip() -> None:
    assert resolve(depth=26).config.model.layerscale_init == 0.0
    assert resolve(depth=26, skip="reversible").config.model.layerscale_init == 0.0
    assert resolve(depth=26, skip="none").config.model.layerscale_init is None


# ----------------------------------------------------------------------------------------------------------- what a GPU gets


def test_a_gpu_gets_the_published_width_whole_images_and_bf16() -> None:
    found = resolve(FAKE_GPU_24GIB, depth=1004)
    assert sizes(found) == (64, 1, 64)
    assert found.config.engine.precision == "bf16"
    assert found.step_s is None
    assert resolve(FAKE_OLD_GPU_24GIB, depth=1004).config.engine.precision == "fp32"
    assert resolve(CPU_16GIB, depth=26).config.engine.precision == "fp32"


def test_memory_is_given_up_in_the_order_of_what_it_costs_in_time() -> None:
    """On one GPU: keep activations, a part of them, none, offload; a smaller network only after all of these."""
    engines = []
    for gib in (24, 8, 4.5, 2.5, 1.2):
        found = resolve(dataclasses.replace(FAKE_GPU_24GIB, device_bytes=int(gib * GIB)), depth=1004)
        assert sizes(found) == (64, 1, 64)
        engines.append((found.config.engine.activations, found.config.engine.zero, found.config.engine.offload))
    plain, offloaded = [("keep", 0, "none"), ("selective", 0, "none"), ("recompute", 0, "none")], [("recompute", 2, "cpu"), ("recompute", 3, "cpu")]
    assert engines == plain + offloaded
    assert resolve(dataclasses.replace(FAKE_GPU_24GIB, device_bytes=GIB // 2), depth=1004).config.model.width == 32


def test_several_ranks_share_the_optimiser() -> None:
    found = resolve(dataclasses.replace(FAKE_GPU_24GIB, ranks=8), depth=1004)
    assert found.config.engine.zero >= 1
    alone, shared = (resolve(dataclasses.replace(FAKE_GPU_24GIB, ranks=r), depth=1004, zero=3, activations="recompute").memory for r in (1, 8))
    assert shared.states_device == pytest.approx(alone.states_device / 8, rel=1e-6)
    assert shared.parameters == alone.parameters


# ------------------------------------------------------------------------------------------------------------------ too large


def test_what_cannot_fit_is_refused_with_the_width_that_does() -> None:
    machine = Machine("cpu", 2 * GIB, 2 * GIB, False, 1)
    with pytest.raises(UsageError) as refused:
        resolve(machine, depth=10_000, width=512)
    sentence = str(refused.value)
    assert "10,001 layers at --width 512 need" in sentence and "2.0 GiB are free" in sentence and "\n" not in sentence
    fits = int(sentence.split("--width ")[-1].split()[0])
    assert resolve(machine, depth=10_000, width=fits).config.model.width == fits
    with pytest.raises(UsageError, match=f"--width {fits} fits"):
        resolve(machine, depth=10_000, width=2 * fits)


def test_what_fits_nowhere_says_so() -> None:
    with pytest.raises(UsageError, match=r"100,001 layers at --width 1 need .* MiB, .* nor is there a width that fits; .*smaller --depth"):
        resolve(Machine("cpu", GIB // 100, GIB // 100, False, 1), depth=100_000, width=1)


def test_offload_needs_room_on_the_host() -> None:
    machine = dataclasses.replace(FAKE_GPU_24GIB, host_bytes=GIB)
    with pytest.raises(UsageError, match=r"--width \d+ fits"):
        resolve(machine, depth=10_000, width=64, offload="cpu", zero=3)


def test_the_planned_states_are_those_that_exist() -> None:
    """Weights, gradients and AdamW's moments of a real network after a step, in bytes, but for the step counters."""
    found = resolve(depth=26, width=8, patch_size=4, batch_size=4, engine="torch")
    model = ConvNeXt(found.config.model).initialise(0)
    engine = TorchEngine(model, found.config, World(0, 1, 0, 1, torch.device("cpu")))
    engine.backward(engine.forward(torch.randn(4, 3, 32, 32)).sum(), last=True)
    held = sum(p.nbytes + p.grad.nbytes for p in model.parameters() if p.grad is not None)
    engine.step()
    held += sum(value.nbytes for state in engine.optimizer.state.values() for value in state.values() if value.dim())
    assert found.memory.states_device == held
    assert found.memory.parameters == count_parameters(found.config.model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("depth", [14, 26, 1004, 10_000, MAX_DEPTH])
def test_any_depth_is_planned_without_allocating_it(depth: int) -> None:
    """At width 64 and 1,000,000 layers the weights alone are 781 GB; planning may take 200 MB and 20 s."""
    base, begin = memory.reset_peak(torch.device("cpu")), time.process_time()
    machine = dataclasses.replace(FAKE_GPU_24GIB, device_bytes=100_000 * GIB, host_bytes=100_000 * GIB)
    found = resolve(machine, depth=depth)
    assert found.config.model.width == 64 and found.config.model.built_depth >= depth
    assert found.memory.parameters > (195e9 if depth == MAX_DEPTH else 1e6)
    assert memory.peak_bytes(torch.device("cpu")) - base < 200e6
    assert time.process_time() - begin < 20


# ----------------------------------------------------------------------------------------------------------------------- time

ORDER = [(64, 1, 64), (32, 1, 64), (16, 1, 64), (8, 1, 64), (8, 2, 64), (8, 4, 64), (8, 4, 32), (8, 4, 16), (8, 4, 8)]


@pytest.mark.parametrize("place", range(len(ORDER)))
def test_a_time_budget_lowers_width_then_patch_then_batch(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of 40 steps of the wanted size, and 1 % more, gets just that size."""
    monkeypatch.setattr(plan, "measure_step_s", cost_model)
    wanted = resolve(depth=26, **dict(zip(SIZES, ORDER[place], strict=True)))
    assert wanted.step_s is not None
    found = resolve(depth=26, time_budget=40 * 1.01 * wanted.step_s)
    assert sizes(found) == ORDER[place]
    assert found.step_s == wanted.step_s
    assert any("limit" in note for note in found.notes)


def test_without_a_budget_a_step_may_take_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds_by_width(config: Config, world: World, images: Images) -> float:
        return 10.0 * int(config.model.width) / 32

    monkeypatch.setattr(plan, "measure_step_s", seconds_by_width)
    assert resolve(depth=26).config.model.width == 32
    assert resolve(depth=26, time_budget=200.0).config.model.width == 16
    assert resolve(depth=26, width=64).config.model.width == 64


def test_where_nothing_is_fast_enough_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure_step_s", cost_model)
    assert sizes(resolve(depth=10_000, time_budget=0.001)) == ORDER[-1]
    # A value given by hand stays even then.
    assert sizes(resolve(depth=1004, time_budget=0.001, width=64)) == (64, 4, 8)
    assert sizes(resolve(depth=1004, time_budget=0.001, width=64, patch_size=1, batch_size=64)) == (64, 1, 64)


def test_where_nothing_is_left_to_choose_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(plan, "measure_step_s", lambda config, world, images: measured.append(config) or 1.0)
    typed = {"depth": 26, "width": 8, "patch_size": 4, "batch_size": 8}
    found = resolve(**typed, threads=1)
    assert not measured and found.step_s is None
    assert "width 8, patch 4, batch 8" in found.notes
    assert resolve(**typed).step_s == 1.0 and measured, "threads are chosen by what a step takes"


def test_sizes_that_no_machine_could_run_in_time_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,001 layers of width 64 on whole images are some 1e15 operations: measuring one block of each stage would take minutes."""
    measured = []

    def measure(config: Config, world: World, images: Images) -> float:
        measured.append(1e9 * cost_model(config, world, images))
        return 100.0

    monkeypatch.setattr(plan, "measure_step_s", measure)
    monkeypatch.setattr(plan, "CORE_FLOPS", 150e9)
    resolve(Machine("cpu", 1000 * GIB, 1000 * GIB, False, 1), depth=10_000, threads=1)
    assert measured and max(measured) <= 10.0 * 150e9 * torch.get_num_threads()


# ------------------------------------------------------------------------------------------------------- what does not divide


@pytest.mark.parametrize(("ranks", "batch", "accumulation", "example"), [(2, 9, 1, 8), (3, 64, 1, 63), (4, 2, 1, 4), (2, 12, 4, 16), (1, 7, 2, 8)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(ranks: int, batch: int, accumulation: int, example: int) -> None:
    machine = dataclasses.replace(CPU_16GIB, ranks=ranks)
    given = {"depth": 26, "width": 8, "accumulation": accumulation}
    with pytest.raises(UsageError, match=rf"--batch-size {batch} does not divide over {ranks} ranks x {accumulation} micro.*--batch-size {example}"):
        resolve(machine, batch_size=batch, **given)
    assert resolve(machine, batch_size=example, **given).config.data.batch_size == example


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6, 7, 24, 100])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_open_batch_divides_over_any_number_of_ranks(ranks: int, accumulation: int) -> None:
    found = resolve(dataclasses.replace(FAKE_GPU_24GIB, ranks=ranks), depth=1004, accumulation=accumulation)
    batch = int(found.config.data.batch_size)
    assert batch % (ranks * accumulation) == 0
    assert abs(batch - 64) <= ranks * accumulation / 2 or batch == ranks * accumulation


@pytest.mark.parametrize(("image_size", "patch", "largest"), [(32, 5, 4), (28, 4, 3), (64, 9, 8), (32, 1000, 4)])
def test_a_patch_too_large_is_refused_with_the_largest_possible(image_size: int, patch: int, largest: int) -> None:
    with pytest.raises(UsageError, match=rf"--patch-size {patch} leaves nothing of {image_size} pixels.*1 to {largest}"):
        resolve(image_size=image_size, depth=26, patch_size=patch)
    assert resolve(image_size=image_size, depth=26, patch_size=largest).config.model.patch_size == largest


def test_images_too_small_for_three_halvings_are_refused() -> None:
    with pytest.raises(UsageError, match=r"images of 7 pixels are too small.*from 8 pixels"):
        resolve(image_size=7, depth=26)
    assert resolve(image_size=8, depth=26).config.model.patch_size == 1


@pytest.mark.parametrize("given", [{"zero": 2}, {"offload": "cpu"}, {"deepspeed_config": "ds_configs/zero2.json"}])
def test_plain_torch_has_no_zero(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.chdir(pytestconfig.rootpath)
    with pytest.raises(UsageError, match="--engine torch has no ZeRO"):
        resolve(depth=26, engine="torch", **given)


def test_this_machine_has_memory() -> None:
    alone = measure_machine(World(0, 1, 0, 1, torch.device("cpu")))
    shared = measure_machine(World(0, 4, 0, 4, torch.device("cpu")))
    assert alone.device == "cpu" and alone.bf16 is False and alone.ranks == 1 and shared.ranks == 4
    assert 2**28 < alone.host_bytes < 2**50
    assert shared.host_bytes == pytest.approx(alone.host_bytes / 4, rel=0.2)


@pytest.mark.parametrize(("gain", "chosen"), [(1.8, 2), (1.4, 1), (0.2, 1)])
def test_threads_are_taken_where_they_pay(monkeypatch: pytest.MonkeyPatch, gain: float, chosen: int) -> None:
    """A cost model in which 2 threads are `gain` times faster than one: below 1.5x one thread is left to others, as on a busy machine."""
    monkeypatch.setattr(plan, "measure_step_s", lambda config, world, images: 1.0 if torch.get_num_threads() == 1 else 1.0 / gain)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = resolve(CPU_16GIB, depth=26)
        assert torch.get_num_threads() == 2  # measuring leaves them as they were
    finally:
        torch.set_num_threads(before)
    assert found.config.engine.threads == chosen
    assert found.step_s == pytest.approx(1.0 if chosen == 1 else 1.0 / gain)
    assert f"{chosen} thread" in " ".join(found.notes)
