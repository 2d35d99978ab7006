"""The deepest network within a limit: the search against a linear scan, the limit itself, and the bench once at tiny sizes."""

import json
import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepscale.bench import bracket, depth, limit, main, trial
from deepscale.bench.bracket import Trial, ends, search
from deepscale.bench.limit import OUT_OF_MEMORY, TOO_SLOW, TRAINED, run_within
from deepscale.bench.worker import BenchError
from deepscale.depth import MAX_DEPTH
from deepscale.errors import UsageError

LIMIT = 4_000_000
DEPTHS = range(14, 6_002, 3)


def network(deepest: int, noise: float = 0.0, failure: str = OUT_OF_MEMORY) -> Callable[[int], Trial]:
    """Trials that train up to `deepest` layers: memory grows to the limit there, give or take a share of noise that a depth always has."""

    def run(layers: int) -> Trial:
        peak = 700_000 + (LIMIT - 700_000) * layers / deepest
        peak *= 1 + noise * random.Random(layers).uniform(-1, 1)
        return Trial("made up", layers, TRAINED if layers <= deepest else failure, int(min(peak, LIMIT)), 0, 1.0)

    return run


def scan(run: Callable[[int], Trial]) -> int:
    """The plain reference: the deepest of all depths that trains, one after the other."""
    return max(layers for layers in DEPTHS if run(layers).outcome == TRAINED)


# ------------------------------------------------------------------------------------------------------------ the search


@settings(max_examples=40, deadline=None)
@given(st.integers(17, 5_000), st.floats(0.2, 8.0), st.sampled_from([0.0, 0.02]), st.sampled_from([0.02, 0.05, 0.2]))
def test_the_bracket_holds_what_a_linear_scan_finds(deepest: int, planned: float, noise: float, tolerance: float) -> None:
    """Whatever was planned, and with peaks that are no straight line. 16 trials are far below the thousands of the scan."""
    run = network(deepest, noise)
    trials = search(run, int(deepest * planned), LIMIT, tolerance)
    low, high = ends(trials)
    assert low is not None and high is not None
    assert low.layers <= scan(run) < high.layers
    assert high.layers <= max(low.layers * (1 + tolerance), low.layers + 3)
    assert all(t.layers % 3 == 2 for t in trials) and len({t.layers for t in trials}) == len(trials)
    assert len(trials) <= 16


def test_a_true_forecast_needs_three_deep_trials_at_most() -> None:
    trials = search(network(10_001), 9_000, LIMIT, 0.05)
    assert [t.layers for t in trials[:3]] == [14, 1_100, 2_204]  # an eighth and a quarter of what was planned
    assert len(trials) <= 5
    assert sum(t.layers for t in trials) < 2.6 * 10_001


def test_what_is_too_slow_ends_the_bracket_too() -> None:
    low, high = ends(search(network(302, failure=TOO_SLOW), 302, LIMIT, 0.05))
    assert low is not None and high is not None
    assert (high.outcome, low.layers <= 302 < high.layers) == (TOO_SLOW, True)


def test_where_the_smallest_does_not_train_the_search_ends() -> None:
    trials = search(network(10), 1_000, LIMIT, 0.05)
    assert [(t.layers, t.outcome) for t in trials] == [(14, OUT_OF_MEMORY)]


def test_where_everything_trains_the_search_ends_near_the_deepest_there_is() -> None:
    low, high = ends(search(network(10**9), 50_000, LIMIT, 0.05))
    assert low is not None and high is None
    assert MAX_DEPTH / 1.05 - 3 < low.layers <= MAX_DEPTH


# ------------------------------------------------------------------------------------------------------------- the limit

PROGRAM = """
import json, sys, time
held = bytearray({mib} * 2**20)
for i in range(0, len(held), 4096):
    held[i] = 1
del held
time.sleep({sleep})
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({{"outcome": "trained", "peak_bytes": int(status["VmHWM"].split()[0]) * 1024}}))
"""


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., limit.Ended]:
    """Runs a process that holds so many MiB for a moment, within a limit of 100."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(mib: int, sleep: float = 0.0, limit_s: float = 30.0, limit_bytes: int | None = 100 * 2**20) -> limit.Ended:
        (tmp_path / "holder.py").write_text(PROGRAM.format(mib=mib, sleep=sleep))
        return run_within("holder", {}, threads=1, limit_s=limit_s, limit_bytes=limit_bytes)

    return run


def test_a_process_within_the_limit_ends_by_itself(holder: Callable[..., limit.Ended]) -> None:
    ended = holder(50)
    assert ended.outcome == TRAINED
    assert 50 * 2**20 < ended.peak < 100 * 2**20
    assert ended.result["peak_bytes"] == ended.peak


def test_a_process_over_the_limit_is_killed_and_reported(holder: Callable[..., limit.Ended]) -> None:
    """It would sleep for a minute with its memory given back: the high-water mark tells."""
    ended = holder(150, sleep=60.0)
    assert ended.outcome == OUT_OF_MEMORY
    assert ended.result == {}
    assert ended.seconds < 30
    assert 100 * 2**20 < ended.peak < 200 * 2**20


def test_a_peak_between_the_last_look_and_the_end_counts(holder: Callable[..., limit.Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "resident_peak", lambda pid: 0)
    assert holder(150).outcome == OUT_OF_MEMORY


def test_without_a_limit_of_its_own_the_watch_lets_it_run(holder: Callable[..., limit.Ended]) -> None:
    assert holder(150, limit_bytes=None).outcome == TRAINED


def test_a_process_that_takes_too_long_is_killed(holder: Callable[..., limit.Ended]) -> None:
    ended = holder(1, sleep=60.0, limit_s=0.5)
    assert (ended.outcome, ended.seconds < 30) == (TOO_SLOW, True)


def test_a_process_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "broken.py").write_text("raise ValueError('not the memory')")
    with pytest.raises(BenchError, match="not the memory"):
        run_within("broken", {}, threads=1, limit_s=30, limit_bytes=10**9)


def test_a_network_that_runs_out_of_memory_says_so_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a GPU, where torch's allocator keeps the limit; any other error stays one."""
    raised: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("another error")]
    monkeypatch.setattr(trial, "build", lambda *_: (_ for _ in ()).throw(raised.pop(0)))
    values = Namespace(device="cpu", threads=1, steps=2, memory=1)
    assert trial._train(values)["outcome"] == OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="another error"):
        trial._train(values)


