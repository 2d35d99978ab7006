"""The GPU bench's parts on the CPU, at tiny sizes: what it checks, plans, measures and writes."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_imports import PROGRAM

from deepscale import engine_config
from deepscale.bench import gpu, gpu_check, gpu_device, gpu_network, gpu_trace, gpu_worker, main, networks
from deepscale.bench.gpu_cells import MEASURED, OUT_OF_MEMORY, SKIPPED, UNFIT, Cell, choose, planned, settings_from, settings_json
from deepscale.bench.gpu_report import GpuReport
from deepscale.bench.report import GB
from deepscale.bench.worker import BenchError
from deepscale.errors import UsageError
from deepscale.host_store import HostStore
from deepscale.machine import Machine
from deepscale.models.components import LayerStandardise
from deepscale.models.observe import BlockObserver
from deepscale.models.reference import PlainConvNeXt
from deepscale.models.stack import BlockStack
from deepscale.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
H200 = Machine("cuda", int(139e9), int(120e9), True, 1)
LIMITS = (24 * 10**9, None)
DEVICE = {"name": "made up", "total_bytes": 139e9, "free_bytes": 139e9, "host_bytes": 120e9, "bf16": True}
DEVICE |= {"matmul_bf16_flops": 6e14, "copy_bytes": 4e12}


# ---------------------------------------------------------------------------------------------------------------- command


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, in_tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch finds none here"):
        main(["gpu"])
    assert not list(in_tmp_path.iterdir())


def test_its_modules_need_torch_alone() -> None:
    """Nothing but torch and what comes with it is imported, not even DeepSpeed, by a process that runs a step in plain torch."""
    needed, waiting = set[str](), ["torch", "numpy"]
    while waiting:
        needed.add(name := waiting.pop())
        with suppress(PackageNotFoundError):
            found = {re.split(r"[\[<>=!~; (]", each)[0].lower() for each in requires(name) or [] if "extra ==" not in each}
            waiting += found - needed
    distributions = {module: {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} for module, owners in packages_distributions().items()}
    refused = [module for module, owners in distributions.items() if not owners & {re.sub(r"[-_.]+", "-", name) for name in needed | {"deepscale"}}]
    assert {"deepspeed", "mlflow", "rich", "psutil", "torchvision", "matplotlib"} <= set(refused) and not {"torch", "numpy"} & set(refused)
    settings = json.dumps(settings_json(gpu_check.small("cpu")))
    # torch's compiler, which its optimisers import, asks for many packages without needing them: it is asked before any is refused.
    program = "import torch._dynamo\n" + PROGRAM.rpartition("sys.exit(")[0] + "failed and sys.exit(str(failed))\n"
    program += f"from deepscale.bench import gpu_worker\ngpu_worker.main(['--task', 'step', '--settings', {settings!r}, '--seconds', '0'])\n"
    command = [sys.executable, "-c", program, ",".join(refused), "deepscale.bench.gpu"]
    done = subprocess.run(command, cwd=Path(gpu.__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step_s"] > 0


# ------------------------------------------------------------------------------------------------------------------ cells


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return choose(gpu.DEPTHS, gpu.WIDTHS, LIMITS, ["torch", "deepspeed"], H200, 64)


def test_the_deepest_network_within_the_limit_is_measured_first(cells: list[Cell]) -> None:
    """Its 2 billion parameters are 32 GB with their optimiser: that is offloaded within 24 GB, and not without the limit."""
    first, second = cells[:2]
    assert (first.depth, first.width, first.limit) == (10_001, 64, LIMITS[0])
    assert first.settings is not None and first.memory is not None
    assert first.settings.engine.offload == "cpu" and first.settings.engine.zero == 2 and first.settings.engine.activations != "keep"
    assert first.memory.device < 24e9 and first.memory.states_host > 24e9
    assert first.flops == pytest.approx(57e12, rel=0.05)
    assert (second.depth, second.limit, second.engine) == (10_001, None, "torch")
    widths = [cell.width for cell in cells if cell.first]
    assert widths[1:] == sorted(widths[1:])
    assert [cell.first for cell in cells] == sorted((cell.first for cell in cells), reverse=True)


def test_what_fits_nowhere_says_so_and_is_not_tried(cells: list[Cell]) -> None:
    """128 billion parameters are 512 GB of weights alone."""
    (wide,) = [cell for cell in cells if cell.depth == 10_001 and cell.width == 512 and cell.limit is None]
    assert wide.outcome == UNFIT and "GiB" in wide.why and wide.settings is None
    assert wide.cells(6e14)[:4] == ["10,001", "512", "none", UNFIT]


def test_a_choice_that_a_limit_does_not_change_is_measured_once(cells: list[Cell]) -> None:
    shallow = [cell for cell in cells if cell.depth == 26 and cell.engine == "torch"]
    assert [(cell.width, cell.limit) for cell in shallow] == [(width, LIMITS[0]) for width in gpu.WIDTHS]


def test_settings_travel_as_json(cells: list[Cell]) -> None:
    for cell in cells:
        if cell.settings is not None:
            assert settings_from(json.loads(json.dumps(settings_json(cell.settings)))) == cell.settings


# ---------------------------------------------------------------------------------------------------------------- network


def test_the_fast_fill_fills_as_initial_values_do() -> None:
    """Constants exactly, and random values of the same deviation; the shapes are those of the network that training builds."""
    settings = gpu_check.small("cpu", layerscale_init=1e-2)
    fast, true = gpu_network.build(settings, CPU), gpu_check.network(settings, ALONE)
    expected = dict(true.named_parameters())
    for name, parameter in fast.named_parameters():
        assert parameter.shape == expected[name].shape
        spread = float(expected[name].detach().std(correction=0))
        if spread > 0:
            assert float(parameter.detach().std()) == pytest.approx(spread, rel=0.5), name
        else:
            assert torch.equal(parameter, expected[name]), name


def test_the_fast_network_keeps_what_the_policy_says() -> None:
    for name, segment in (("keep", 0), ("recompute", 2)):
        model = gpu_network.build(gpu_check.small("cpu", **gpu_check.with_policy(name)), CPU)
        assert {module.keeping.segment for module in model.modules() if isinstance(module, BlockStack)} == {segment}


def test_a_limit_is_a_share_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GB, 96 * GB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share))
    for limit in (0, 24 * 10**9, 10**12):
        gpu_network.limit_memory(torch.device("cuda", 0), limit)
    assert asked == [0.25, 1.0]


# ------------------------------------------------------------------------------------------------------------------ checks


def test_checks_pass_here_with_room_to_spare() -> None:
    checks, broken = gpu_check.check_network(ALONE)
    assert not broken
    assert {"gradients, float32", "gradients, bf16 branches", "gradients, recompute, against keep"} <= {check.what for check in checks}
    for check in checks:
        assert 0 <= check.error < check.tolerance / 5, check


@pytest.mark.parametrize("part", ["backward", "record"])
def test_checks_see_a_wrong_kernel(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one in a thousand in the norm's backward, or in the gradients that the record sees."""
    if part == "backward":
        true = LayerStandardise.backward
        monkeypatch.setattr(LayerStandardise, "backward", lambda self, *given: true(self, *given) * 1.001)
    else:
        shown = BlockObserver.gradient
        monkeypatch.setattr(BlockObserver, "gradient", lambda self, i, g: shown(self, i, g * 1.001))
    wrong = {check.what.split(",")[0] for check in gpu_check.check_network(ALONE)[0] if not check.error <= check.tolerance}
    assert ("gradients" if part == "backward" else "record") in wrong


