"""`deepscale report`: what it finds in MLflow and in files, what it refuses, and what --resend sends."""

import contextlib
import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from flows import made_up_flow
from test_report import embedded

from deepscale import cli, tracking
from deepscale.config import TrackingConfig
from deepscale.report import command
from deepscale.tracking_read import Reader
from deepscale.tracking_store import Store
from deepscale.tracking_writer import UNSENT_NAME, UnsentFile

pytest.importorskip("mlflow")


def record(name: str, experiment: str, flow_file: Path | None, finish: bool = True, **parameters: object) -> tracking.Tracker:
    """A run with what training logs."""
    values = {"built_depth": 26, "parameters": 1000, "planned_memory_bytes": 5_000_000, "data_dir": "/elsewhere", **parameters}
    tags = {"gradient_verdict": "healthy", "gradient_verdict_text": "healthy: as it should be"} if flow_file else {}
    place = TrackingConfig(experiment=experiment)
    tracker = tracking.open_tracker(place, run_name=name, parameters=values, tags=tags, dataset=None, rank=0, warn=pytest.fail)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 2.5 - step / 10, "perf/step_s": 9.0 if step == 1 else 0.25, "grad/first_layer_mean_abs": 1 / step}, step)
    tracker.log({"val/accuracy": 0.625, "val/loss": 1.5, "test/accuracy": 0.5, "perf/peak_memory_over_start_bytes": 7e6}, 3)
    if flow_file:
        tracker.file(flow_file)
    if finish and name == "off":
        tracker.tags({"outcome": "out_of_memory"})
        tracker.finish("FAILED")
    elif finish:
        tracker.finish("FINISHED")
    return tracker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder: the experiment deepscale with records of two runs, one without and one broken; another without any."""
    place = tmp_path_factory.mktemp("report")
    with contextlib.chdir(place):
        made_up_flow(26, 3).save(Path("a", "gradflow.npz"))
        made_up_flow(110, 4).save(Path("b", "gradflow.npz"))
        Path("c").mkdir()
        Path("c", "gradflow.npz").write_bytes(Path("a", "gradflow.npz").read_bytes()[:2000])
        record("first", "deepscale", Path("a/gradflow.npz"), width=8)
        record("second", "deepscale", Path("b/gradflow.npz"), width=16, built_depth=110)
        record("off", "deepscale", None, width=8, record_every=0)
        record("broken", "deepscale", Path("c/gradflow.npz"), width=8)
        record("bare", "without", None)
        record("going on", "running", None, finish=False)._finished = True  # type: ignore[attr-defined]
        deadline = time.monotonic() + 20
        while len(Reader().history(Reader().run("going on"), "perf/step_s")) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    return place


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    *_, sentence = shown.err.splitlines()
    return sentence


def test_an_experiment(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run stands in the table with its numbers; the record that is missing and the one that is broken are warnings."""
    with contextlib.chdir(folder):
        cli.main(["report", "--out", str(tmp_path / "out")])
    assert "index.html: 4 runs, " in capsys.readouterr().out
    data = embedded(tmp_path / "out" / "index.html")
    runs = {run["name"]: run for run in data["runs"]}
    assert list(runs) == ["broken", "off", "second", "first"]
    assert runs["first"]["numbers"] == {
        "depth": 26, "parameters": 1000, "planned_memory_bytes": 5e6, "validation_accuracy": 0.625, "validation_loss": 1.5, "test_accuracy": 0.5,
        "training_loss": pytest.approx(2.2), "peak_memory_bytes": 7e6, "step_s": 0.25,
    }  # fmt: skip
    assert (runs["first"]["verdict"], runs["first"]["text"], runs["first"]["converged"]) == ("healthy", "healthy: as it should be", True)
    assert (runs["first"]["status"], runs["off"]["status"]) == ("FINISHED", "out of memory")
    assert data["settings"] == ["width", "record_every"]
    assert runs["off"]["curves"] == {}
    assert runs["off"]["first_layer"] == [[1.0, 1.0], [2.0, 0.5], [3.0, 0.3333]]
    assert len(runs["first"]["first_layer"]) == 3
    missing, broken = data["warnings"]
    assert missing == "no record of 1 of 4 runs (off): it was recorded without gradient flow (--record-every 0); train again without this option"
    assert broken.startswith("broken: gradflow.npz is not a readable record")
    assert str(folder) not in (tmp_path / "out" / "index.html").read_text()


def test_runs_by_name_by_file_and_by_folder(folder: Path, tmp_path: Path) -> None:
    """One of MLflow beside two files; a setting comes from the record's own description."""
    described = made_up_flow(26, 3)
    described.meta = {"run_name": "from a file", "settings": {"width": 32, "parameters": 77}}
    described.save(tmp_path / "x.npz")
    with contextlib.chdir(folder):
        cli.main(["report", "--runs", "second", "a", str(tmp_path / "x.npz"), "second", "--out", str(tmp_path), "--single-file"])
    runs = embedded(tmp_path / "index.html")["runs"]
    assert [(run["name"], run["numbers"]["depth"]) for run in runs] == [("second", 110), ("made-up 26", 26), ("from a file", 26)]
    assert runs[2]["settings"]["width"] == "32"
    assert runs[2]["numbers"]["parameters"] == 77


