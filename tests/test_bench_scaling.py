"""The scaling bench: which points are launched, the numbers made of them, files, page and runs in MLflow; launches are made up."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from deepscale.bench import main, scaling
from deepscale.errors import UsageError

Asked = list[dict[str, Any]]
CORES = 2


def made_up(options: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """What the ranks would say on two cores: a step of 0.1 s an image on one core, none lost; a tenth of it in communication."""
    step_s = 0.1 * options["batch_size"] / min(ranks, CORES)
    one = {"step_s": [9 * step_s, step_s, step_s], "noted_step_s": step_s, "communication_s": 0.1 * step_s, "collectives": {}, "host": "here"}
    one |= {"base_bytes": 10**9, "losses": [2.0, 1.0 + 1e-7 * ranks], "sent_bytes": 0.0 if ranks == 1 else 3e6}
    return {"device": "cpu", "ranks": [one | {"cores": [r % CORES], "local_rank": r, "peak_bytes": 10**9 + 10**8 * (r + 1)} for r in range(ranks)]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The launches that are asked for."""
    launches: Asked = []

    def run(program: str, options: Mapping[str, Any], *, ranks: int, threads: int, limit_s: float) -> dict[str, Any]:
        launches.append(dict(options) | {"ranks": ranks, "program": program})
        return made_up(options, ranks)

    monkeypatch.setattr(scaling, "run_ranks", run)
    return launches


def bench(*arguments: str) -> None:
    main(["scaling", "--no-tracking", *arguments])


def test_strong_and_weak_points_are_launched_once_each_in_turn(asked: Asked, in_tmp_path: Path) -> None:
    """One rank is both; the second round comes after the first."""
    bench("--ranks", "1,2", "--zero", "0,3", "--batch-size", "8", "--repeat", "2")
    points = [(one["ranks"], one["zero"], one["batch_size"]) for one in asked]
    assert points == 2 * [(1, 0, 8), (1, 3, 8), (2, 0, 8), (2, 0, 16), (2, 3, 8), (2, 3, 16)]
    asked.clear()
    bench("--ranks", "2", "--zero", "1", "--batch-size", "8", "--weak")
    assert [(one["ranks"], one["batch_size"], one["warm_up"], one["program"]) for one in asked] == [(2, 16, 3, "deepscale.bench.ranked")]


