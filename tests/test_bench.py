"""Benches: the arithmetic of their tables, processes that fail, and each of them once at tiny sizes."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepscale.bench import BENCHES, data, deep, gradflow, main, networks, nvme, plan, revolve, start, step, sweep, worker, zero3
from deepscale.bench.kept import kept_bytes
from deepscale.bench.report import Goal, Report, Row, number, ratio, write_json
from deepscale.data import beton
from deepscale.errors import MissingPackageError, UsageError
from deepscale.models.convnext import stack_blocks

Rows = dict[str, dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Rows]:
    """`bench("start", "--depth", "26")` runs a bench in this process; its rows of the JSON file, by what they are of."""

    def run(*arguments: str) -> Rows:
        file = tmp_path / "numbers.json"
        main([*arguments, "--json", str(file)])
        return {row["what"]: row for row in json.loads(file.read_text())["rows"]}

    return run


# ----------------------------------------------------------------------------------------------------------- arithmetic


def test_ratios_are_taken_round_by_round() -> None:
    """The machine is twice as slow in the second round: the ratio of each round does not see it, that of the medians would."""
    row = ratio("plain / stacked", [1.5, 3.0, 1.8], [1.0, 2.0, 1.0], Goal(1.3, at_least=True))
    assert row.values == pytest.approx((1.5, 1.5, 1.8))
    assert row.median == 1.5
    assert row.cells()[1:] == ["x", "1.5", "1.5", "1.8", "3", "at least 1.3", "1.15", "yes"]


@pytest.mark.parametrize(("goal", "value", "reached"), [(Goal(5), 5, True), (Goal(5), 5.01, False), (Goal(10, at_least=True), 9.9, False)])
def test_a_goal_is_a_limit_on_the_median(goal: Goal, value: float, reached: bool) -> None:
    row = Row("step", "s", (0.0, value, 100.0), goal)
    assert goal.reached(row.median) is reached
    assert row.as_json()["reached"] is reached
    assert row.as_json()["of_goal"] == pytest.approx(value / goal.limit)


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (0.012345, 1.2345, 123.45, 30013.0)] == ["0.0123", "1.23", "123", "30,013"]


def test_the_table_says_how_it_was_measured_and_which_sizes_are_not_the_goals() -> None:
    report = Report("start", ["--depth", "26"], {"depth": 26, "width": 8}, {"depth": 10_001, "width": 8}, {"CPU": "made up"})
    report.rows = [Row("initialize", "CPU s", (2.0,), Goal(5))]
    text = report.text()
    assert "| initialize | CPU s |      2 |" in text
    assert "command: deepscale bench start --depth 26" in text
    assert "not as the goals ask (in brackets): depth 26 (10001)" in text and "width 8 (8)" not in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text and "made up" in text


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], ", ".join(BENCHES)),
        (["speed"], f"'speed' is not known; possible: {', '.join(BENCHES)}"),
        (["start", "--depth", "3"], "depth"),
        (["start", "--rounds", "0"], "'0' is not a whole number from 1"),
        (["step", "--part", "none"], "invalid choice"),
        (["memory", "--time-limit", "soon"], "not a duration"),
        (["data", "--images", "100"], "--images 100 is less than 3 batches"),
        (["step", "--json", "no/such/folder/file.json"], "cannot be written"),
        (["step", "--json", "."], "it is a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        main(arguments)


def test_help_lists_the_benches(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "memory" in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "numbers.json").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_json(tmp_path / "numbers.json", {"n": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


# ------------------------------------------------------------------------------------------------------ failing processes

PROGRAMS = {
    "works": """