def test_files_need_no_mlflow(folder: Path, in_tmp_path: Path) -> None:
    """No database is there, and none is made."""
    cli.main(["report", "--runs", str(folder / "a"), str(folder / "b" / "gradflow.npz")])
    assert [path.name for path in in_tmp_path.iterdir()] == ["report"]


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence and exit code 2 each, and no page."""
    out = ("--out", str(tmp_path / "out"))
    Path(tmp_path / "empty").mkdir()
    with contextlib.chdir(folder):
        assert "the experiment 'x' is not in sqlite:" in refused(capsys, "--experiment", "x", *out)
        assert "the experiment 'Default' has no run; train one" in refused(capsys, "--experiment", "Default", *out)
        assert "none of the 1 runs has a record of its gradient flow; of 'bare': it ended" in refused(capsys, "--experiment", "without", *out)
        assert "'going on': it is still running and its record comes at the end" in refused(capsys, "--experiment", "running", *out)
        assert "no run is named 'x'; possible: going on, bare, broken, off, second, first" in refused(capsys, "--runs", "x", *out)
        assert "run 'off' has no gradflow.npz: it was recorded without gradient flow" in refused(capsys, "--runs", "first", "off", *out)
        assert "gradflow.npz is not a readable record of gradient flow" in refused(capsys, "--runs", "broken", *out)
        assert "gradflow.npz is not a readable record of gradient flow" in refused(capsys, "--runs", "c", *out)
        assert "there is no record nothing.npz" in refused(capsys, "--runs", "nothing.npz", *out)
        assert "empty has no gradflow.npz; give a run's folder" in refused(capsys, "--runs", str(tmp_path / "empty"), *out)
        assert "expected at least one argument" in refused(capsys, "--runs")
    with contextlib.chdir(tmp_path / "empty"):
        assert "there is no mlflow.db in this folder" in refused(capsys)
        assert not list(Path().iterdir())
    assert not (tmp_path / "out").exists()


def unsent(name: str, uri: str) -> Path:
    """A file of a run that could not be sent."""
    file = UnsentFile(Store(uri, "late", name, 1_790_000_000_000), Path("runs", name))
    values = [{"op": "metrics", "step": step, "time_ms": 1, "values": {"train/loss": 1.0 / step}} for step in (1, 2, 3)]
    file.keep([{"op": "parameters", "values": {"built_depth": "26"}}, *values, {"op": "finish", "status": "FINISHED", "time_ms": 5}])
    assert file.path is not None
    return file.path


def test_resend_sends_everything_and_says_what(folder: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs that MLflow never saw are there afterwards, and their files are gone; then there is nothing to send."""
    shutil.copy(folder / "mlflow.db", "mlflow.db")  # making a new one takes MLflow 4 s
    paths = [unsent(name, f"sqlite:///{in_tmp_path}/mlflow.db") for name in ("one", "two")]
    cli.main(["report", "--resend"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" to sqlite")[0] for line in said] == ["sent 5 records of one", "sent 5 records of two"]
    assert not any(path.exists() for path in paths)
    reader = Reader()
    assert {run.info.run_name for run in reader.runs("late")} == {"one", "two"}
    assert reader.history(reader.run("one"), "train/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    cli.main(["report", "--resend"])
    assert "nothing to send" in capsys.readouterr().out


def test_resend_to_a_dead_server_loses_nothing(
    folder: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, exit code 2, the files as before; the server is asked once; other stores still get theirs."""
    shutil.copy(folder / "mlflow.db", "mlflow.db")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    dead = [unsent(name, uri) for name in ("a", "b")]
    before = [path.read_text() for path in dead]
    alive = unsent("c", f"sqlite:///{in_tmp_path}/mlflow.db")
    torn = Path("runs", "torn", UNSENT_NAME)
    torn.parent.mkdir()
    torn.write_text('{"op": "metrics"}\n')
    asked = []
    resend = command.resend
    monkeypatch.setattr(command, "resend", lambda path, uri: (asked.append(path), resend(path, uri))[1])
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "--resend"])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.out.startswith("sent 5 records of c")
    assert len(shown.err.splitlines()) == 1
    assert shown.err.count(f"{uri} refused the connection") == 2
    assert f"{torn} is not a file of unsent records" in shown.err
    assert "nothing is lost, type the same again: deepscale report --resend" in shown.err
    assert [sorted(map(json.loads, path.read_text().splitlines()), key=str) for path in dead] == [
        sorted(map(json.loads, text.splitlines()), key=str) for text in before
    ]
    assert not alive.exists()
    assert len(asked) == 2
