"""What `--dry-run` says of a sweep's trials: memory and time as the planner has them, once for all trials that take the same."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from deepscale import plan
from deepscale.config import Config
from deepscale.errors import UsageError
from deepscale.machine import Machine
from deepscale.plan_command import process_bytes
from deepscale.sweeps import command, driver, preview, space
from deepscale.sweeps.preview import FFCV_S, START_S, Cost, Planned

TINY = """
question: What does it take?
fixed: {dataset: synthetic, width: 4, patch_size: 4, batch_size: 16, engine: torch, kernel: torch, threads: 1}
"""


def planned(folder: Path, text: str, ranks: int = 1) -> list[Planned]:
    (folder / "my.yaml").write_text(TINY + text)
    own = space.read(folder / "my.yaml", ["--depth", "14"])
    return list(preview.planned(own, space.trials(own), ranks, 1))


def shown(folder: Path, text: str, concurrent: int, *overrides: str) -> str:
    (folder / "my.yaml").write_text(TINY + text)
    stream = io.StringIO()
    preview.show(space.read(folder / "my.yaml", overrides), concurrent=concurrent, stream=stream)
    return stream.getvalue()


def test_trials_that_take_the_same_are_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: list[Any] = []
    resolve = plan.resolve
    monkeypatch.setattr(plan, "resolve", lambda *a, **k: resolved.append(a[0]) or resolve(*a, **k))
    preview._cost.cache_clear()
    rows = planned(
        tmp_path,
        "grid: {lr: [1e-3, 1e-2], layerscale_init: [0, 1], max_steps: [20, 40, 80], eval_every: [1000]}\nseeds: [0, 1]\n",
    )
    assert len(rows) == 2 * 2 * 3 * 2 and len(resolved) == 1
    assert len({row.host for row in rows}) == 1 and rows[0].host > process_bytes(resolved[0])
    seconds = {row.steps: row.seconds for row in rows}
    assert seconds[20] > START_S
    assert seconds[80] - seconds[40] == pytest.approx(2 * (seconds[40] - seconds[20])) and seconds[40] > seconds[20]


@pytest.fixture
def known_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial takes a second a step of 16 images, 10 ms an image that is evaluated, and 3 GiB a rank, the depth of 110 twice that."""

    def cost(asked: Config, ranks: int) -> Cost:
        if asked.model.depth > 1000:
            raise UsageError("too large")
        return Cost(3 * 2**30 * (2 if asked.model.depth == 110 else 1), 0, 16, START_S, 1.0, 0.01)

    monkeypatch.setattr(preview, "_cost", cost)


@pytest.mark.usefixtures("known_cost")
def test_a_trials_time_counts_epochs_evaluations_and_a_budget(tmp_path: Path) -> None:
    """An epoch of the synthetic set is 1,125 steps of 16 images; 2,000 images validate and 4,000 test."""
    epochs = planned(tmp_path, "grid: {epochs: [1, 4], eval_every: [auto, 1500, 2000], eval_images: [auto, 100]}\n")
    expected = {
        (1, "auto", "auto"): (1125, 1125 + 20 + 40), (1, "auto", "100"): (1125, 1125 + 1 + 1),
        (4, "auto", "auto"): (4500, 4500 + 4 * 20 + 40), (4, "2000", "auto"): (4500, 4500 + 3 * 20 + 40), (4, "1500", "100"): (4500, 4500 + 3 + 1),
    }  # fmt: skip
    found = {(int(r.trial.settings["epochs"]), r.trial.settings["eval_every"], r.trial.settings["eval_images"]): r for r in epochs}
    for key, (steps, seconds) in expected.items():
        assert (found[key].steps, found[key].seconds) == (steps, pytest.approx(START_S + seconds)), key
    budget = planned(tmp_path, "grid: {time_budget: [90s, 2m]}\n", ranks=2)
    assert [(row.steps, row.seconds, row.host) for row in budget] == [(None, START_S + 90, 6 * 2**30), (None, START_S + 120, 6 * 2**30)]


