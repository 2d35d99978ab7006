"""A sweep's results out of MLflow: rows, means over seeds against numbers worked out by hand, the table, CSV and small JSON files."""

import contextlib
import csv
import io
import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepscale import cli, merge
from deepscale.sweeps import results, rows, table
from deepscale.sweeps.space import Space
from deepscale.sweeps.tags import tags as tags_of
from deepscale.tracking_read import Reader
from deepscale.tracking_store import Store

pytest.importorskip("mlflow")

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

SPACE = Space("components", "Which?", {}, {"activation": ("gelu", "tanh"), "layerscale_init": ("0", "1e-6")}, {})
START_MS = 1_700_000_000_000
# Of each choice of settings: the validation accuracies of its seeds.
ACCURACIES = {("gelu", "0.0"): (0.50, 0.56, 0.62), ("gelu", "1e-06"): (0.70, 0.61, 0.64), ("tanh", "0.0"): (0.30, 0.36, None)}
TRIALS = [(*point, seed, accuracies[seed]) for seed in range(3) for point, accuracies in ACCURACIES.items()]


def record(
    folder: Path,
    number: int,
    activation: str,
    init: str,
    seed: int,
    accuracy: float | None,
    outcome: str = "finished",
    *,
    later_ms: int = 0,
    tags: dict[str, str] | None = None,
) -> None:
    """A trial's run, as training records it; without an outcome it goes on."""
    name = f"trial {number}"
    store = Store(f"sqlite:///{folder / 'mlflow.db'}", "components", name, START_MS + number + later_ms)
    store.open()
    settings = {"activation": activation, "layerscale_init": init, "seed": str(seed), "width": "8", "data_dir": "data", "deepspeed_config": "/a/b"}
    store.send([{"op": "parameters", "values": settings}])
    origin = {"hardware": '{"CPU": "a processor", "cores": 2}', "versions": '{"torch": "2.15.0"}', rows.COMMIT: "0123abc"}
    carried = tags_of("components", SPACE, number, 9) if tags is None else tags
    store.send([{"op": "tags", "values": carried | origin}])
    steps = range(1, 401) if number == 2 else (200, 400)  # of one trial all: storing them takes as long as all else
    points = [metrics(step, {"train/loss": 2.5 - step / 1000, "perf/step_s": 0.25, "perf/seconds": 1.5}) for step in steps]
    if accuracy is not None:
        points += [metrics(200, {"val/accuracy": accuracy / 2}), metrics(400, {"val/accuracy": accuracy, "test/accuracy": accuracy - 0.01})]
    store.send([*points, metrics(400, {"val/loss": math.nan})])
    if outcome:
        store.send([{"op": "tags", "values": {"outcome": outcome}}])
        store.send([{"op": "finish", "status": "FINISHED" if outcome == "finished" else "FAILED", "time_ms": START_MS + 60_000}])


