"""What the tracker wrote comes back; what is not there is a sentence; reading creates nothing."""

import contextlib
import shutil
import socket
from pathlib import Path

import pytest

from deepscale import tracking
from deepscale.config import TrackingConfig
from deepscale.errors import UsageError
from deepscale.tracking_read import Reader, artifact_of, listed

pytest.importorskip("mlflow")

NAMES = ("plain", "it's", "a \"b\" 'c'", "plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with four runs in two experiments; two share a name, the newer holds a file."""
    place = tmp_path_factory.mktemp("read")
    with contextlib.chdir(place):
        Path("gradflow.npz").write_text("a record")
        for i, name in enumerate(NAMES):
            setting = TrackingConfig(experiment="first" if i < 2 else "second")
            parameters = {"n": i, "record_every": 0 if i == 1 else "auto"}
            tracker = tracking.open_tracker(setting, run_name=name, parameters=parameters, tags={}, dataset=None, rank=0, warn=pytest.fail)
            for step, value in ((1, 0.5), (2, 4.0), (3, 1.5), (4, 2.0)):
                tracker.log({"value": value + i}, step)
            if i == 3:
                tracker.file(Path("gradflow.npz"))
            tracker.finish("FINISHED")
    return place


@pytest.fixture
def inside(folder: Path) -> "contextlib.AbstractContextManager[None]":
    return contextlib.chdir(folder)


def test_runs_by_name_and_by_id_the_newest_first(inside: "contextlib.AbstractContextManager[None]") -> None:
    """Names with either quote or both; of two runs of a name the newer; in one experiment the older."""
    with inside:
        reader = Reader()
        assert set(reader.experiments) >= {"first", "second"}
        assert [run.info.run_name for run in reader.runs()] == list(reversed(NAMES))
        assert [run.data.params["n"] for run in reader.runs("first")] == ["1", "0"]
        for name, expected in (("plain", "3"), (NAMES[1], "1"), (NAMES[2], "2")):
            run = reader.run(name)
            assert run.data.params["n"] == expected
            assert reader.run(run.info.run_id).info.run_id == run.info.run_id
        assert reader.run("plain", "first").data.params["n"] == "0"


def test_histories_and_medians(inside: "contextlib.AbstractContextManager[None]") -> None:
    with inside:
        reader = Reader()
        run = reader.run("plain", "first")
        assert reader.history(run, "value") == [(1, 0.5), (2, 4.0), (3, 1.5), (4, 2.0)]
        assert reader.median(run, "value") == 1.75
        assert reader.history(run, "other") == []
        assert reader.median(run, "other") is None


def test_an_artifact_of_a_run_in_any_experiment(inside: "contextlib.AbstractContextManager[None]") -> None:
    """By name and by id; a run without one says why."""
    with inside:
        assert artifact_of("plain", "gradflow.npz").read_text() == "a record"
        assert artifact_of(Reader().run("plain").info.run_id, "gradflow.npz").read_text() == "a record"
        with pytest.raises(UsageError, match=r"has no gradflow.npz: it was recorded without gradient flow \(--record-every 0\)"):
            artifact_of("it's", "gradflow.npz")
        with pytest.raises(UsageError, match=r"has no gradflow.npz: it ended before its record was written, or deepscale was older"):
            artifact_of(NAMES[2], "gradflow.npz")


def test_what_is_not_there_lists_what_is(inside: "contextlib.AbstractContextManager[None]") -> None:
    with inside:
        with pytest.raises(UsageError, match="no run is named 'other'; possible: plain, a \"b\" 'c', it's"):
            artifact_of("other", "gradflow.npz")
        with pytest.raises(UsageError, match=r"no run is named '0{32}'; possible: plain"):
            Reader().run("0" * 32)
        with pytest.raises(UsageError, match=r"the experiment 'other' is not in sqlite:.*possible: .*first"):
            Reader().runs("other")
        with pytest.raises(UsageError, match="no run is named 'x': there is no run in the experiment 'Default'"):
            Reader().run("x", "Default")


def test_a_long_list_is_cut() -> None:
    assert listed([f"{i}" for i in range(25)], most=3) == "0, 1, 2 and 22 more"


def test_reading_creates_nothing(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No database, an empty one, no folder of MLflow's files: a sentence, and the place stays as it is."""
    with pytest.raises(UsageError, match=r"no run is recorded here: there is no mlflow.db in this folder"):
        Reader()
    for uri in ("sqlite:///elsewhere/other.db", "file:elsewhere", "elsewhere"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UsageError, match="no run is recorded here"):
            Reader()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert not list(in_tmp_path.iterdir())
    Path("mlflow.db").touch()
    with pytest.raises(UsageError, match="no run is recorded here"):
        Reader()
    assert Path("mlflow.db").stat().st_size == 0


def test_a_store_that_fails_is_a_sentence_without_the_password(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no database; a server that is not there."""
    Path("mlflow.db").write_text("no database at all, whatever its name says\n" * 10)
    with pytest.raises(UsageError, match=r"the runs cannot be read: .* is not an SQLite database"):
        Reader().runs()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UsageError, match=r"http://user:\*\*\*@127.0.0.1:\d+ refused the connection"):
        Reader().runs()


def test_a_folder_of_runs_that_moved_is_said_to_have_no_record(folder: Path, in_tmp_path: Path) -> None:
    """The database alone, copied away from its artifacts."""
    shutil.copy(folder / "mlflow.db", "mlflow.db")
    hidden = folder / "mlruns.away"
    (folder / "mlruns").rename(hidden)
    try:
        with pytest.raises(UsageError, match=r"has no gradflow\.npz"):
            artifact_of("plain", "gradflow.npz")
    finally:
        hidden.rename(folder / "mlruns")
