"""`deepscale merge`: runs of several real MLflow databases in one, once; what has grown since is brought up to date."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepscale import merge, tracking_store
from deepscale.errors import UsageError
from deepscale.report import collect
from deepscale.tracking_read import Reader
from deepscale.tracking_store import Store

pytest.importorskip("mlflow")
tracking_store.import_mlflow()
from mlflow import MlflowClient  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

Job = Callable[..., Store]


@pytest.fixture
def job(in_tmp_path: Path, empty_store: Path) -> Job:
    """`job("jobs/a")` records a run in a store of its own there, in the middle of its training; the target is mlflow.db beside `jobs`."""
    shutil.copy(empty_store, in_tmp_path)

    def record(folder: str, name: str = "run", steps: int = 3, **settings: str) -> Store:
        place = in_tmp_path / folder
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "mlflow.db").exists():
            shutil.copy(empty_store, place)
        store = Store(f"sqlite:///{place / 'mlflow.db'}", "deepscale", name, 1_700_000_000_000)
        store.open()
        store.send([metrics(step, {"train/loss": 2.3 - step / 10, "grad/first_layer_mean_abs": math.nan}) for step in range(steps)])
        store.send([{"op": "parameters", "values": {"depth": "26", "note": 'it\'s "quoted"', **settings}}])
        store.send([{"op": "tags", "values": {"gradient_verdict": "healthy"}}])
        store.send([{"op": "dataset", "name": "synthetic", "digest": "abc", "source": "memory", "profile": '{"images": 18000}'}])
        store.send([{"op": "text", "name": "summary.json", "content": "{}"}])
        store.send([{"op": "text", "name": "curves/loss.csv", "content": "step,loss\n"}])
        return store

    return record


def metrics(step: int, values: dict[str, float]) -> dict[str, Any]:
    return {"op": "metrics", "step": step, "time_ms": 1_700_000_000_000 + step, "values": values}


def finish(store: Store) -> None:
    store.send([{"op": "finish", "status": "FINISHED", "time_ms": 1_700_000_100_000}])


def content(uri: str) -> list[dict[str, Any]]:
    """All that a store holds of each run, ids and places aside."""
    reader, client, found = Reader(uri), MlflowClient(uri), []
    for run in reader.runs("deepscale"):
        points = {
            key: sorted((p.step, p.timestamp, repr(p.value)) for p in client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics
        }
        artifacts = [entry.path for entry in client.list_artifacts(run.info.run_id)]
        tags = {name: value for name, value in run.data.tags.items() if not name.startswith("merged_")}
        inputs = [(entry.dataset.name, entry.dataset.digest, entry.dataset.profile) for entry in run.inputs.dataset_inputs]
        info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
        found.append({"info": info, "params": run.data.params, "points": points, "tags": tags, "inputs": inputs, "artifacts": sorted(artifacts)})
    return sorted(found, key=lambda run: run["info"][0])


def here() -> str:
    """The target. Its whole path: MLflow keeps what it has opened by its address."""
    return tracking_store.store_uri()


def test_a_copy_holds_all_that_the_run_holds_and_a_second_merge_adds_nothing(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Two jobs' stores; the copy against the originals, and everything against itself after merging again."""
    stores = [job("jobs/train-1", "first"), job("jobs/train-2_0", "second", width="8")]
    for store in stores:
        finish(store)
    originals = [run for store in stores for run in content(store.uri)]
    merge.main(["jobs"])
    assert content(here()) == originals
    assert "2 new; 2 stores read" in capsys.readouterr().out
    merge.main(["jobs", "jobs/train-1"])
    assert content(here()) == originals
    assert "2 unchanged; 2 stores read" in capsys.readouterr().out
    reader = Reader(here())
    copied = reader.artifact(reader.run("first"), "curves/loss.csv")
    assert copied is not None and copied.read_text() == "step,loss\n" and "jobs" not in copied.parts
    assert {run.name for run in collect.of_experiment("deepscale")[0]} == {"first", "second"}  # what `deepscale report` shows


def test_a_run_that_has_grown_is_brought_up_to_date(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Merged in the middle of its training, after it went on, and after its end; a requeued one is running again."""
    store = job("jobs/train-1")
    merge.main(["jobs"])
    assert content(here())[0]["info"][1] == "RUNNING"
    store.send([metrics(3, {"train/loss": 1.5, "val/accuracy": 0.4})])
    store.send([{"op": "tags", "values": {"gradient_verdict": "vanishing"}}])
    store.send([{"op": "text", "name": "summary.json", "content": '{"steps": 4}'}])
    finish(store)
    capsys.readouterr()
    merge.main(["jobs"])
    assert "brought up to date: run" in capsys.readouterr().out
    assert content(here()) == content(store.uri)
    reader = Reader(here())
    summary = reader.artifact(reader.run("run"), "summary.json")
    assert summary is not None and summary.read_text() == '{"steps": 4}'
    MlflowClient(store.uri).update_run(store.run_id, status="RUNNING")
    merge.main(["jobs"])
    assert content(here())[0]["info"][1] == "RUNNING"


def test_a_merge_that_was_cut_off_is_completed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target fails after the run is made; the next merge fills that run instead of making another."""
    store = job("jobs/train-1")
    finish(store)
    monkeypatch.setattr(Store, "_metrics", lambda self, ops: (_ for _ in ()).throw(OSError("database is locked")))
    with pytest.raises(UsageError, match=r"not merged: .*train-1.* is locked by another process"):
        merge.main(["jobs"])
    monkeypatch.undo()
    assert not content(here())[0]["points"]
    merge.main(["jobs"])
    assert content(here()) == content(store.uri)


def test_a_copy_that_was_deleted_stays_deleted(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Who deletes a run in the target does not get it back with the next merge."""
    job("jobs/train-1")
    merge.main(["jobs"])
    MlflowClient(here()).delete_run(Reader(here()).run("run").info.run_id)
    capsys.readouterr()
    merge.main(["jobs"])
    assert not content(here())
    assert "1 deleted in the target, left alone" in capsys.readouterr().out


def test_a_folder_that_was_moved_brings_its_artifacts(job: Job, in_tmp_path: Path) -> None:
    """A store remembers where its artifacts lay; brought home from a cluster they lie elsewhere."""
    finish(job("jobs/train-1"))
    (in_tmp_path / "jobs").rename(in_tmp_path / "home")
    merge.main(["home"])
    assert content(here())[0]["artifacts"] == ["curves", "summary.json"]


def test_what_cannot_be_merged_is_named_and_the_rest_is_merged(job: Job, in_tmp_path: Path) -> None:
    """A store that is none, folders without one, a folder that is not there; the target itself is no source."""
    finish(job("jobs/b"))
    (in_tmp_path / "jobs" / "a").mkdir()
    (in_tmp_path / "jobs" / "a" / "mlflow.db").write_text("no database, but long enough to look like a file of some kind" * 100)
    with pytest.raises(UsageError, match=r"not merged: .*jobs/a/mlflow.db: .*is not an SQLite database"):
        merge.main(["."])
    assert len(content(here())) == 1
    with pytest.raises(UsageError, match=r"the folder nowhere is not there; .* deepscale merge SHARED/jobs"):
        merge.main(["nowhere"])
    (in_tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"there is no mlflow.db below empty"):
        merge.main(["empty"])


def test_a_target_that_is_down_gets_one_sentence(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is read."""
    job("jobs/a")
    job("jobs/b")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"http://127.0.0.1:9 refused the connection; .*nothing was merged"):
        merge.main(["jobs"])