def metrics(step: int, values: dict[str, float]) -> dict[str, Any]:
    return {"op": "metrics", "step": step, "time_ms": START_MS + step, "values": values}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A working folder with a sweep of nine trials, one of which diverged."""
    place = tmp_path_factory.mktemp("sweep")
    shutil.copy(empty_store, place)
    for number, (activation, init, seed, accuracy) in enumerate(TRIALS, 1):
        record(place, number, activation, init, seed, accuracy, "finished" if accuracy else "non_finite")
    Store(f"sqlite:///{place / 'mlflow.db'}", "components", "no trial", START_MS).open()
    return place


@pytest.fixture
def sweep(folder: Path) -> results.Sweep:
    """The sweep as it is read."""
    return results.read("components", [Reader(f"sqlite:///{folder / 'mlflow.db'}")])


def test_means_and_deviations_against_plain_ones(sweep: results.Sweep) -> None:
    """The best mean first; a trial that diverged is in no mean, and has not converged."""
    assert [(row.number, row.seed) for row in sweep.rows] == [(number, trial[2]) for number, trial in enumerate(TRIALS, 1)]
    assert [list(point.settings.values()) for point in sweep.points] == [["gelu", "1e-6"], ["gelu", "0"], ["tanh", "0"]]
    for point, accuracies in zip(sweep.points, (ACCURACIES["gelu", "1e-06"], ACCURACIES["gelu", "0.0"], (0.30, 0.36)), strict=True):
        assert point.mean("val/accuracy") == pytest.approx(statistics.fmean(accuracies))
        assert point.deviation("val/accuracy") == pytest.approx(statistics.stdev(accuracies))
        assert point.mean("test/accuracy") == pytest.approx(statistics.fmean(accuracies) - 0.01)
    assert [point.converged(sweep.above) for point in sweep.points] == [(3, 3), (2, 3), (0, 3)]
    assert sweep.points[2].ends == {"finished": 2, "non_finite": 1}
    assert results.read("components", [sweep.rows[0].reader]).points[0].rows[0].steps == 400


def test_the_table(sweep: results.Sweep) -> None:
    lines = table.text(sweep).splitlines()
    assert lines[0] == f"components: 9 trials: 8 finished, 1 non finite; {sum(row.steps for row in sweep.rows):,} steps in all"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, best, _, worst = cells
    assert head == [
        *("activation", "layerscale_init", "seeds", "validation", "test", "training loss", "seconds", "converged", "not finished"),
    ]
    assert best == ["gelu", "1e-6", "3", "65.00 ± 4.58 %", "64.00 ± 4.58 %", "2.1000 ± 0.0000", "1.5 ± 0", "3 of 3", ""]
    assert worst[3:5] + worst[7:] == ["33.00 ± 4.24 %", "32.00 ± 4.24 %", "0 of 3", "1 non finite"]


def test_as_csv_with_all_digits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command itself: means, and each trial with its run."""
    with contextlib.chdir(folder):
        cli.main(["sweep", "show", "components", "--csv"])
        means = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        cli.main(["sweep", "show", "components", "--csv", "--trials"])
        trials = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(means[1]["val/accuracy sd"]) == statistics.stdev(ACCURACIES["gelu", "0.0"])
    assert (means[2]["converged"], means[2]["n"], means[2]["outcomes"]) == ("0.0", "2", "finished:2 non_finite:1")
    assert [(row["activation"], row["seed"], row["val/accuracy"]) for row in trials[:2]] == [("gelu", "0", "0.7"), ("gelu", "2", "0.64")]
    assert len({row["run"] for row in trials}) == 9
    assert trials[-1]["outcome"] == "non_finite" and trials[-1]["val/accuracy"] == ""


