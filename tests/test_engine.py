"""Plain torch and DeepSpeed's ZeRO 0, 1, 2, 3, on one rank and on two, against each other and against the unstacked reference.

All cases run in three processes at once (engine_worker.py): one rank, and two ranks with the same global batch. Networks of 14 layers, width 4,
patch 4, six steps of AdamW under OneCycle up to 1e-3, unless a test says otherwise.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks
from torch import Tensor

from deepscale import ops
from deepscale.config import ModelConfig
from deepscale.engine import LossScale
from deepscale.models.components import commit_running_statistics
from deepscale.models.convnext import ConvNeXt
from deepscale.models.naming import load_plain
from deepscale.models.reference import PlainConvNeXt

pytest.importorskip("deepspeed")
import engine_worker

ENGINES = ("torch", "z0", "z1", "z2", "z3")
STAGES = ENGINES[1:]
DIFFERENT = ("torch", "z2", "z3")  # what stands for the others where two ranks would take long: DDP, flat partitions, gathered parameters
NORMS = ("layernorm", "rmsnorm", "none")
Case = dict[str, Any]
Results = dict[str, Any]


def case(engine: str, what: str = "", steps: int = 6, cpu_adam: bool = False, **settings: Any) -> Case:
    """A case of engine_worker.py, named "ENGINE what". Gamma 1 lets every branch take part from the first step on; clipping is off."""
    own = {"engine": "torch"} if engine == "torch" else {"zero": int(engine[1])}
    return {"name": f"{engine} {what}", "steps": steps, "cpu_adam": cpu_adam, "settings": {"layerscale_init": 1.0, "clip": 0.0, **own, **settings}}


def plain(what: str, **settings: Any) -> Case:
    """The unstacked reference with its own written-out loop."""
    return {"name": f"plain {what}", "steps": 6, "plain": True, "settings": {"layerscale_init": 1.0, "clip": 0.0, **settings}}


POLICIES = ("selective", "recompute", "offload")


VGG = {"model": "vgg", "layerscale_init": "auto"}
# Other optimisers than AdamW, another network than ConvNeXt, and other blocks. Adam and SGD add the decay to the gradient.
OTHERS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "momentum": {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9},
    "vgg": {**VGG, "optimizer": "adam", "schedule": "cosine", "skip": "identity", "clip": 0.1, "sync_batchnorm": True},
    "reversible": {"skip": "reversible", "activations": "reconstruct", "width": 8, "clip": 0.1},
}


def one_rank_cases() -> Iterator[Case]:
    for norm in NORMS:
        yield plain(norm, norm=norm)
        for engine in ENGINES:
            yield case(engine, norm, norm=norm)
            yield case(engine, f"{norm} accumulated", norm=norm, accumulation=2)
    for engine in ENGINES:
        yield case(engine, "long", steps=20, lr=5e-3)
        for activations in POLICIES:
            yield case(engine, f"policy {activations}", activations=activations)
        yield case(engine, "clipped", clip=0.05)
        yield case(engine, "batchnorm", norm="batchnorm")
    yield plain("batchnorm", norm="batchnorm")
    yield plain("reversible", skip="reversible", width=8, clip=0.1)
    for activations in ("keep", *POLICIES):
        yield case("torch", f"batchnorm accumulated {activations}", norm="batchnorm", accumulation=2, activations=activations)
        yield case("z2", f"batchnorm {activations}", norm="batchnorm", activations=activations)
    for stage in ("z1", "z2", "z3"):
        yield case(stage, "offload", offload="cpu")
        yield case(stage, "offload cpu_adam", offload="cpu", cpu_adam=True)
    for engine in ENGINES:
        for name, settings in OTHERS.items():
            yield case(engine, name, **settings)
        yield case(engine, "vgg batchnorm", **VGG, norm="batchnorm")
    yield case("torch", "fp32", steps=20, layerscale_init=0.1)
    for precision in ("bf16", "fp16"):
        for engine in ENGINES:
            yield case(engine, precision, steps=20, layerscale_init=0.1, precision=precision)
    for engine in ENGINES:
        yield case(engine, "overflow", steps=12, clip=5.0, precision="fp16")


def two_rank_cases() -> Iterator[Case]:
    for engine in ENGINES:
        for norm in NORMS:
            yield case(engine, norm, norm=norm)
        yield case(engine, "accumulated clipped", accumulation=2, clip=0.05)
        yield case(engine, "synchronised keep", norm="batchnorm", sync_batchnorm=True)
    for engine in ENGINES:
        for name, settings in OTHERS.items():
            yield case(engine, name, **settings)
    for engine in DIFFERENT:
        yield case(engine, "synchronised recompute", norm="batchnorm", sync_batchnorm=True, activations="recompute")
        yield case(engine, "batchnorm", steps=1, norm="batchnorm")
    for engine in DIFFERENT:
        yield case(engine, "overflow", steps=12, clip=5.0, precision="fp16")


def silent_ranks(cases: Iterator[Case], folder: Path, ranks: int) -> list[Results]:
    """What each rank saved; none may have printed anything."""
    results, outputs = run_ranks("engine_worker.py", list(cases), folder, ranks, timeout_s=280)
    assert not any(outputs), "the engines are not silent:\n" + "\n".join(outputs)
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Future[list[Results]], Future[list[Results]]]]:
    """The results of one rank and of two, which run at the same time: where one rank computes, the other core is free."""
    ops.ensure_ops(["cpu_adam"], lambda line: None)
    with ThreadPoolExecutor(2) as pool:
        yield (
            pool.submit(silent_ranks, one_rank_cases(), tmp_path_factory.mktemp("one"), 1),
            pool.submit(silent_ranks, two_rank_cases(), tmp_path_factory.mktemp("two"), 2),
        )


@pytest.fixture(scope="module")
def one(both: tuple[Future[list[Results]], ...]) -> Results:
    return both[0].result()[0]


@pytest.fixture(scope="module")
def two(both: tuple[Future[list[Results]], ...]) -> list[Results]:
    return both[1].result()


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two sets of tensors over the norm of the second."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].double() - value.double()).square().sum()) for name, value in expected.items())
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The greatest difference of two elements."""
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items())