def test_efficiency_is_read_against_the_cores(asked: Asked, in_tmp_path: Path) -> None:
    """Four ranks on two cores, as fast as two: twice one rank's images/s, all of what two cores can, and named everywhere."""
    bench("--json", "all.json", "--csv", "all.csv", "--figure", "all.png", "--page", "page.md", "--zero", "1", "--batch-size", "8")
    with open("all.csv") as file:
        rows = {(row["scaling"], int(row["ranks"])): row for row in csv.DictReader(file)}
    assert sorted(rows) == [("strong", 1), ("strong", 2), ("strong", 4), ("weak", 1), ("weak", 2), ("weak", 4)]
    four = rows["strong", 4]
    assert (four["oversubscribed"], four["cores"], four["speedup"], four["efficiency"]) == ("True", "2", "2", "1")
    assert rows["weak", 4]["batch_size"] == "32" and float(rows["weak", 4]["step_s"]) == pytest.approx(1.6)
    assert float(rows["strong", 1]["images_per_s"]) == pytest.approx(10.0)  # the median: the first step is nine times as long
    assert float(four["peak_bytes"]) == 4e8 and float(four["communication"]) == pytest.approx(0.1) and four["sent_bytes"] == "3e+06"
    assert float(four["sent_over_planned"]) == pytest.approx(3e6 / float(four["planned_bytes"]), rel=1e-4)
    record, page = json.loads(Path("all.json").read_text()), Path("page.md").read_text()
    assert "OVERSUBSCRIBED: 4 ranks on 2 cores (oversubscribed)" in record["notes"]
    assert "4 ranks on 2 cores (**oversubscribed**: read against 2 cores): 2.00x the images/s of one rank, efficiency 100 %" in page
    assert "![Speed, communication, bytes and memory against ranks](all.png)" in page and "within 3e-07" in page
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_in_the_file_when_a_later_launch_fails(asked: Asked, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scaling.run_ranks

    def fail_late(*arguments: Any, **named: Any) -> dict[str, Any]:
        if len(asked) == 2:
            raise UsageError("no more")
        return run(*arguments, **named)

    monkeypatch.setattr(scaling, "run_ranks", fail_late)
    with pytest.raises(UsageError, match="no more"):
        bench("--zero", "0,1,2", "--json", "some.json")
    assert [(point["ranks"], point["zero"]) for point in json.loads(Path("some.json").read_text())["points"]] == [(1, 0), (1, 1)]


def test_files_are_put_together(asked: Asked, in_tmp_path: Path) -> None:
    """A point that two files have keeps the launches of both; files of another network are refused."""
    bench("--ranks", "1", "--zero", "0", "--json", "one.json")
    bench("--ranks", "1,2", "--zero", "0", "--json", "two.json")
    asked.clear()
    bench("--merge", "one.json", "two.json", "--json", "all.json", "--page", "page.md")
    assert not asked
    points = {(point["ranks"], point["batch_size"]): len(point["launches"]) for point in json.loads(Path("all.json").read_text())["points"]}
    assert points == {(1, 16): 2, (2, 16): 1, (2, 32): 1}
    assert "1 to 2 launches" in Path("page.md").read_text()
    bench("--ranks", "1", "--zero", "0", "--width", "8", "--json", "other.json")
    with pytest.raises(UsageError, match=r"other\.json has width 8, one\.json has 16; type files of one network"):
        bench("--merge", "one.json", "other.json")


def test_every_point_is_a_run_in_mlflow(asked: Asked, in_tmp_path: Path, empty_store: Path) -> None:
    Path("mlflow.db").write_bytes(empty_store.read_bytes())
    main(["scaling", "--ranks", "1,4", "--zero", "2", "--strong"])
    client = MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("deepscale-scaling")
    assert experiment is not None
    runs = {run.data.params["ranks"]: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["1", "4"]
    four = runs["4"]
    assert four.info.status == "FINISHED" and four.data.params["zero"] == "2"
    assert four.data.tags["oversubscribed"] == "4 ranks on 2 cores (oversubscribed)" and four.data.tags["scaling"] == "strong"
    assert four.data.metrics["scaling/strong_efficiency"] == pytest.approx(1.0) and four.data.metrics["scaling/sent_bytes"] == 3e6


def test_a_rank_that_srun_has_started_measures_its_world(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch has a port of its own; rank 0 writes, the others do not."""
    numbers: list[int] = []

    def here(program: str, options: Mapping[str, Any], *, number: int, threads: int, limit_s: float) -> dict[str, Any]:
        numbers.append(number)
        return made_up(options, 2)

    monkeypatch.setattr(scaling, "run_here", here)
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(name, value)
        bench("--zero", "0,1", "--batch-size", "8", "--json", f"{rank}.json")
    assert numbers == 2 * [1, 2, 3, 4]
    assert not Path("1.json").exists()
    points = json.loads(Path("0.json").read_text())["points"]
    assert [(point["ranks"], point["zero"], point["batch_size"]) for point in points] == [(2, 0, 8), (2, 0, 16), (2, 1, 8), (2, 1, 16)]
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UsageError, match="describe a rank, but MASTER_PORT"):
        bench()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "0,1"], "'0,1' is no list of numbers from 1; type for example 1,2"),
        (["--ranks", "two"], "'two' is no list of numbers"),
        (["--zero", "0,4"], "'0,4' is no list of numbers from 0 to 3"),
        (["--ranks", "3"], "--batch-size 16 does not divide over 3 ranks; type a multiple, for example --batch-size 24"),
        (["--page", "no/such/page.md"], "--page no/such/page.md cannot be written"),
        (["--merge", "nothing.json"], "--merge nothing.json cannot be read as a file of this bench"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(asked: Asked, in_tmp_path: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        bench(*arguments)
    assert not asked