import json, os, sys
print("chatter")
print(json.dumps({"arguments": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"], "rank": os.environ.get("RANK")}))
""",
    "breaks": "print('on the way'); raise RuntimeError('the last straw')",
    "refuses": "import sys; sys.exit(print('deepscale: this needs the package x', file=sys.stderr) or 2)",
    "mumbles": "print('no JSON')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "sleeps": "import time; print('still here', flush=True); time.sleep(60)",
}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs one of PROGRAMS as a measuring process."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RANK", "3")

    def run(name: str, limit_s: float = 30.0) -> dict[str, Any]:
        (tmp_path / f"bench_{name}.py").write_text(PROGRAMS[name])
        return worker.run_worker(f"bench_{name}", {"batch_size": 8}, threads=2, limit_s=limit_s)

    return run


def test_a_process_gets_its_options_and_is_alone(program: Callable[..., dict[str, Any]]) -> None:
    assert program("works") == {"arguments": ["--batch-size", "8"], "threads": "2", "rank": None}


@pytest.mark.parametrize(
    ("name", "error", "parts"),
    [
        (
            "breaks",
            worker.BenchError,
            ["python -m bench_breaks --batch-size 8 ended with exit code 1", "  on the way", "RuntimeError: the last straw"],
        ),
        ("refuses", UsageError, ["this needs the package x"]),
        ("mumbles", worker.BenchError, ["printed no result in its last line", "  no JSON"]),
        ("killed", worker.BenchError, ["was killed by SIGKILL", "type smaller sizes", "it printed nothing"]),
        ("sleeps", worker.BenchError, ["did not end within 1 s; type a longer --time-limit", "still here"]),
    ],
)
def test_a_failing_process_gives_a_sentence(program: Callable[..., dict[str, Any]], name: str, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        program(name, limit_s=1.0 if name == "sleeps" else 30.0)
    for part in parts:
        assert part in str(raised.value)


# ----------------------------------------------------------------------------------------------------------- the benches


def test_start_compares_deep_and_shallow(bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    """From given timings: 10,001 layers take 2 s of their own in the first round and 3 in the second, the others 0.5."""
    asked: list[int] = []

    def run(module: str, options: Mapping[str, Any], *, threads: int, limit_s: float) -> dict[str, Any]:
        asked.append(options["depth"])
        deep_one = options["depth"] == 10_001
        return {"tensors": 551 if deep_one else 65, "late_cpu_s": 1.5, "start_cpu_s": (1.0 + (len(asked) + 2) // 3) if deep_one else 0.5}

    monkeypatch.setattr(start, "run_worker", run)
    rows = bench("start", "--rounds", "2", "--reference-depth", "110")
    assert asked == [10_001, 26, 110] * 2
    assert rows["initialize, 10,001 layers in stacks (551 tensors)"]["values"] == [3.5, 4.5]
    assert rows["10,001 layers / 26 layers"]["values"] == [1.75, 2.25]
    assert rows["10,001 layers / 26 layers"]["reached"] is True
    assert rows["10,001 layers in stacks, without what initialize imports"]["values"] == [2.0, 3.0]
    assert "initialize, 110 layers as separate modules (65 tensors)" in rows


SMALL_STEP = ("step", "--depth", "26", "--width", "4", "--batch-size", "2", "--rounds", "2", "--warm-up", "1", "--threads", "1")


def test_step_measures_one_network_four_ways(bench: Callable[..., Rows], capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(*SMALL_STEP, "--part", "compare")
    names = ("plain", "stacked", "recomputed", "stacked in torch's operators")
    plain, stacked, recomputed, operators = (rows[f"step, {name}: 26 layers, width 4, batch 2"]["values"] for name in names)
    for what, above, below in (
        ("plain / stacked: how much faster stacked is", plain, stacked),
        ("plain / recomputed: the same with recomputation", plain, recomputed),
        ("recomputed / stacked: what recomputation costs", recomputed, stacked),
        ("stacked in torch's operators / stacked: what the kernel gains", operators, stacked),
    ):
        assert rows[what]["values"] == pytest.approx([a / b for a, b in zip(above, below, strict=True)])
    note = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss of the last step"))
    losses = [float(part.split()[-1]) for part in note.partition(": ")[2].split(",")]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)


def test_step_compares_bf16_with_fp32(bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(step, "has_bf16", lambda: True)
    rows = bench(*SMALL_STEP, "--part", "low", "--low-width", "8", "--low-rounds", "1")
    full, low = (rows[f"step, {name}: 26 layers, width 8, batch 2"]["values"] for name in ("fp32", "bf16"))
    assert rows["fp32 / bf16: how much faster bf16 branches are"]["values"] == pytest.approx([full[0] / low[0]])
    monkeypatch.setattr(step, "has_bf16", lambda: False)
    assert bench(*SMALL_STEP, "--part", "low") == {}
    assert "bf16 is not measured" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_activations_measures_every_policy_and_its_formulas(kernel: str, bench: Callable[..., Rows], capsys: pytest.CaptureFixture[str]) -> None:
    """FLOPs and bytes are those of the formulas exactly, values those of keeping all; from policy to policy fewer bytes and more FLOPs."""
    sizes = ["--depth", "26", "--width", "4", "--batch-size", "2", "--rounds", "2", "--warm-up", "0", "--segment", "2", "--threads", "1"]
    sizes += ["--kernel", kernel]
    rows = {what: row["median"] for what, row in bench("activations", *sizes).items()}
    for name in ("selective", "recompute", "offload"):
        assert rows[f"step, {name} / keep"] > 0
        assert rows[f"FLOPs, {name} / formula"] == rows[f"kept, {name} / formula"] == 1.0
        assert rows[f"loss, {name}: difference to keep"] == rows[f"gradients, {name}: largest difference to keep"] == 0.0
    assert 1 < rows["FLOPs, selective / keep"] < rows["FLOPs, recompute / keep"] == rows["FLOPs, offload / keep"] < 4 / 3
    assert 1 > rows["kept, selective / keep"] > rows["kept, recompute / keep"] == rows["kept, offload / keep"]
    note = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss after 2 steps"))
    assert len({part.split()[-1] for part in note.partition(": ")[2].split(",")}) == 1


def test_step_of_the_deep_network_comes_from_a_fresh_process(bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(module: str, options: Mapping[str, Any], *, threads: int, limit_s: float) -> dict[str, Any]:
        asked.update(options, limit_s=limit_s)
        return {"step_cpu_s": [4.0, 5.5, 4.5], "step_wall_s": [3.1, 3.6, 3.2]}

    monkeypatch.setattr(step, "run_worker", run)
    rows = bench("step", "--part", "deep", "--deep-steps", "3", "--deep-threads", "2", "--time-limit", "2m")
    assert (asked["depth"], asked["width"], asked["batch_size"], asked["zero"], asked["threads"], asked["steps"]) == (10_001, 8, 8, 2, 2, 3)
    assert asked["limit_s"] == 120
    row = rows["step, 10,001 layers, width 8, batch 8, recomputed, ZeRO 2, 2 threads"]
    assert (row["median"], row["reached"], row["of_goal"]) == (3.2, True, 0.8)
    assert rows["the same, of all threads together"]["median"] == 4.5


def test_memory_measures_fresh_processes(bench: Callable[..., Rows]) -> None:
    """Both programs for real, through DeepSpeed."""
    rows = bench("memory", "--depth", "26", "--batch-size", "2", "--kept-batch-size", "1")
    peak = rows["peak over the start, 26 layers, batch 2, ZeRO 2"]["median"]
    inner = rows["the same without what initialize imports"]["median"]
    assert 0.001 < inner < peak < 1.0
    kept, everything = (rows[f"kept by the forward pass, {how}, batch 1"]["median"] for how in ("recomputed", "nothing recomputed"))
    assert 0 < kept < everything
    assert rows["kept recomputed / kept without"]["median"] == pytest.approx(kept / everything)


def test_deep_is_given_only_numbers_it_understands() -> None:
    with pytest.raises(SystemExit) as ended:
        deep.main(["--depth", "many"])
    assert ended.value.code == 2


def test_data_counts_every_image_of_each_feed(bench: Callable[..., Rows]) -> None:
    rows = bench("data", "--feed", "tensors", "--images", "300", "--batch-size", "50", "--rounds", "2")
    pil, own = (rows[name]["values"] for name in ("torchvision, PIL and DataLoader", "deepscale, tensors in memory"))
    assert rows["torchvision / tensors"]["values"] == pytest.approx([a / b for a, b in zip(pil, own, strict=True)])
    assert min(pil) > 10  # no PIL image is cropped, flipped and normalised within 10 microseconds


def test_data_feeds_give_the_same_kind_of_batch() -> None:
    source = data._source(100)
    feeds = [data.PilFeed(source, 50), data.TrainFeed(source.train, source.info, micro_batch=50, seed=0, device=data.CPU)]
    (ours, ours_labels), (theirs, theirs_labels) = (next(iter(feed.epoch(0))) for feed in feeds)
    assert ours.shape == theirs.shape == (50, 3, 32, 32) and ours.dtype == theirs.dtype
    assert ours_labels.shape == theirs_labels.shape and ours_labels.dtype == theirs_labels.dtype
    torch.testing.assert_close(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=0.1, rtol=0)
    torch.testing.assert_close(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), atol=0.1, rtol=0)
    assert [data._read(feed, 1) for feed in feeds] == [100, 100]


def test_data_without_ffcv_measures_the_rest_and_says_so(
    bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise beton.FeedUnavailable("FFCV is not installed")

    monkeypatch.setattr(beton, "open_train_feed", refuse)
    sizes = ("--images", "60", "--batch-size", "20", "--rounds", "1")
    assert "torchvision / tensors" in bench("data", *sizes)
    assert "FFCV is not measured: FFCV is not installed" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--feed ffcv cannot be measured: FFCV is not installed"):
        bench("data", "--feed", "ffcv", *sizes)


@pytest.mark.parametrize("package", ["torchvision", "PIL"])
def test_data_without_a_package_names_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match="deepscale bench data needs the package"):
        main(["data", "--images", "60", "--batch-size", "20"])


def test_zero3_puts_what_is_gathered_beside_the_largest_stack(
    bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From given counts: DeepSpeed's own sizes gather all of eight stacks' worth, ours two and a half."""
    asked: list[Mapping[str, Any]] = []

    def run(module: str, options: Mapping[str, Any], *, ranks: int, threads: int, limit_s: float) -> dict[str, Any]:
        asked.append(options)
        gathered = {"auto": 250, "none": 100, "deepspeed": 800}[options["ahead"]]
        counts = {"stacks": 10, "total": 800, "largest": 100, "gathered": gathered, "together": 4, "alive": gathered - 20}
        losses = {"losses": [2.0, 1.002], "plain_losses": [2.0, 1.0]}
        return {**counts, **losses, "step_s": [9.0, 1.0, 2.0], "base_bytes": 10**9, "peak_bytes": 3 * 10**9}

    monkeypatch.setattr(zero3, "run_ranks", run)
    rows = bench("zero3", "--part", "gathered", "--gathered-depth", "110")
    assert [(options["depth"], options["activations"], options["ahead"]) for options in asked] == [(110, *case) for case in zero3.CASES]
    ours = rows["gathered at once on 2 ranks, 110 layers: keep, as ds_configs/"]
    assert (ours["median"], ours["reached"]) == (2.5, True)
    assert rows["alive of gathered memory: keep, as ds_configs/"]["median"] == 2.3
    assert rows["gathered at once on 2 ranks, 110 layers: recompute, DeepSpeed's own sizes"]["median"] == 8
    assert rows["a step: recompute, nothing ahead"]["median"] == 1.5
    assert rows["peak over the start: recompute, nothing ahead"]["median"] == 2
    assert "largest relative difference from plain torch on one: 2.0e-03" in capsys.readouterr().out


def test_nvme_puts_a_disk_beside_host_memory(bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every place in turn, on the disk that is named; losses that differ are said."""
    asked: list[dict[str, Any]] = []

    def run(module: str, options: dict[str, Any], **_: Any) -> dict[str, Any]:
        asked.append(options)
        far = {"none": 8, "cpu": 8, "nvme": 2}[options["offload"]] * 10**6
        return {"step_wall_s": [1.0, 2.0, 4.0], "losses": [2.0, 1.0 + (options["offload"] == "nvme")], "peak_bytes": far + 10**6, "base_bytes": 10**6}

    monkeypatch.setattr(nvme, "run_worker", run)
    page = tmp_path / "page.md"
    rows = bench("nvme", "--depth", "26", "--width", "64", "--rounds", "2", "--nvme-path", str(tmp_path), "--page", str(page))
    assert [options["offload"] for options in asked] == ["none", "cpu", "nvme"] * 2
    assert {str(Path(options["nvme_path"]).parent) for options in asked if options["offload"] == "nvme"} == {str(tmp_path)}
    assert rows["step, --offload nvme"]["values"] == [2.0, 2.0] and rows["peak over the start, --offload nvme"]["median"] == pytest.approx(0.002)
    assert 12 * 5.6 < 1000 * rows["on the disk, planned"]["median"] < 20 * 5.7  # MB, of 5.6 million parameters
    text = page.read_text()
    assert "are NOT the same" in text and all(f"| {what} " in text for what in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "page.md"]


def test_zero3_starts_every_stage(bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(module: str, options: Mapping[str, Any], *, threads: int, limit_s: float) -> dict[str, Any]:
        offloaded = options.get("offload") == "cpu"
        taken = {"start_cpu_s": 31.0 if offloaded else 2.0, "late_cpu_s": 1.5, "step_cpu_s": [5.0, 6.0], "blocks_cpu_s": [4.5, 5.25]}
        return {**taken, "losses": [2.0, 1.1 if offloaded else 1.0], "base_bytes": 0, "peak_bytes": 2 * 10**9}

    monkeypatch.setattr(zero3, "run_worker", run)
    rows = bench("zero3", "--part", "start", "--depth", "1004", "--rounds", "2")
    assert (rows["start, 1,004 layers, ZeRO 3"]["median"], rows["start, 1,004 layers, ZeRO 3"]["reached"]) == (3.5, True)
    assert rows["start, 1,004 layers, ZeRO 3, all offloaded"]["reached"] is False
    assert rows["step, 1,004 layers, plain torch"]["n"] == 4
    assert rows["of it beside the blocks' passes, ZeRO 1"]["values"] == [0.5, 0.75] * 2
    assert "largest relative difference from plain torch: 1.0e-01" in capsys.readouterr().out


RANKS_PROGRAM = """
import json, os, sys, time
if os.environ["RANK"] == sys.argv[2]:
    raise RuntimeError("rank " + os.environ["RANK"] + " cannot go on")
if sys.argv[2] != "-1":
    time.sleep(60)  # as a rank that waits for the other one
print(json.dumps({name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}))
"""


def test_ranks_are_one_world_and_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "bench_ranks.py").write_text(RANKS_PROGRAM)
    result = worker.run_ranks("bench_ranks", {"fails": -1}, ranks=2, threads=1, limit_s=30)
    assert result == {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(worker.BenchError, match=r"rank 1 of python -m bench_ranks --fails 1 ended with exit code 1(.|\n)*rank 1 cannot go on"):
        worker.run_ranks("bench_ranks", {"fails": 1}, ranks=2, threads=1, limit_s=30)
    with pytest.raises(worker.BenchError, match="did not end within 1 s; type a longer --time-limit"):
        worker.run_ranks("bench_ranks", {"fails": 7}, ranks=2, threads=1, limit_s=1)


# ---------------------------------------------------------------------------------------------------- counted activations


class Grown(nn.Module):
    """Makes three tensors of the size of x: of the product and the sum nothing is needed later, of the exponential its result."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.factor + 1).exp()


def test_kept_bytes_are_those_of_tensors_that_live_on() -> None:
    """Of three tensors of 4,000 bytes one; the batch and the parameter, which live on too, do not count."""
    assert kept_bytes(Grown(), torch.ones(1000)) == 4000


def test_recomputation_keeps_an_input_per_segment() -> None:
    """Segments of two blocks instead of one: the inputs of every second block of a stack, B * C * H * W floats, are gone."""
    images, _ = networks.random_batch(2)

    def kept(segment: int) -> int:
        return kept_bytes(networks.build(networks.configuration(depth=110, width=8, batch_size=2, segment=segment)), images)

    settings = networks.configuration(depth=110, width=8, batch_size=2)
    fewer = 0
    for stage, stacks in enumerate(stack_blocks(settings.model.stage_blocks, settings.engine.stack_size)):
        fewer += sum(n // 2 for n in stacks) * 2 * (8 * 2**stage) * (32 // 2**stage) ** 2 * 4
    assert kept(1) - kept(2) == fewer > 0
    assert kept(0) > 5 * kept(1)


def test_gradflow_measures_records_in_a_fresh_process(bench: Callable[..., Rows]) -> None:
    rows = bench("gradflow", "--depth", "26", "--rounds", "2", "--naive-rounds", "1", "--batch-size", "2")
    assert rows["step without a record, 26 layers"]["n"] == 2
    assert rows["a record of 37 layers' norms"]["median"] > 0
    assert rows["naive: safe_get_full_grad and a norm of 92 tensors"]["median"] > 0
    assert rows["memory of 200 records"]["median"] == pytest.approx(200 * 4 * (7 * 37 + 5 * 8) / 1e6)


def test_the_share_of_a_run_is_that_of_its_records() -> None:
    """Counted by hand: 30 steps have 13 records, of which those of steps 1, 16 and 30 count saturation."""
    assert gradflow._share(30, {"blocks": 1.0, "full": 3.0}) == pytest.approx((10 * 1.0 + 3 * 3.0) / 30)


def test_plan_sets_what_was_planned_beside_what_was_measured(bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From given measurements; a second call measures one case again and keeps the other."""
    found = {"planned_bytes": 9e8, "base_bytes": 1e9, "peak_bytes": 2e9, "planned_s": 1.2, "step_s": 1.0, "parameters": 1}
    asked: list[tuple[int, dict[str, Any]]] = []

    def run(module: str, options: Mapping[str, Any], *, ranks: int = 1, threads: int, limit_s: float) -> dict[str, Any]:
        asked.append((ranks, json.loads(options["settings"])))
        return dict(found)

    monkeypatch.setattr(plan, "run_worker", run)
    monkeypatch.setattr(plan, "run_ranks", run)
    last, pair = len(plan.CASES), max(number for number, case in enumerate(plan.CASES, 1) if case.ranks == 2)
    rows = bench("plan", "--only", f"2,{pair}")
    assert [ranks for ranks, _ in asked] == [1, 2] and asked[1][1]["zero"] == 3
    assert rows["growth: planned / measured is off 1 by at most, 2 cases"]["median"] == pytest.approx(0.1)
    assert rows["peak: planned / measured is off 1 by at most, 2 cases"]["median"] == pytest.approx(0.05)
    assert rows["step: cases within 25%"]["reached"] is True
    found["step_s"] = 0.9
    rows = bench("plan", "--only", "2")
    assert rows["step: planned / measured is off 1 by at most, 2 cases"]["median"] == pytest.approx(1 / 3)
    assert rows["step: cases within 25%"]["median"] == 0.5
    for only in ("0", f"{last + 1}", "x", ""):
        with pytest.raises(UsageError, match="type numbers from 1 to"):
            main(["plan", "--only", only])


def test_plan_measures_training_runs(bench: Callable[..., Rows]) -> None:
    """A real run, the smallest: the whole peak is mostly the process, and so is well known."""
    rows = bench("plan", "--only", "1")
    assert rows["peak: cases within 10%"]["reached"] is True


def test_bench_checkpoint_measures_and_leaves_nothing(bench: Callable[..., Rows], in_tmp_path: Path) -> None:
    rows = bench("checkpoint", "--depth", "26", "--batch-size", "2", "--rounds", "2")
    save, raw = (next(row for what, row in rows.items() if what.startswith(words)) for words in ("saving 26 layers /", "writing and syncing"))
    assert save["n"] == 2 and save["goal"] == "at most 3.0" and all(value > 0 for value in save["values"] + raw["values"])
    assert not [path for path in in_tmp_path.iterdir() if path.is_dir()]


def test_bench_sweep_sets_trials_beside_their_training(bench: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, in_tmp_path: Path) -> None:
    """Its arithmetic, on trials whose times are known: two at once take 33 s instead of 30, and 4 s pass between trials."""
    asked = []

    def run_sweep(folder: Path, name: str, training: list[str], concurrent: int, limit_s: float) -> list[sweep.Trial]:
        asked.append(concurrent)
        begun = time.time() + 9.0
        if concurrent == 2:
            return [sweep.Trial(begun, begun + 33.0, 21.0)] * 2
        return [sweep.Trial(begun, begun + 30.0, 20.0), sweep.Trial(begun + 34.0, begun + 64.0, 20.0)]

    monkeypatch.setattr(sweep, "run_sweep", run_sweep)
    rows = bench("sweep", "--rounds", "2")
    assert asked == [1, 2, 1, 2]
    median = {what.split(":")[0]: row["median"] for what, row in rows.items()}
    assert median["a trial beside its training"] == pytest.approx(14.0)
    assert median["each of two trials at once / one alone"] == pytest.approx(1.1)
    assert median["between the end of a trial and the start of the next"] == pytest.approx(4.0)
    assert median["from the command to the first trial, once a sweep"] == pytest.approx(9.0, abs=1.0)
    assert not [path for path in in_tmp_path.iterdir() if path.is_dir()]


def test_bench_sweep_says_why_a_sweep_failed(in_tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(worker.BenchError, match=r"--depth 14 --width 0 ended with exit code 2(.|\n)*--width"):
        sweep.run_sweep(in_tmp_path, "broken", {"depth": 14, "width": 0}, 1, 60.0)


def test_reversible_measures_bytes_time_and_errors(bench: Callable[..., Rows], tmp_path: Path) -> None:
    """Of 110 layers: what is kept is less than keeping all, reconstruction is exact, and the page holds every row."""
    page = tmp_path / "page.md"
    sizes = ("--depths", "110", "--batch-size", "2", "--rounds", "1", "--steps", "1", "--threads", "1", "--kernel", "torch")
    rows = {what: row["median"] for what, row in bench("reversible", *sizes, "--page", str(page)).items()}
    kept = {what.partition(" (")[0]: value for what, value in rows.items() if what.startswith("kept, ")}
    assert 3 * kept["kept, reversible"] < kept["kept, reversible, all kept"]
    errors = {what: value for what, value in rows.items() if what.startswith("error of gradients")}
    assert len(errors) == 4 and set(errors.values()) == {0.0}
    text = page.read_text()
    assert all(f"| {what} " in text for what in rows) and f"deepscale bench reversible {' '.join(sizes)}" in text
    page.unlink()
    main(["reversible", "--merge", str(tmp_path / "numbers.json"), "--page", str(page)])
    assert page.read_text() == text
    for arguments, sentence in (
        ([str(page), "--page", str(page)], "is no file of deepscale bench reversible"),
        ([str(page)], "type --page FILE, too"),
    ):
        with pytest.raises(UsageError, match=sentence):
            main(["reversible", "--merge", *arguments])


def test_revolve_measures_bytes_and_time(bench: Callable[..., Rows], tmp_path: Path) -> None:
    """Of 110 layers: fewer slots keep less and take more FLOPs, and the page holds every row and the formulas' tables."""
    page = tmp_path / "page.md"
    sizes = ("--depths", "110", "--batch-size", "2", "--rounds", "1", "--threads", "1", "--kernel", "torch")
    rows = {what: row["median"] for what, row in bench("revolve", *sizes, "--page", str(page)).items()}
    kept = [value for what, value in rows.items() if what.startswith("kept after forward")]
    assert kept[0] > kept[2] > kept[3]  # two levels, three runs
    flops = [value for what, value in rows.items() if what.startswith("FLOPs")]
    assert 1.0 < flops[1] < flops[2]
    text = page.read_text()
    assert all(f"| {what} " in text for what in rows) and f"deepscale bench revolve {' '.join(sizes)}" in text
    page.unlink()
    main(["revolve", "--merge", str(tmp_path / "numbers.json"), "--page", str(page)])
    assert page.read_text() == text
    with pytest.raises(UsageError, match="is no file of deepscale bench revolve"):
        main(["revolve", "--merge", str(page), "--page", str(page)])


def test_two_levels_grow_as_the_cube_root_of_depth() -> None:
    """By formula, from 10,001 to 1,000,000 layers: inputs of segments that are all kept grow as the square root at best."""
    table = [[float(cell.replace(",", "")) for cell in row] for row in revolve.growth(8, 64)[1:]]
    one, two = (math.log(table[3][i] / table[1][i], 100) for i in (3, 4))
    assert one == pytest.approx(1 / 2, abs=0.03) and two == pytest.approx(1 / 3, abs=0.03)