def assert_bit_equal(found: Results, expected: Results) -> None:
    """Losses, gradients of the first and the last step, and all weights."""
    assert found["losses"] == expected["losses"]
    for own, other in zip([*found["gradients"], found["state"]], [*expected["gradients"], expected["state"]], strict=True):
        assert own.keys() == other.keys()
        assert [name for name in own if not torch.equal(own[name], other[name])] == []
    assert torch.equal(found["evaluated"], expected["evaluated"])


# --------------------------------------------------------------------------------------------------------------- one rank


@pytest.mark.parametrize("name", [*OTHERS, "vgg batchnorm"])
def test_other_optimisers_and_networks_are_the_same_with_zero(one: Results, two: list[Results], name: str) -> None:
    """Every stage against plain torch on one rank: within 1e-6 of each weight, since ZeRO's flat tensors may round otherwise; and on two ranks."""
    expected = one[f"torch {name}"]
    assert len(set(expected["losses"])) == len(expected["losses"])
    for stage in STAGES:
        assert furthest(one[f"{stage} {name}"]["state"], expected["state"]) < 1e-6, stage
        assert one[f"{stage} {name}"]["losses"] == pytest.approx(expected["losses"], rel=1e-6), stage
    if name in OTHERS:
        for engine in ENGINES:
            for rank in two:
                assert furthest(rank[f"{engine} {name}"]["state"], expected["state"]) < 1e-5, engine


@pytest.mark.parametrize("accumulated", ["", " accumulated"])
@pytest.mark.parametrize("norm", NORMS)
def test_zero_stages_equal_plain_torch_in_every_bit(one: Results, norm: str, accumulated: str) -> None:
    for stage in STAGES:
        assert_bit_equal(one[f"{stage} {norm}{accumulated}"], one[f"torch {norm}{accumulated}"])
    first, *_, last = one[f"torch {norm}"]["losses"]
    assert first != last


@pytest.mark.parametrize("stage", STAGES)
def test_bit_equality_lasts(one: Results, stage: str) -> None:
    """20 steps at five times the rate: what rounds elsewhere in ZeRO's flat tensors would show (torch's fused AdamW does)."""
    assert_bit_equal(one[f"{stage} long"], one["torch long"])


