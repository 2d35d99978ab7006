"""Runs written by the tracker against what MlflowClient reads back, and stores that fail in every way we know of."""

import contextlib
import json
import math
import shutil
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepscale import tracking, tracking_store, tracking_system, tracking_writer
from deepscale.config import TrackingConfig
from deepscale.tracking_writer import UNSENT_NAME, read_file, resend

tracking_store.import_mlflow()
from mlflow import MlflowClient  # noqa: E402


@dataclass(frozen=True)
class Images:
    """The least a data set tells the tracker, and one field more."""

    name: str = "cifar10"
    digest: str = "0123456789abcdef" * 4
    source: str = "/somewhere/cifar10"
    classes: int = 10


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, short waits, no tracking address from outside."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking_writer, "LINGER_S", 0.05)
    monkeypatch.setattr(tracking_store, "SQLITE_WAIT_S", 0.2)
    # Left before pytest removes it.
    with contextlib.chdir(tmp_path):
        yield tmp_path


@pytest.fixture
def database(folder: Path, empty_store: Path) -> Path:
    """The working folder's mlflow.db, with its tables."""
    return Path(shutil.copy(empty_store, folder / "mlflow.db"))


def start(warnings: list[str], rank: int = 0, parameters: dict[str, Any] | None = None, **settings: Any) -> tracking.Tracker:
    return tracking.open_tracker(
        TrackingConfig(**settings),
        run_name="26 layers",
        parameters=parameters or {},
        tags={"dataset": "cifar10"},
        dataset=Images(),
        rank=rank,
        warn=warnings.append,
    )


def only_run(database: Path) -> Any:
    client = MlflowClient(f"sqlite:///{database}")
    found = client.get_experiment_by_name("deepscale")
    runs = client.search_runs([found.experiment_id])
    assert len(runs) == 1
    return runs[0]


def history(database: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    values = MlflowClient(f"sqlite:///{database}").get_metric_history(run_id, key)
    return sorted((value.step, value.value) for value in values)


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------------ a store that works


def test_everything_is_read_back(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_system.SystemSampler.__init__, "__defaults__", (0.05,))
    warnings: list[str] = []
    tracker = start(warnings, parameters={"depth": 26, "max_steps": None, "recompute": True, "blocks": (1, 1, 5, 1), "lr": 1e-3})
    Path("notes.md").write_text("by hand")
    for step in range(1, 201):
        tracker.log({"train/loss": 2.0 / step, "perf/images_per_s": 100.0}, step)
    tracker.tags({"verdict": "healthy"})
    tracker.text("summary.json", '{"loss": 0.01}')
    tracker.file(Path("notes.md"))
    time.sleep(0.2)
    tracker.finish("FINISHED")
    tracker.finish("FAILED")
    assert warnings == []

    run = only_run(database)
    assert run.info.run_id == tracker.run_id and run.info.run_name == "26 layers" and run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {"depth": "26", "max_steps": "none", "recompute": "true", "blocks": "1,1,5,1", "lr": "0.001"}
    assert history(database, run.info.run_id, "train/loss") == [(step, 2.0 / step) for step in range(1, 201)]
    assert run.data.tags["verdict"] == "healthy" and run.data.tags["dataset"] == "cifar10"
    assert run.data.tags["host"] == socket.gethostname() and "mlflow.user" in run.data.tags
    assert 0 < run.data.metrics["system/system_memory_usage_percentage"] <= 100
    [used] = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.dataset.source_type) == ("cifar10", Images.digest[:36], "local")
    assert used.dataset.source == Images.source and json.loads(used.dataset.profile) == {"classes": 10}
    assert [tag.value for tag in used.tags] == ["training"]

    client = MlflowClient(f"sqlite:///{database}")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"summary.json", "notes.md"}
    assert Path(client.download_artifacts(run.info.run_id, "summary.json")).read_text() == '{"loss": 0.01}'
    assert list(Path("mlruns/deepscale").iterdir()) and not Path("runs").exists()


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_is_closed_as_told(database: Path, status: str) -> None:
    start([]).finish(status)
    assert only_run(database).info.status == status


def test_a_metric_that_is_not_finite(database: Path) -> None:
    tracker = start([])
    tracker.log({"train/loss": math.nan, "grad/norm": math.inf, "grad/slope": -math.inf, "lr": 1.0}, 3)
    tracker.finish("FINISHED")
    run = only_run(database)
    assert math.isnan(run.data.metrics["train/loss"]) and run.data.metrics["lr"] == 1.0
    assert "grad/norm" not in run.data.metrics and "grad/slope" not in run.data.metrics
    assert run.data.tags["skipped_infinite_metrics"] == "2"