def test_a_policy_that_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are checked all the same, and nothing is wrong."""

    def fail(self: HostStore, x: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: no pinned memory\nmore of it")

    monkeypatch.setattr(HostStore, "put", fail)
    checks, broken = gpu_check.check_network(ALONE)
    assert broken == ["--activations offload does not run here: CUDA error: no pinned memory"]
    assert "gradients, recompute, against keep" in {check.what for check in checks} and not [c for c in checks if "offload" in c.what]


def test_the_plain_network_is_timed_beside_the_stacked() -> None:
    found = gpu_worker.run("plain", gpu_check.small("cpu", precision="bf16"), 0, 1.0)
    assert found["plain_s"] > 0 and found["stacked_s"] > 0


def test_the_reference_is_the_plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gpu_check.reference()
    assert all(gradient.dtype == torch.float64 for gradient in expected.gradients.values()) and len(expected.outputs) == 11
    plain = PlainConvNeXt(gpu_check.small("cpu").model).initialise(networks.SEED)
    assert set(expected.gradients) == {name for name, _ in plain.named_parameters()}


# ------------------------------------------------------------------------------------------------------------------- tasks


def test_a_step_is_measured_within_its_seconds() -> None:
    found = gpu_worker.run("step", gpu_check.small("cpu", precision="bf16"), 0, 0.0)
    assert len(found["steps_s"]) == 1 and found["step_s"] == found["steps_s"][0] > 0
    assert len(found["losses"]) == gpu_worker.WARM_UP + 1 and found["allocated_bytes"] > 0


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), torch.OutOfMemoryError("CUDA out of memory. Tried")],
)
def test_memory_that_runs_out_is_a_result(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> dict[str, Any]:
        raise error

    monkeypatch.setitem(gpu_worker.TASKS, "step", fail)
    found = gpu_worker.run("step", gpu_check.small("cpu"), 0, 1.0)
    assert found["outcome"] == OUT_OF_MEMORY and found["why"]


def test_other_errors_are_none_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(gpu_worker.TASKS, "step", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        gpu_worker.run("step", gpu_check.small("cpu"), 0, 1.0)


def test_the_device_and_its_operators_are_measured() -> None:
    found = gpu_device.describe(ALONE)
    assert found["matmul_bf16_flops"] > 0 and found["copy_bytes"] > 0 and found["launch_done_s"] >= found["launch_issued_s"] > 0
    table = gpu_device.operators(CPU, (2, 8, 4, 4))
    # On a CPU, torch has neither mixed precision in this kernel nor products of another precision than their factors'.
    assert {name for name, row in table.items() if "why" in row} <= {"its backward, bf16", "gradient of W1, float32 from the product"}
    assert all(row["done_us"] > 0 for row in table.values() if "why" not in row)


class Range(NamedTuple):
    start: float
    end: float


class Event(NamedTuple):
    name: str
    device_type: torch.profiler.profiler.DeviceType if hasattr(torch.profiler.profiler, "DeviceType") else Any  # type: ignore[valid-type]
    time_range: Range
    is_user_annotation: bool = False


def test_gaps_are_when_no_kernel_runs() -> None:
    """Two kernels overlap from 0 to 30 us, one runs from 50 to 60: of a step of 80 us the device is idle for half."""
    cuda, cpu = torch._C._autograd.DeviceType.CUDA, torch._C._autograd.DeviceType.CPU
    events = [Event("a", cuda, Range(0, 20)), Event("b", cuda, Range(10, 30)), Event("a", cuda, Range(50, 60)), Event("aten::mm", cpu, Range(0, 80))]
    events += [Event("Optimizer.step#AdamW.step", cuda, Range(0, 60)), Event("part", cuda, Range(0, 60), is_user_annotation=True)]
    found = gpu_trace.summary(gpu_trace.kernels_of(events), 2, 80e-6)
    assert (found["kernels"], found["kernels_per_block"]) == (3, 1.5)
    assert (found["busy_s"], found["gaps"]) == (pytest.approx(40e-6), pytest.approx(0.5))
    assert found["top"][0] == {"name": "a", "count": 2, "us": 30.0}


def test_a_step_is_profiled() -> None:
    found = gpu_worker.run("profile", gpu_check.small("cpu"), 0, 1.0)
    assert found["step_s"] > 0 and found["kernels"] == 0 and found["synchronisations"] == 0
    assert gpu_trace.profile(lambda: None, 1, CPU)["gaps"] == 1.0


def test_passes_that_a_graph_would_replay_give_the_same_gradients() -> None:
    passes = gpu_trace.Passes(gpu_check.small("cpu", precision="bf16"), ALONE)
    gradients = []
    for _ in range(2):
        passes()
        gradients.append([p.grad.clone() for p in passes.model.parameters() if p.grad is not None])
    assert gpu_trace.worst_difference(*gradients) == 0.0
    assert gpu_trace.worst_difference([torch.ones(2)], [torch.tensor([1.0, 2.0])]) == pytest.approx(0.5**0.5)


# ----------------------------------------------------------------------------------------------------------------- the run

Fake = Callable[[str, Mapping[str, Any], int, float], dict[str, Any]]


class Answers:
    """A measuring process that is made up: `answer` by task, a function of the settings or a result."""

    def __init__(self, **answer: Any) -> None:
        step = {"step_s": 0.5, "steps_s": [0.5], "allocated_bytes": 20e9, "reserved_bytes": 22e9}
        checks = {"checks": [("gradients", 1e-6, 1e-4)]}
        self.answer = {
            "device": DEVICE,
            "network": checks,
            "engines": checks,
            "step": step,
            "profile": {},
            "operators": {},
            "graph": {},
            "plain": {},
        } | answer
        self.asked: list[tuple[str, dict[str, Any], int]] = []

    def __call__(self, task: str, settings: Mapping[str, Any], limit: int, seconds: float) -> dict[str, Any]:
        self.asked.append((task, dict(settings), limit))
        answer = self.answer[task]
        result: dict[str, Any] = dict(answer(settings, limit) if callable(answer) else answer)
        return result


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., gpu.Bench]:
    """A run of the whole bench with processes that are made up, or in this process."""

    def make(measure: Fake, device: str = "cuda", time_limit: float = 480.0, **sizes: Any) -> gpu.Bench:
        sizes = {"depths": gpu.DEPTHS, "widths": gpu.WIDTHS, "limits": LIMITS, "batch_size": 64} | sizes
        values = argparse.Namespace(json=tmp_path / "gpu.json", time_limit=time_limit, **sizes)
        report = GpuReport("gpu", [], {"batch_size": sizes["batch_size"]}, {}, {"GPU": "made up"})
        return gpu.Bench(values, report, device, measure)

    return make


def written(run: gpu.Bench) -> dict[str, Any]:
    """The JSON file."""
    record: dict[str, Any] = json.loads(run.values.json.read_text())
    return record


def test_the_file_and_the_table_hold_every_cell(bench: Callable[..., gpu.Bench], capsys: pytest.CaptureFixture[str]) -> None:
    answers = Answers()
    run = bench(answers)
    run.run()
    record = written(run)
    tasks = [task for task, _, _ in answers.asked]
    assert tasks[:4] == ["device", "network", "engines", "step"]
    assert {"profile", "operators", "graph", "plain"} <= set(tasks)
    assert ["deepspeed_config" in settings for task, settings, _ in answers.asked if task == "step"].count(True) == 1
    assert record["traces"]["pinned"]["of"] == "10,001 layers, width 64, within 24 GB, " + record["cells"][0]["how"]
    assert answers.asked[3][2] == LIMITS[0] and answers.asked[3][1]["depth"] == 10_001
    shown = {(cell["layers"], cell["width"]) for cell in record["cells"]}
    assert shown == {(depth, width) for depth in gpu.DEPTHS for width in gpu.WIDTHS}
    first = record["cells"][0]
    assert (first["outcome"], first["step_s"], first["reserved_bytes"]) == (MEASURED, 0.5, 22e9)
    assert first["floor_s"] == pytest.approx(57e12 / 6e14, rel=0.05)
    (reserved,) = [row for row in record["rows"] if row["what"].startswith("reserved, 10,001 layers, width 64, within 24 GB")]
    assert reserved["reached"] is True
    assert {cell["outcome"] for cell in record["cells"]} == {MEASURED, UNFIT}
    table = run.values.json.with_suffix(".md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert "| 10,001 |    64 | 24 GB | ZeRO 2 offloaded, recompute by" in table.replace("| 64   ", "|    64")


def test_a_wrong_device_is_not_measured(bench: Callable[..., gpu.Bench]) -> None:
    answers = Answers(network={"checks": [("gradients, float32", 3e-3, 1e-4), ("loss", 0.0, 1e-4)]})
    run = bench(answers)
    with pytest.raises(BenchError, match=r"computes wrongly, so nothing is measured: gradients, float32: error 0.003, at most 0.0001 is right$"):
        run.run()
    assert [task for task, _, _ in answers.asked] == ["device", "network"]
    assert written(run)["checks"][0]["error"] == 3e-3


def test_an_error_that_is_no_number_is_wrong(bench: Callable[..., gpu.Bench]) -> None:
    with pytest.raises(BenchError, match="error nan"):
        bench(Answers(network={"checks": [("loss", float("nan"), 1e-4)]})).run()


def test_deepspeed_that_does_not_work_is_left_out_with_a_note(bench: Callable[..., gpu.Bench]) -> None:
    def fail(settings: object, limit: int) -> dict[str, Any]:
        raise BenchError("no nccl here")

    answers = Answers(engines=fail)
    run = bench(answers)
    run.run()
    assert all(settings["engine"] == "torch" for task, settings, _ in answers.asked if task == "step")
    assert "DeepSpeed's rows are left out: no nccl here" in written(run)["notes"]


def test_without_deepspeed_its_rows_are_left_out_with_a_note(bench: Callable[..., gpu.Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    answers = Answers()
    run = bench(answers)
    run.run()
    assert "engines" not in [task for task, _, _ in answers.asked]
    assert any("DeepSpeed is not installed" in note for note in written(run)["notes"])


def test_what_the_time_does_not_reach_is_listed_as_skipped(bench: Callable[..., gpu.Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes a minute: after the device, two checks and five others, eight minutes are over."""
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    answers = Answers()

    def slow(task: str, settings: Mapping[str, Any], limit: int, seconds: float) -> dict[str, Any]:
        clock[0] += 60.0
        return answers(task, settings, limit, seconds)

    run = bench(slow)
    run.run()
    assert clock[0] == 480.0
    outcomes = [cell["outcome"] for cell in written(run)["cells"]]
    assert outcomes[:4] == [MEASURED] * 4 and outcomes.count(SKIPPED) > 5 and set(outcomes) == {MEASURED, SKIPPED, UNFIT}
    assert written(run)["traces"]["graph deep"] == {"why": "the time was over"}