# ------------------------------------------------------------------------------------------------------------- the bench


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--memory", "much"], "'much' is not a size of memory; type for example 24GiB"),
        (["--memory", "8MiB"], "--memory 8MiB is less than a process takes that has only imported torch .* type for example --memory 4GiB"),
        (["--policies", "forget"], "invalid choice: 'forget'"),
        (["--steps", "1"], "'1' is not a whole number from 2"),
        (["--time-limit", "soon"], "not a duration"),
    ],
)
def test_bad_input_is_refused_before_a_process_is_started(arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "run_within", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(UsageError, match=sentence):
        main(["depth", *arguments])


def test_a_device_that_is_not_there_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch finds no GPU here"):
        main(["depth", "--device", "cuda"])


def test_where_not_even_the_smallest_network_trains_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "run_within", lambda *_, **__: limit.Ended(OUT_OF_MEMORY, 2**32 + 1, 1.0))
    with pytest.raises(UsageError, match=r"the smallest network, 14 layers \(plain\), ended as out of memory; type a larger --memory"):
        main(["depth"])


def test_the_table_holds_each_policy_beside_the_plain_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From made-up processes: the plain network trains up to 401 layers, `recompute` 20 times as deep."""
    deepest, asked = {"plain": 401, "recompute": 8_021}, []

    def run(module: str, options: dict[str, Any], **limits: Any) -> limit.Ended:
        asked.append((options, limits))
        made = network(deepest[options["policy"]])(options["depth"])
        peak = made.peak * 1_000
        done = {"base_bytes": 5 * 10**8, "built_bytes": 7 * 10**8, "peaks": [peak, peak], "step_s": [2.0, 1.0], "peak_bytes": peak}
        return limit.Ended(made.outcome, peak, 3.0, done if made.outcome == TRAINED else {})

    monkeypatch.setattr(depth, "run_within", run)
    main(["depth", "--memory", "4GB", "--policies", "recompute", "offload", "--threads", "1", "--json", str(tmp_path / "depth.json")])
    record = json.loads((tmp_path / "depth.json").read_text())
    plain, recompute = record["records"]
    assert [row["policy"] for row in record["records"]] == ["plain", "recompute"]
    for row, name in ((plain, "plain"), (recompute, "recompute")):
        trained = [t for t in record["trials"] if t["policy"] == name and t["outcome"] == TRAINED]
        failed = [t for t in record["trials"] if t["policy"] == name and t["outcome"] != TRAINED]
        low, high = max(t["layers"] for t in trained), min(t["layers"] for t in failed)
        assert low <= deepest[name] < high <= 1.05 * low
        assert (row["deepest that trained, layers"], row["shallowest that did not, layers"]) == (f"{low:,}", f"{high:,} (out of memory)")
    (goal,) = record["rows"]
    assert goal["median"] == pytest.approx(recompute["times plain"]) and 18 < goal["median"] < 22 and goal["reached"] is True
    assert "offload: not tried" in " ".join(record["notes"])
    assert {options["memory"] for options, _ in asked} == {limits["limit_bytes"] for _, limits in asked} == {4 * 10**9}
    assert "| recompute |" in capsys.readouterr().out


def test_the_plan_leads_to_the_depth_that_it_says_fits() -> None:
    """One block more would not."""
    values = Namespace(width=16, batch_size=64, segment=6, threads=1, memory=4 * 2**30)
    start = 7 * 10**8
    for policy in ("plain", "keep", "recompute"):
        layers = depth.deepest_planned(values, policy, start)
        assert start + depth.planned_bytes(values, policy, layers) <= values.memory < start + depth.planned_bytes(values, policy, layers + 3)


def test_real_networks_train_or_are_killed() -> None:
    """The program itself: a limit that holds 14 layers and not 302, of which a block keeps 4 MiB."""
    sizes = {"policy": "plain", "width": 32, "batch_size": 8, "segment": 4, "steps": 2, "threads": 1, "memory": 1, "device": "cpu"}
    small = run_within("deepscale.bench.trial", {"depth": 14, **sizes}, threads=1, limit_s=60, limit_bytes=None)
    assert small.outcome == TRAINED
    assert small.result["losses"][1] < small.result["losses"][0]
    assert small.result["base_bytes"] < small.result["built_bytes"] < small.peak == max(small.result["peaks"])
    limit_bytes = small.peak + 150 * 2**20
    deep = run_within("deepscale.bench.trial", {"depth": 302, **sizes}, threads=1, limit_s=60, limit_bytes=limit_bytes)
    assert deep.outcome == OUT_OF_MEMORY
    assert limit_bytes < deep.peak < limit_bytes + 100 * 2**20


def test_the_forecast_is_a_line_through_trials_that_lie_apart() -> None:
    """Peaks of 26 and 302 layers give 10 bytes a layer; 299 layers, which needed a little more than 302, are not asked."""
    done = [Trial("p", layers, TRAINED, peak, 0, 1.0) for layers, peak in ((26, 260), (299, 3_030), (302, 3_020))]
    assert bracket._forecast(done, 0, 4_020) == pytest.approx(402)