def test_settings_mlflow_would_refuse(database: Path) -> None:
    warnings: list[str] = []
    many = {f"setting {index}": index for index in range(230)}
    tracker = start(warnings, parameters={"a[0]#b": "x", "long": "y" * 7000, "empty": "", "grün": "ü", "/../odd//": 1, **many})
    tracker.parameters({"empty": "", "long": "changed"})
    tracker.log({f"metric {index}": index for index in range(2300)}, 0)
    tracker.tags({"note": "z" * 9000})
    tracker.finish("FINISHED")
    run = only_run(database)
    assert run.data.params["a_0__b"] == "x" and run.data.params["empty"] == "" and run.data.params["grün"] == "ü" and run.data.params["odd"] == "1"
    assert run.data.params["long"].startswith("yyy") and len(run.data.params["long"]) == 6000
    assert len(run.data.params) == 235 and len([key for key in run.data.metrics if key.startswith("metric")]) == 2300
    assert len(run.data.tags["note"]) == 8000
    assert len(warnings) == 1 and "long" in warnings[0]


@given(st.text(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_name_becomes_one_mlflow_accepts(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    key = tracking_store.clean_key(name)
    _validate_metric_name(key)
    _validate_param_name(key)
    assert tracking_store.clean_key(key) == key


def test_only_rank_zero_writes_and_only_when_asked(folder: Path) -> None:
    for tracker in (start([], rank=1), start([], tracking=False)):
        tracker.log({"train/loss": 1.0}, 0)
        tracker.parameters({"a": 1})
        tracker.tags({"a": "b"})
        tracker.text("a.txt", "b")
        tracker.file(folder / "missing")
        tracker.finish("FINISHED")
        assert tracker.run_id is None and tracker.view_command() == ""
    assert list(folder.iterdir()) == []


def test_without_mlflow_a_sentence_says_what_to_type(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    warnings: list[str] = []
    assert isinstance(start(warnings), tracking.NullTracker)
    assert len(warnings) == 1 and "pip install deepscale" in warnings[0] and "mlflow" in warnings[0]
    tracking.preload()


def test_the_line_that_shows_the_run(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start([])
    tracker.finish("FINISHED")
    assert tracker.view_command().endswith("mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1")
    elsewhere = tracking.view_command("sqlite:////data/my runs/mlflow.db")
    assert "'sqlite:////data/my runs/mlflow.db'" in elsewhere
    assert "secret" not in tracking.view_command("postgresql://me:secret@db/mlflow")
    monkeypatch.setattr(sys, "executable", str(database.parent / "bin" / "python"))
    assert tracking.view_command("sqlite:///x.db").startswith("mlflow ui ")


PROCESS = """
import multiprocessing
from deepscale import tracking
from deepscale.config import TrackingConfig

def start(name):
    tracker = tracking.open_tracker(TrackingConfig(), run_name=name, parameters={}, tags={}, dataset=None, rank=0, warn=print)
    tracker.log({"a": 1.0}, 0)
    return tracker

def work(name, gate):
    gate.wait()
    start(name).finish("FINISHED")

tracking.preload().join()
fork = multiprocessing.get_context("fork")
gate = fork.Barrier(4)
children = [fork.Process(target=work, args=(str(index), gate)) for index in range(4)]
for child in children:
    child.start()
for child in children:
    child.join()
left_open = start("left open")
raise SystemExit("by hand")
"""


def test_four_processes_at_once_in_an_empty_folder_and_one_that_dies(folder: Path) -> None:
    """The four create tables and experiment at the same time; the last leaves without `finish` and is closed as FAILED. Nothing is printed."""
    Path("process.py").write_text(PROCESS)
    done = subprocess.run([sys.executable, "process.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False)
    assert done.stdout == "by hand\n"
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [experiment] = [found for found in client.search_experiments() if found.name == "deepscale"]
    runs = client.search_runs([experiment.experiment_id])
    statuses = {run.info.run_name: run.info.status for run in runs}
    assert statuses == {"0": "FINISHED", "1": "FINISHED", "2": "FINISHED", "3": "FINISHED", "left open": "FAILED"}
    assert all(run.data.metrics["a"] == 1.0 for run in runs)


def test_a_command_that_ends_while_mlflow_is_loading_ends_quietly(folder: Path) -> None:
    line = "from deepscale import tracking; tracking.preload(); raise SystemExit(2)"
    done = subprocess.run([sys.executable, "-c", line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")


# ------------------------------------------------------------------------------------------------------------------- stores that fail


def unsent(folder: Path) -> Path:
    [path] = folder.glob(f"runs/*/{UNSENT_NAME}")
    return path


def kept_metrics(folder: Path) -> list[tuple[int, dict[str, float]]]:
    ops = read_file(unsent(folder))
    return [(op["step"], op["values"]) for op in ops if op["op"] == "metrics" and "train/loss" in op["values"]]


def train_against_a_dead_store(folder: Path, names: str, within_s: float) -> tracking.Tracker:
    """100 steps cost nothing, one warning names address, cause and file, and the file holds all of the run."""
    warnings: list[str] = []
    begin = time.monotonic()
    tracker = start(warnings, parameters={"depth": 26})
    opened = time.monotonic()
    for step in range(100):
        tracker.log({"train/loss": float(step)}, step)
    assert time.monotonic() - opened < 0.5
    tracker.finish("FINISHED")
    assert time.monotonic() - begin < within_s
    assert len(warnings) == 1
    assert names in warnings[0] and tracking_store.shown(tracking_store.store_uri()) in warnings[0] and str(unsent(folder)) in warnings[0]
    assert kept_metrics(folder) == [(step, {"train/loss": float(step)}) for step in range(100)]
    kinds = [op["op"] for op in read_file(unsent(folder))]
    assert kinds[0] == "run" and {"parameters", "tags", "dataset"} < set(kinds) and kinds[-1] == "finish"
    assert tracker.view_command() == f"less {unsent(folder)}"
    return tracker


def test_a_server_that_is_not_there_and_the_file_sent_later(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        train_against_a_dead_store(database.parent, "refused the connection", 5.0)
    run_id, refused = resend(unsent(database.parent), f"sqlite:///{database}")
    run = only_run(database)
    assert (run_id, refused) == (run.info.run_id, 0) and not list(Path("runs").glob("*"))
    assert history(database, run_id, "train/loss") == [(step, float(step)) for step in range(100)]
    assert run.info.status == "FINISHED" and run.data.params == {"depth": "26"} and run.inputs.dataset_inputs
    assert run.info.end_time - run.info.start_time < 5000


def test_a_server_that_accepts_and_never_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    class Mute(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            ended.wait(20)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mute) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.server_address[1]}")
        train_against_a_dead_store(folder, "did not answer in time", 8.0)
        ended.set()
        server.shutdown()
    assert "secret" not in unsent(folder).read_text()


class FakeServer(ThreadingHTTPServer):
    """A fake of the few tracking server calls that a run makes; `broken` makes it answer 500 to everything."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.broken = False
        self.metrics: set[tuple[str, int, float]] = set()
        self.calls: list[str] = []


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = self.path.partition("?")[0].partition("mlflow/")[2]
        self.server.calls.append(call)
        if self.server.broken:
            self.reply(500, {"error_code": "INTERNAL_ERROR", "message": "by hand"})
            return
        sent = json.loads(body) if body else {}
        self.server.metrics |= {(one["key"], int(one.get("step", 0)), float(one["value"])) for one in sent.get("metrics", [])}
        replies = {
            "experiments/get-by-name": {"experiment": {"experiment_id": "7", "name": "deepscale", "lifecycle_stage": "active"}},
            "runs/create": {"run": {"info": {"run_id": "abc", "experiment_id": "7", "status": "RUNNING", "lifecycle_stage": "active"}, "data": {}}},
        }
        self.reply(200, replies.get(call, {}))

    do_GET = do_POST = answer

    def reply(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()


@pytest.mark.parametrize("returns", [True, False])
def test_a_server_that_dies_in_the_middle(server: FakeServer, folder: Path, returns: bool) -> None:
    """Nothing is lost: all 60 steps are on the server if it returns before the end, else those after its death in the file."""
    warnings: list[str] = []
    tracker = start(warnings)
    for step in range(60):
        tracker.log({"train/loss": float(step)}, step)
        if step == 29:
            until(lambda: len(server.metrics) == 30)
            server.broken = True
    until(lambda: warnings)
    server.broken = not returns
    tracker.finish("FINISHED")
    on_server = {step for key, step, _ in server.metrics if key == "train/loss"}
    assert "by hand" in warnings[0] or "server errors" in warnings[0]
    if returns:
        assert on_server == set(range(60)) and not list(folder.glob("runs/*"))
        assert len(warnings) == 2 and "works again" in warnings[1] and server.calls[-1] == "runs/update"
    else:
        assert on_server == set(range(30)) and [step for step, _ in kept_metrics(folder)] == list(range(30, 60))
        header = read_file(unsent(folder))[0]
        assert len(warnings) == 1 and header["run_id"] == "abc" and unsent(folder).parent.name.startswith("26_layers-")
    assert tracker.view_command().endswith("/#/experiments/7/runs/abc")


def test_a_slow_server_does_not_slow_the_end_and_the_rest_is_kept(server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_writer, "FINISH_WAIT_S", 0.3)
    monkeypatch.setattr(FakeHandler, "do_POST", lambda self: time.sleep(0.6) or FakeHandler.answer(self))
    warnings: list[str] = []
    tracker = start(warnings)
    for step in range(5):
        tracker.log({"train/loss": float(step)}, step)
    begin = time.monotonic()
    tracker.finish("FINISHED")
    # System metrics are read once more, and the writer is waited for.
    assert time.monotonic() - begin < 3.0
    assert len(warnings) == 1 and str(unsent(folder)) in warnings[0]
    assert read_file(unsent(folder))[-1]["op"] == "finish"
    assert {step for step, _ in kept_metrics(folder)} | {step for _, step, _ in server.metrics} == set(range(5))


def test_more_than_the_queue_holds_goes_to_the_file_at_once(server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_writer, "QUEUE_OPS", 10)
    monkeypatch.setattr(tracking_writer, "LINGER_S", 1.0)
    tracker = start([])
    for step in range(50):
        tracker.log({"train/loss": float(step)}, step)
    assert len(kept_metrics(folder)) >= 38
    tracker.finish("FINISHED")
    assert {step for key, step, _ in server.metrics if key == "train/loss"} == set(range(50)) and not list(folder.glob("runs/*"))


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def test_a_database_locked_all_the_time(database: Path) -> None:
    with locked(database):
        tracker = train_against_a_dead_store(database.parent, "locked by another process", 5.0)
    assert tracker.run_id is None


def test_a_database_locked_for_a_while(database: Path) -> None:
    warnings: list[str] = []
    with locked(database):
        tracker = start(warnings, parameters={"depth": 26})
        tracker.log({"train/loss": 1.0}, 0)
        assert tracker.run_id is None
    tracker.log({"train/loss": 0.5}, 1)
    tracker.finish("FINISHED")
    run = only_run(database)
    assert len(warnings) == 2 and "works again" in warnings[1]
    assert history(database, run.info.run_id, "train/loss") == [(0, 1.0), (1, 0.5)]
    assert run.data.params == {"depth": "26"} and run.info.status == "FINISHED" and tracker.run_id == run.info.run_id


def test_a_file_that_is_no_database(folder: Path) -> None:
    Path("mlflow.db").write_text("not a database, but long enough to be read as the header of one" * 40)
    train_against_a_dead_store(folder, "is not an SQLite database", 5.0)
    assert Path("mlflow.db").read_text().startswith("not a database")


def test_a_missing_file_stops_nothing_else(database: Path) -> None:
    warnings: list[str] = []
    tracker = start(warnings)
    tracker.file(Path("never_written.png"))
    tracker.log({"train/loss": 1.0}, 0)
    tracker.finish("FINISHED")
    run = only_run(database)
    assert run.data.metrics["train/loss"] == 1.0 and run.info.status == "FINISHED"
    assert len(warnings) == 1 and "never_written.png" in warnings[0]
    assert [op["op"] for op in read_file(unsent(database.parent))] == ["run", "file"]


def test_a_file_cut_by_a_crash_is_sent_as_far_as_it_goes(database: Path) -> None:
    with locked(database):
        tracker = start([])
        tracker.log({"train/loss": math.nan}, 0)
        tracker.finish("FAILED")
    path = unsent(database.parent)
    path.write_text(path.read_text() + '{"op": "metrics", "step": 1, "val')
    run_id, refused = resend(path)
    assert refused == 0 and not path.exists()
    assert math.isnan(history(database, run_id, "train/loss")[0][1]) and only_run(database).info.status == "FAILED"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    with pytest.raises(ValueError, match="names no run"):
        resend(path)