def test_each_ended_trial_is_one_small_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it holds against what was recorded; no folder of the machine; a second time nothing is written."""
    with contextlib.chdir(folder):
        cli.main(["sweep", "show", "components", "--rows", str(tmp_path / "kept")])
        assert "9 new of 9 ended trials" in capsys.readouterr().err
        cli.main(["sweep", "show", "components", "--rows", str(tmp_path / "kept")])
        assert "0 new of 9 ended trials" in capsys.readouterr().err
    files = sorted((tmp_path / "kept").iterdir())
    assert files[1].name == "002-activation=gelu_layerscale_init=1e-6_seed=0.json"
    held = json.loads(files[1].read_text(), parse_constant=pytest.fail)
    assert (held["trial"], held["seed"], held["outcome"], held["converged"], held["steps"]) == (2, 0, "finished", True, 400)
    assert held["varied"] == {"activation": "gelu", "layerscale_init": "1e-6"}
    assert held["numbers"]["val/accuracy"] == 0.7 and held["numbers"]["perf/step_s median"] == 0.25
    assert held["numbers"]["val/loss"] is None  # NaN, which JSON has not
    assert (held["commit"], held["hardware"]["cores"], held["versions"]) == ("0123abc", 2, {"torch": "2.15.0"})
    assert held["settings"]["width"] == "8" and not {"data_dir", "deepspeed_config"} & set(held["settings"])
    assert held["curves"]["val/accuracy"] == [[200, 0.35], [400, 0.7]]
    assert len(held["curves"]["train/loss"]) == 200 and held["curves"]["train/loss"][-1] == [400, pytest.approx(2.1005)]
    assert max(file.stat().st_size for file in files) < 10_000


@pytest.fixture
def place(in_tmp_path: Path, empty_store: Path) -> Callable[[str], Path]:
    """`place("a/b")` makes a folder with an empty store."""

    def make(name: str) -> Path:
        (in_tmp_path / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(empty_store, in_tmp_path / name)
        return in_tmp_path / name

    return make


def test_what_is_not_finite_stays_open() -> None:
    """A curve that is read, thinned and written again: JSON has null for what no number stands for."""
    points = rows.points([(1.0, 2.30258509), (2, math.nan), (3, math.inf)])
    assert points == [[1, 2.30259], [2, None], [3, None]] == rows.points(points)


def test_while_it_runs_and_where_trials_are_stopped(place: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A trial that goes on or has no memory is in no mean; one that a scheduler stopped only where no other has finished."""
    here = place(".")
    record(here, 1, "gelu", "0.0", 0, 0.6)
    record(here, 2, "gelu", "0.0", 1, 0.2, "stopped_early")
    record(here, 3, "tanh", "0.0", 0, 0.3, "stopped_early")
    record(here, 4, "tanh", "0.0", 1, 0.9, "")
    record(here, 5, "relu", "0.0", 0, None, "out_of_memory")
    cli.main(["sweep", "show", "components"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("components: 9 trials, 5 started: 1 finished, 2 stopped early, 1 running, 1 out of memory; ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    assert [(row[0], row[3], row[-2], row[-1]) for row in cells] == [
        ("gelu", "60.00 %", "1 of 2", "1 stopped early"),
        ("tanh", "30.00 %", "0 of 1", "1 stopped early, 1 running"),
        ("relu", "–", "–", "1 out of memory"),
    ]
    cli.main(["sweep", "show", "components", "--trials"])
    assert "| 4 " in capsys.readouterr().out.splitlines()[4]  # the best so far goes on


def test_the_runs_of_several_stores_apart_and_merged(place: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A store per trial, as jobs of a cluster write them, against the same merged into one; a trial's start that failed is not it."""
    for number, accuracy in ((1, 0.4), (2, 0.5), (3, 0.6)):
        folder = place(f"sweeps/components/trials/{number}")
        record(folder, number, "gelu", "0.0", number, None, "failed")
        record(folder, number, "gelu", "0.0", number, accuracy, later_ms=1000)
        record(folder, number, "gelu", "0.0", number, None, "interrupted", later_ms=2000)
    cli.main(["sweep", "show", "components", "--stores", "sweeps"])
    apart = capsys.readouterr().out
    place(".")
    merge.main(["sweeps"])
    capsys.readouterr()
    cli.main(["sweep", "show", "components"])
    assert capsys.readouterr().out == apart
    assert "50.00 ± 10.00 %" in apart


def test_without_the_tags_of_what_is_compared_the_settings_that_differ_are(place: Callable[[str], Path]) -> None:
    here = place(".")
    for number, (activation, init) in enumerate((("gelu", "0.0"), ("gelu", "1.0"), ("tanh", "1.0")), 1):
        record(here, number, activation, init, number, 0.5, tags={"sweep": "components", "trial": str(number)})
    assert results.read("components", [Reader()]).axes == ("activation", "layerscale_init")


def test_a_sweep_that_is_not_there_lists_those_that_are(
    folder: Path, place: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["sweep", *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "there is no mlflow.db in this folder" in refused("show", "depth")
    place(".")
    assert "no trial of a sweep is in sqlite:" in refused("show", "depth")
    assert "the folder empty is not there" in refused("show", "depth", "--stores", "empty")
    Path("empty").mkdir()
    assert "there is no mlflow.db below empty" in refused("show", "depth", "--stores", "empty")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    assert "possible: components" in refused("show", "it's depth")
    assert "the command 'other' is not known; possible: show, summary" in refused("other")