@pytest.mark.parametrize("norm", [*NORMS, "batchnorm", "reversible"])
def test_the_torch_engine_equals_the_plain_network_with_torchs_own_adamw(one: Results, norm: str) -> None:
    found, expected = one[f"torch {norm}"], one[f"plain {norm}"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    # A bias before a BatchNorm has no gradient but rounding, of which AdamW makes whole steps; the norm takes them out again.
    without = ("bias", "running_mean") if norm == "batchnorm" else ()
    states = [{name: value for name, value in result["state"].items() if not name.endswith(without)} for result in (found, expected)]
    assert apart(*states) < 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_accumulated_micro_batches_equal_the_whole_batch(one: Results, norm: str) -> None:
    found, expected = one[f"torch {norm} accumulated"], one[f"torch {norm}"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert apart(found["gradients"][0], expected["gradients"][0]) < 1e-5
    assert furthest(found["state"], expected["state"]) < 1e-5  # one step of AdamW moves a weight by 1e-3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("activations", POLICIES)
def test_no_activation_policy_changes_a_bit(one: Results, engine: str, activations: str) -> None:
    """Losses, gradients and the state after six steps, against plain torch that keeps all."""
    assert_bit_equal(one[f"{engine} policy {activations}"], one["torch layernorm"])


def test_recomputation_and_accumulation_count_batchnorms_statistics_once(one: Results) -> None:
    """The whole state, running statistics included; that these are right is tested with the plain network above."""
    for activations in POLICIES:
        assert_bit_equal(one[f"torch batchnorm accumulated {activations}"], one["torch batchnorm accumulated keep"])
        assert_bit_equal(one[f"z2 batchnorm {activations}"], one["torch batchnorm"])
    for stage in STAGES:
        assert_bit_equal(one[f"{stage} batchnorm"], one["torch batchnorm"])


def test_clipping_is_the_same_everywhere_and_comes_after_the_gradients_are_read(one: Results) -> None:
    """Norms are summed in another order by each engine: rtol 1e-5 instead of equality."""
    reference, unclipped = one["torch clipped"], one["torch layernorm"]
    norm = sum(float(g.square().sum()) for g in unclipped["gradients"][0].values()) ** 0.5
    assert norm > 10 * 0.05
    assert max(abs(a - b) for a, b in zip(reference["losses"], unclipped["losses"], strict=True)) > 1e-4
    for engine in ENGINES:
        found = one[f"{engine} clipped"]
        assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert furthest(found["gradients"][0], unclipped["gradients"][0]) == 0
        assert furthest(found["state"], reference["state"]) < 1e-5


@pytest.mark.parametrize("stage", ["z1", "z2", "z3"])
def test_offload_with_torchs_adamw_changes_no_bit(one: Results, stage: str) -> None:
    found = one[f"{stage} offload"]
    assert found["settings"]["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert found["settings"]["zero_optimization"].get("offload_param") == ({"device": "cpu"} if stage == "z3" else None)
    assert found["optimizer"] == "AdamWInPieces"
    assert_bit_equal(found, one["torch layernorm"])


@pytest.mark.parametrize("stage", ["z1", "z2", "z3"])
def test_offload_with_deepspeeds_cpu_adam(one: Results, stage: str) -> None:
    """It rounds differently: losses within rtol 1e-5 of plain torch, weights within a hundredth of one step."""
    if not one["cpu_adam"]:
        missing = ops.missing_for_build()
        assert missing is not None, "cpu_adam was not built though everything it needs is here"
        pytest.skip(missing)
    found = one[f"{stage} offload cpu_adam"]
    assert found["optimizer"] == "DeepSpeedCPUAdam"
    assert found["losses"] == pytest.approx(one["torch layernorm"]["losses"], rel=1e-5)
    assert furthest(found["state"], one["torch layernorm"]["state"]) < 1e-5


# ---------------------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize(("precision", "band", "gradient_band"), [("bf16", 0.01, 0.02), ("fp16", 0.03, 0.005)])
def test_low_precision_stays_beside_float32(one: Results, precision: str, band: float, gradient_band: float) -> None:
    """Losses of 20 steps within `band` of float32; fp16 skips one step on the way. ZeRO's autocast gives what torch's own gives."""
    exact, reference = one["torch fp32"], one[f"torch {precision}"]
    for engine in ENGINES:
        found = one[f"{engine} {precision}"]
        assert found["dtypes"] == ["torch.float32"]
        assert {value.dtype for value in found["state"].values()} == {torch.float32}
        assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert found["losses"] == pytest.approx(exact["losses"], abs=band)
        assert found["losses"] != exact["losses"]
        # Unscaled: a forgotten loss scale would be a factor of 65,536.
        assert apart(found["gradients"][0], exact["gradients"][0]) < gradient_band
        assert apart(found["gradients"][0], reference["gradients"][0]) < 1e-6
        assert found["loss_scale"] == (2.0**15 if precision == "fp16" else 1.0)


def test_fp16_skips_the_step_that_overflows_and_lowers_the_scale(one: Results, two: list[Results]) -> None:
    """Clipping on, gradients of up to 5.7 scaled by 65,536: every engine does what torch's GradScaler does, on every rank.

    On two ranks the norm that clips is summed in another order, and fp16 makes 1e-3 of what float32 rounds: losses within 1e-3
    there. A step that one engine skips and another does not parts them by 0.01 and more.
    """
    for results, engines, band in ((one, ENGINES, 1e-6), (two[0], DIFFERENT, 1e-3), (two[1], DIFFERENT, 1e-3)):
        reference = results["torch overflow"]
        assert reference["loss_scale"] < 2.0**16
        for engine in engines:
            assert results[f"{engine} overflow"]["loss_scale"] == reference["loss_scale"]
            assert results[f"{engine} overflow"]["losses"] == pytest.approx(reference["losses"], abs=band)
    for engine in DIFFERENT:
        assert furthest(two[0][f"{engine} overflow"]["state"], two[1][f"{engine} overflow"]["state"]) == 0


def test_the_loss_scale_follows_torchs_rule() -> None:
    """Against GradScaler's own numbers: half on overflow, twice after 2,000 steps without."""

    class Optimizer:
        overflow, torch_autocast_gradscaler, scale = False, object(), 0.0

        def override_loss_scale(self, value: float) -> None:
            self.scale = value

    optimizer = Optimizer()
    scale, torchs = LossScale(optimizer), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight])
    for step in range(4100):
        optimizer.overflow = step in (3, 4, 1500)
        torchs.scale(weight * (float("inf") if optimizer.overflow else 0.0)).sum().backward()
        torchs.step(sgd)
        torchs.update()
        sgd.zero_grad()
        scale.update()
        assert optimizer.scale == scale.value == torchs.get_scale(), step
    assert optimizer.torch_autocast_gradscaler is None


# --------------------------------------------------------------------------------------------------------------- two ranks


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", NORMS)
def test_two_ranks_equal_one_with_the_same_global_batch(one: Results, two: list[Results], norm: str, engine: str) -> None:
    expected = one[f"torch {norm}"]
    for results in two:
        found = results[f"{engine} {norm}"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert apart(found["gradients"][0], expected["gradients"][0]) < 1e-5
        assert apart(found["gradients"][1], expected["gradients"][1]) < 1e-4  # after five steps of AdamW
        assert furthest(found["state"], expected["state"]) < 1e-5
        assert torch.allclose(found["evaluated"], expected["evaluated"], atol=1e-5)
    assert furthest(two[0][f"{engine} {norm}"]["state"], two[1][f"{engine} {norm}"]["state"]) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_accumulate_and_clip_as_one(one: Results, two: list[Results], engine: str) -> None:
    found, expected = two[0][f"{engine} accumulated clipped"], one["torch clipped"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert apart(found["gradients"][0], expected["gradients"][0]) < 1e-5
    assert furthest(found["state"], expected["state"]) < 1e-5


@pytest.mark.parametrize(("engine", "activations"), [*[(engine, "keep") for engine in ENGINES], *[(engine, "recompute") for engine in DIFFERENT]])
def test_synchronised_batchnorm_on_two_ranks_equals_one_rank(one: Results, two: list[Results], engine: str, activations: str) -> None:
    """Against the stacked network and the plain one, which see the whole batch."""
    found = two[0][f"{engine} synchronised {activations}"]
    for expected in (one["torch batchnorm"], one["plain batchnorm"]):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        variances = [{name: value for name, value in r["state"].items() if name.endswith("running_var")} for r in (found, expected)]
        assert len(variances[0]) == 9 and apart(*variances) < 1e-5
    assert apart(found["gradients"][0], one["torch batchnorm"]["gradients"][0]) < 1e-5


@pytest.mark.parametrize("engine", DIFFERENT)
def test_batchnorm_on_two_ranks_has_statistics_per_rank_that_are_averaged(two: list[Results], engine: str) -> None:
    """After one step: each rank's own statistics are the plain network's on that rank's images; evaluation sees the mean of both."""
    results = [rank[f"{engine} batchnorm"] for rank in two]
    settings = ModelConfig(depth=14, width=4, patch_size=4, norm="batchnorm", layerscale_init=1.0)
    images, _ = engine_worker.global_batch(0)
    for result, part in zip(results, images.chunk(2), strict=True):
        reference = PlainConvNeXt(settings).initialise(0)
        reference(part)
        commit_running_statistics(reference)
        stacked = ConvNeXt(settings, stack_size=2)
        load_plain(stacked, reference.state_dict())
        expected = {name: value for name, value in stacked.named_buffers() if "running" in name}
        assert apart(result["own_statistics"], expected) < 1e-6
    own = [result["own_statistics"] for result in results]
    assert apart(own[0], own[1]) > 1e-3
    mean = {name: (value + own[1][name]) / 2 for name, value in own[0].items()}
    for result in results:
        assert apart({name: result["state"][name] for name in mean}, mean) < 1e-6
    assert torch.equal(results[0]["evaluated"], results[1]["evaluated"])


def test_the_reports_of_the_engines_hold_the_resolved_settings(one: Results, two: list[Results]) -> None:
    assert one["torch layernorm"]["settings"] == {}
    for results, ranks in ((one, 1), (two[0], 2)):
        for stage in STAGES:
            settings = results[f"{stage} layernorm"]["settings"]
            assert '"auto"' not in json.dumps(settings)
            assert settings["gradient_clipping"] == 0.0
            assert settings["zero_optimization"]["stage"] == int(stage[1])
            assert settings["train_micro_batch_size_per_gpu"] == engine_worker.BATCH // ranks