def test_a_killed_run_leaves_what_it_has(bench: Callable[..., gpu.Bench]) -> None:
    answers = Answers()

    def killed(task: str, settings: Mapping[str, Any], limit: int, seconds: float) -> dict[str, Any]:
        if sum(task == "step" for task, _, _ in answers.asked) == 2:
            raise KeyboardInterrupt
        return answers(task, settings, limit, seconds)

    run = bench(killed)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    outcomes = [cell["outcome"] for cell in written(run)["cells"]]
    assert outcomes[:3] == [MEASURED, MEASURED, "not reached"]


def test_a_row_that_fails_does_not_end_the_run(bench: Callable[..., gpu.Bench]) -> None:
    def step(settings: Mapping[str, Any], limit: int) -> dict[str, Any]:
        if settings.get("depth") == 1004:
            raise BenchError("python -m deepscale.bench.gpu_worker did not end within 120 s")
        return {"outcome": OUT_OF_MEMORY, "why": "CUDA out of memory. Tried"} if "depth" not in settings else {"step_s": 1.0, "steps_s": [1.0]}

    run = bench(Answers(step=step))
    run.run()
    found = {(cell["layers"], cell["width"], cell["outcome"]) for cell in written(run)["cells"]}
    assert {(1004, 64, "failed"), (26, 64, OUT_OF_MEMORY), (10_001, 64, MEASURED)} <= found


