"""What a sweep is summed up in: shares of the variance against plain sums, figures, the report page, and the summary run in MLflow."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flows import made_up_flow
from test_report import embedded
from test_sweep_results import record

from deepscale import cli
from deepscale.sweeps import figures, importance, results, summary
from deepscale.sweeps.results import Row, Sweep
from deepscale.tracking_read import Reader
from deepscale.tracking_store import Store

pytest.importorskip("mlflow")

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
RUN: Any = SimpleNamespace(info=SimpleNamespace(run_id="0", start_time=0))


def made_up(settings: list[dict[str, str]], values: list[float | None], outcome: str = "finished") -> Sweep:
    """A sweep with these results after 10 steps; None for a trial that diverged."""
    rows = tuple(
        Row(n, {"seed": str(n), **own}, outcome if value is not None else "non_finite", {"val/accuracy": value} if value is not None else {},
            ((5, value / 2), (10, value)) if value is not None else (), RUN, RUN)
        for n, (own, value) in enumerate(zip(settings, values, strict=True), 1)
    )  # fmt: skip
    return Sweep("made up", "made up", tuple(name for name in settings[0] if name != "seed"), "val/accuracy", "max", 0.5, len(rows), rows)


def grid(**axes: str) -> list[dict[str, str]]:
    """All combinations of the words of each axis."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*(words.split() for words in axes.values()))]


def test_the_shares_of_a_full_grid_are_the_sums_of_squares_of_its_means() -> None:
    """Main effects and the interaction of a 3 x 2 grid with three seeds, against the textbook's sums over group means."""
    points = grid(activation="gelu relu tanh", norm="layernorm none", seed="0 1 2")
    values = np.random.default_rng(0).normal(size=len(points)) + [{"gelu": 0.0, "relu": 1.0, "tanh": 3.0}[point["activation"]] for point in points]
    found = importance.importance(made_up(points, values.tolist()))
    assert isinstance(found, importance.Importance)
    total = ((values - values.mean()) ** 2).sum()

    def between(*axes: str) -> float:
        groups: dict[tuple[str, ...], list[float]] = {}
        for point, value in zip(points, values, strict=True):
            groups.setdefault(tuple(point[axis] for axis in axes), []).append(value)
        return sum(len(group) * (np.mean(group) - values.mean()) ** 2 for group in groups.values()) / total

    both = between("activation", "norm")
    expected = {"activation": between("activation"), "norm": between("norm")}
    expected["activation × norm"] = both - sum(expected.values())
    assert {share.name: share.share for share in found.shares} == pytest.approx(expected)
    assert found.rest == pytest.approx(1 - both)
    # An axis' share over what noise would give it is its F: here by its own definition, with 18 - 6 degrees of freedom in the seeds.
    f = (expected["activation"] / 2) / (found.rest / 12)
    assert found.shares[0].share / found.shares[0].chance == pytest.approx(f)


def test_a_grid_with_missing_points_gives_no_share_to_what_changes_nothing() -> None:
    """Results that hang on one axis alone; plain group means of the other differ, for they are not over the same points."""
    points = grid(skip="identity none", norm="layernorm none", seed="0 1 2")
    values: list[float | None] = [(0.5 if point["skip"] == "identity" else 0.1) + 0.001 * int(point["seed"]) for point in points]
    values[-1] = values[-2] = None
    found = importance.importance(made_up(points, values))
    assert isinstance(found, importance.Importance) and found.trials == 10
    shares = {share.name: share.share for share in found.shares}
    assert found.shares[0].name == "skip" and shares["skip"] > 0.9
    assert shares["norm"] < 1e-4 and shares["skip × norm"] < 1e-4
    groups = [[value for point, value in zip(points, values, strict=True) if value and point["norm"] == norm] for norm in ("layernorm", "none")]
    assert abs(np.mean(groups[0]) - np.mean(groups[1])) > 0.05