@pytest.mark.usefixtures("known_cost")
def test_the_table_has_a_row_for_each_trial_and_the_whole_sweeps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "measure_machine", lambda place: Machine("cpu", 10 * 2**30, 10 * 2**30, False, 1))
    text = "grid: {norm: [layernorm, none], depth: [26, 110, 1004]}\nseeds: [0, 1]\n"
    lines = shown(tmp_path, text, 3, "--max-steps", "245", "--eval-images", "500").splitlines()
    assert lines[0] == "my: What does it take?"
    assert lines[2].split() == ["trial", "norm", "depth", "seed", "steps", "memory", "time"]
    assert [line.split() for line in lines[3:6]] == [
        ["1", "layernorm", "26", "0", "245", "3.0", "GiB", "4", "m", "30", "s"],  # 15 + 245 + 5 + 5
        ["2", "layernorm", "110", "0", "245", "6.0", "GiB", "4", "m", "30", "s"],
        ["3", "layernorm", "1004", "0", "too", "large"],
    ]
    assert len({len(line) for line in (*lines[2:5], *lines[6:8])}) == 1, "columns stand under each other"
    assert len(lines) == 3 + 12 + 1 + 3
    assert lines[-3:] == [
        "4 of 12 trials cannot be trained here",
        "8 trials, 3 at a time: about 12 m",
        "!!! 3 at a time may need 18.0 GiB, and 10.0 GiB are free here: type a smaller --concurrent",
    ]


@pytest.mark.usefixtures("known_cost")
def test_optunas_points_are_planned_at_the_middle_of_their_ranges(tmp_path: Path) -> None:
    text = "ranges: {lr: {low: 1e-4, high: 1e-2, log: true}}\nsearch: optuna\nsamples: 16\nscheduler: asha\n"
    lines = shown(tmp_path, text, 2, "--max-steps", "85", "--eval-images", "1").splitlines()
    assert lines[3].split()[:3] == ["1", "0.001", "0"]
    assert lines[-2:] == [
        "Optuna draws 16 points, of which the middle is planned above: lr 0.0001 to 0.01",
        "16 trials, 2 at a time: about 13 m 20 s, less what asha stops early",
    ]


class TwoNodes:
    """Ray as it describes a cluster that is not here: two nodes of 16 cores and 4 GPUs, and one that is gone."""

    def nodes(self) -> list[dict[str, Any]]:
        node = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}
        return [node, node, node | {"Alive": False}]


@pytest.mark.usefixtures("known_cost")
def test_a_dry_run_counts_with_what_the_cluster_has_and_leaves_nothing(
    in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = in_tmp_path
    monkeypatch.setattr(driver, "cluster", lambda asked: contextlib.nullcontext(TwoNodes()))
    (tmp_path / "my.yaml").write_text(TINY + "grid: {max_steps: [10, 20, 30, 40]}\nseeds: [0, 1, 2]\n")
    (tmp_path / "sweeps" / "my").mkdir(parents=True)  # what a sweep of this name has left keeps nobody from looking
    for options, at_once in (([], 8), (["--gpus-per-trial", "2"], 4), (["--gpus-per-trial", "0.5"], 12), (["--concurrent", "3"], 3)):
        command.main(["my.yaml", "--dry-run", *options])
        said = capsys.readouterr().out
        assert f"12 trials, {at_once} at a time: about" in said
        assert ("6.0 GiB" if "2" in options else "3.0 GiB") in said  # of all ranks of a trial
    assert {path.name for path in tmp_path.iterdir()} == {"my.yaml", "sweeps"} and not list((tmp_path / "sweeps" / "my").iterdir())
    with pytest.raises(SystemExit) as refused:
        command.main(["my.yaml", "--dry-run", "--gpus-per-trial", "16"])
    assert refused.value.code == 2


def test_ffcv_takes_longer_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preview._cost.cache_clear()
    monkeypatch.setattr(preview.importlib.util, "find_spec", lambda name: name == "ffcv")
    tensors, ffcv = planned(tmp_path, "grid: {feed: [tensors, auto], time_budget: [90s]}\n")
    assert ffcv.seconds - tensors.seconds == pytest.approx(FFCV_S) and ffcv.host > tensors.host