def test_what_zero_2_does_not_hold_is_tried_with_zero_3(bench: Callable[..., gpu.Bench]) -> None:
    def step(settings: Mapping[str, Any], limit: int) -> dict[str, Any]:
        return {"outcome": OUT_OF_MEMORY, "why": "CUDA out of memory"} if settings.get("zero") == 2 else {"step_s": 1.0, "steps_s": [1.0]}

    run = bench(Answers(step=step), depths=(10_001,), widths=(64,), limits=LIMITS[:1])
    run.run()
    assert [(cell["outcome"], cell["how"].split(",")[0]) for cell in written(run)["cells"]] == [
        (OUT_OF_MEMORY, "ZeRO 2 offloaded"),
        (MEASURED, "ZeRO 3 offloaded"),
    ]


def test_the_whole_bench_runs_here(bench: Callable[..., gpu.Bench]) -> None:
    """Every task for real on the CPU: what is plain torch in this process, the engines' check in one of its own, as on a GPU."""

    def here(task: str, settings: Mapping[str, Any], limit: int, seconds: float) -> dict[str, Any]:
        if task == "operators":
            return {}
        if task == "engines":
            return run.in_process(task, settings, limit, 0.0)
        if settings.get("engine") != "torch":
            return {"step_s": 1.0, "steps_s": [1.0]}
        result: dict[str, Any] = json.loads(json.dumps(gpu_worker.run(task, settings_from(dict(settings)), limit, 0.0)))
        return result

    run = bench(here, device="cpu", depths=(14,), widths=(4,), limits=(None,), batch_size=2)
    run.run()
    record = written(run)
    assert [(cell["engine"], cell["outcome"]) for cell in record["cells"]] == [("torch", MEASURED), ("deepspeed", MEASURED)]
    assert all(cell["step_s"] > 0 and cell["floor_s"] > 0 for cell in record["cells"])
    assert record["traces"]["graph"] == {"why": "CUDA only"}
    engines = [check for check in record["checks"] if "ZeRO 2" in check["what"]]
    assert len(engines) == 8 and sum("offloaded" in check["what"] for check in engines) == 4
    assert all(0 <= check["error"] < check["tolerance"] / 5 for check in engines)


def test_the_pinned_file_is_one_that_deepspeed_takes(tmp_path: Path) -> None:
    settings = gpu_check.small("cpu", engine="deepspeed", zero=2, offload="cpu", deepspeed_config=str(gpu.pinned_file(tmp_path)))
    resolved = engine_config.resolve(settings, 1, cpu_adam=False)
    engine_config.refuse_unknown(resolved, engine_config.path_of(settings))
    assert resolved["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_planning_does_not_change_what_was_asked() -> None:
    cell = planned(Cell(26, 64, None, "torch"), H200, 64)
    assert cell.settings is not None
    assert (cell.settings.model.width, cell.settings.data.batch_size, cell.settings.engine.precision) == (64, 64, "bf16")
    assert cell.name() == "26 layers, width 64, without a limit, torch, keep"