def test_random_points_are_judged_by_a_forest_at_a_step_that_all_have_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setattr(importance, "SHUFFLES", 1)
    source = np.random.default_rng(0)
    points = [{"lr": f"{10**exponent:.4g}", "weight_decay": f"{decay:.4g}"} for exponent, decay in source.uniform((-4, 0), (-2, 0.1), (30, 2))]
    values = [0.5 - 0.1 * (np.log10(float(point["lr"])) + 2.7) ** 2 for point in points]
    sweep = made_up(points, values)
    stopped = Row(31, points[0] | {"seed": "0"}, "stopped_early", {"val/accuracy": 0.2}, ((5, 0.2),), RUN, RUN)
    found = importance.importance(Sweep(**(vars(sweep) | {"rows": (*sweep.rows, stopped)})))
    assert isinstance(found, importance.Importance) and (found.trials, found.at, found.rest) == (31, 5, None)
    assert found.shares[0].name == "lr" and found.shares[0].share > 0.7 > 2 * found.shares[1].share
    assert found.shares[0].share > found.shares[0].chance


def test_too_little_to_judge_is_a_sentence() -> None:
    few = grid(lr="1 2 3 4")
    assert "takes 10 results or more, and there are 4" in str(importance.importance(made_up(few, [0.1, 0.2, 0.3, 0.4])))
    assert "all results are equal" in str(importance.importance(made_up(grid(norm="a b", seed="0 1 2"), [0.5] * 6)))
    assert "too few results" in str(importance.importance(made_up(few, [0.1, 0.2, None, None])))


@pytest.mark.parametrize(("numbers", "logarithmic"), [((1e-4, 1e-3, 1e-2), True), ((0.1, 0.2, 0.3, 0.4), False), ((0.0, 1e-6, 1.0), False)])
def test_numbers_that_lie_evenly_in_their_logarithm(numbers: tuple[float, ...], logarithmic: bool) -> None:
    assert importance.is_logarithmic(numbers) == logarithmic


def test_figures_of_words_numbers_and_missing_results(tmp_path: Path) -> None:
    """A grid with a point without result, many numbers, a scheduler's stops; nothing to draw draws nothing."""
    points = grid(norm="layernorm none", depth="26 110 1004")
    numbers = [{"lr": f"{value:g}"} for value in np.geomspace(1e-4, 1e-2, 20)]
    for n, sweep in enumerate((made_up(points, [0.1, 0.2, 0.3, 0.4, 0.5, None]), made_up(numbers, np.linspace(0, 1, 20).tolist(), "stopped_early"))):
        path = figures.parallel(sweep, tmp_path / f"{n}.png")
        assert path is not None and path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    assert figures.parallel(made_up(points, [None] * 6), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A working folder with a sweep of six trials that have records of their gradient."""
    place = tmp_path_factory.mktemp("summary")
    shutil.copy(empty_store, place)
    flow = made_up_flow(26, 2).save(place / "gradflow.npz")
    for number, (seed, (activation, base)) in enumerate(itertools.product(range(3), (("gelu", 0.6), ("tanh", 0.4))), 1):
        record(place, number, activation, "0.0", seed, base + 0.01 * seed)
        run = Reader(f"sqlite:///{place / 'mlflow.db'}").run(f"trial {number}")
        store = Store(f"sqlite:///{place / 'mlflow.db'}", "components", "", 0, run.info.run_id)
        store.open()
        store.send([{"op": "file", "path": str(flow)}])
    return place


def test_the_summary_is_one_run_beside_the_trials_however_often_it_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tags, description, importance and files; the page shows question, table and figures above the runs; the table stays as it was."""
    with contextlib.chdir(folder):
        cli.main(["sweep", "show", "components"])
        table = capsys.readouterr().out
        for question in ("Which activation?", ""):  # without one, that of before
            written = summary.write(results.read("components", [Reader()]), Path("sweeps/components"), question=question)
        assert written.notes == () and written.page == folder / "sweeps/components/report/index.html"
        (run,) = Reader().runs(where="tags.kind = 'summary'")
        assert len(Reader().runs("components")) == 7
        assert (run.info.run_name, run.info.status, run.data.tags["question"]) == ("components summary", "FINISHED", "Which activation?")
        assert run.data.tags["mlflow.note.content"] + "\n" == table == Path("sweeps/components/results.md").read_text()
        assert run.data.metrics["importance/activation"] > 0.9 and run.data.metrics["sweep/best val accuracy"] == pytest.approx(0.61)
        kept = Reader().artifact(run, "report/index.html")
        assert kept is not None and all(Reader().artifact(run, name) for name in ("parallel.png", "importance.png", "results.csv", "trials.csv"))
        data = embedded(kept)
        assert data["sweep"]["question"] == "Which activation?" and len(data["sweep"]["figures"]) == 2
        assert [row[:2] for row in data["sweep"]["rows"]] == [["gelu", "0"], ["tanh", "0"]]
        assert len(data["runs"]) == 6 and data["runs"][0]["name"] == "trial 5"
        cli.main(["sweep", "show", "components"])
        assert capsys.readouterr().out == table
        cli.main(["report", "--experiment", "components", "--out", "all"])
        assert "all/index.html: 6 runs" in capsys.readouterr().out  # the summary is no training


def test_the_summary_of_several_stores_lies_in_the_store_of_the_environment(
    folder: Path, in_tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp_path / "job").mkdir()
    shutil.copy(folder / "mlflow.db", "job")
    shutil.copy(empty_store, ".")
    cli.main(["sweep", "summary", "components", "--stores", "job", "--out", "job/summary"])
    assert capsys.readouterr().out.splitlines()[0] == "report  job/summary/report/index.html"
    assert [run.info.run_name for run in Reader().runs()] == ["components summary"]


def test_what_a_sweep_ends_with(folder: Path, in_tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From one store, and from stores of the trials' own, where the summary gets one beside them; without any result a note."""
    with contextlib.chdir(folder):
        summary.show("components", folder / "sweeps/components", "Which activation?", own_stores=False)
    said = capsys.readouterr().out
    assert said.startswith(f"components: 9 trials, 6 started: 6 finished; {6 * 400:,} steps in all\n")
    assert said.splitlines()[-2:] == [
        "report  sweeps/components/report/index.html", "mlflow  mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1",
    ]  # fmt: skip
    for number, accuracy in enumerate((0.4, 0.5, 0.6), 1):
        place = in_tmp_path / "job" / "trials" / str(number)
        place.mkdir(parents=True)
        shutil.copy(empty_store, place)
        record(place, number, "gelu", "0.0", number, accuracy)
    shutil.copy(empty_store, "job")
    for _ in range(2):  # the second one finds the summary of the first below the folder, too
        summary.show("components", in_tmp_path / "job", "Which activation?", own_stores=True)
        said = capsys.readouterr().out
        assert "50.00 ± 10.00 %" in said and "mlflow  deepscale merge job, then mlflow ui" in said
    assert [run.info.run_name for run in Reader(f"sqlite:///{in_tmp_path}/job/mlflow.db").runs()] == ["components summary"]
    assert not Path("mlflow.db").exists()
    summary.show("other", in_tmp_path / "job", "", own_stores=True)
    assert "note    the results are not summed up: no trial of a sweep 'other'" in capsys.readouterr().out


def test_what_cannot_be_made_is_a_note_and_the_rest_is_there(in_tmp_path: Path, empty_store: Path) -> None:
    """Trials without records have no page; a store that is no database."""
    shutil.copy(empty_store, ".")
    for number, accuracy in enumerate((0.4, 0.5, 0.6), 1):
        record(in_tmp_path, number, "gelu", "0.0", number, accuracy)
    Path("broken.db").write_text("no database at all, whatever its name says\n" * 10)
    written = summary.write(results.read("components", [Reader()]), Path("out"), uri=f"sqlite:///{in_tmp_path / 'broken.db'}")
    assert written.page is None
    notes = "\n".join(written.notes)
    assert "too few results" in notes and "there is no report page: none of the 3 runs has a record" in notes
    assert "the summary is not in MLflow: " in notes and "is not an SQLite database" in notes
    assert json.dumps(sorted(path.name for path in Path("out").iterdir())) == '["parallel.png", "results.csv", "results.md", "trials.csv"]'
