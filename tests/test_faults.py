"""What a run survives, and how it ends where it cannot: real runs of one and two processes, really stopped, killed and starved.

docs/faults.md says the same in a table. `make soak` (soak.py) kills at random; its short form is here.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import pytest
import soak
from conftest import REPOSITORY, Launch, end_group, free_port
from jobs import TINY, Server, Started
from test_train import Recorded, runs_in

from deepscale import checkpoints
from deepscale.report.command import main as report

TORCH = [*TINY, "--engine", "torch"]
ENDLESS = [*TORCH, "--max-steps", "1000000", "--checkpoint-every", "5steps", "--checkpoint-dir", "ck", "--resume", "auto"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Where runs are forked from."""
    pytest.importorskip("deepspeed")
    with Server() as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path) -> Path:
    """Where runs lie, with a tracking database."""
    shutil.copy(empty_store, tmp_path)
    return tmp_path


def only_run(folder: Path) -> Recorded:
    (run,) = runs_in(folder)
    return run


# ------------------------------------------------------------------------------------------------------------ ranks that hang or go


def test_a_rank_that_sleeps_is_named_and_the_record_closed(server: Server, folder: Path, sleeper: int = 0) -> None:
    """Rank 0, whose loop sleeps: its thread still closes the record, and rank 1 speaks."""
    script, timeout_s = str(REPOSITORY / "tests" / "sleeping_feed.py"), 6.0
    arguments = [*TORCH, "--max-steps", "20", "--hang-timeout", f"{timeout_s:g}s"]
    with Started(server, folder, arguments, 2, {"SLEEPER": str(sleeper)}, script) as run:
        run.until_said("step 1/")
        begin = time.monotonic()
        assert run.end() == [1, 1]
        took = time.monotonic() - begin
        (sentence,) = run.said("deepscale: ")
    assert f"deepscale: rank {sleeper} (process " in sentence and "has been at the data of step 5 for" in sentence, sentence
    assert "in sleeping_feed.py:" in sentence and "--hang-timeout" in sentence and "--resume auto" in sentence
    recorded = only_run(folder)
    assert (recorded.status, recorded.tags["outcome"], len(recorded.losses())) == ("FAILED", "failed", 4)
    assert recorded.tags["outcome_text"].startswith(f"rank {sleeper} (process ")
    assert took < timeout_s + 15, "the timeout and a few seconds"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named_by_another(server: Server, folder: Path, stopped: int) -> None:
    """SIGSTOP, as a machine that swaps: neither its loop nor its watchdog runs. Rank 0 also holds the ranks' key-value store."""
    with Started(server, folder, [*TORCH, "--max-steps", "1000000", "--hang-timeout", "5s"], 2) as run:
        run.until_said("step 1/")
        run.send(signal.SIGSTOP, [stopped])
        assert run.end() == [1, 1]
        # The stopped one, woken up, may see first that the other has gone, and say that.
        sentence, *woken = sorted(run.said("deepscale: "), key=lambda said: "has not been heard of for" not in said)
    assert f"deepscale: rank {stopped} (process " in sentence and "has not been heard of for" in sentence, sentence
    assert all(said.startswith("deepscale: another rank of this run has ended") for said in woken) and len(woken) <= 1, woken
    assert ("may stay open" in sentence) == (stopped == 0)
    recorded = only_run(folder)
    assert (recorded.status, recorded.tags["outcome"]) == ("FAILED", "failed"), "rank 0 is woken up to see that the run is over"


@pytest.mark.launcher
def test_a_rank_that_is_killed_ends_the_run_under_the_launcher(launch: Launch, folder: Path) -> None:
    """kill -9 of rank 1 by itself at its fifth step; the launcher ends with the code of whichever rank it sees first."""
    script = folder / "train_until_killed.py"
    script.write_text(
        "import os, signal, sys\nfrom deepscale import loop, train\none = loop.Fit._one\n"
        "def step(fit, batches):\n"
        "    if fit.step == 4 and fit.run.world.rank == 1:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    one(fit, batches)\nloop.Fit._one = step\ntrain.main(sys.argv[1:])\n"
    )
    done = launch(*TINY, "--max-steps", "1000", ranks=2, script=script, cwd=folder)
    assert done.returncode in (1, 256 - signal.SIGKILL, -signal.SIGKILL), done.output
    assert "deepscale: another rank of this run has ended" in done.output
    assert f'File "{REPOSITORY}/deepscale' not in done.output, done.output
    recorded = only_run(folder)
    assert (recorded.status, recorded.tags["outcome"], len(recorded.losses())) == ("FAILED", "failed", 4)


@pytest.mark.parametrize(
    ("fault", "code", "outcome", "says"),
    [
        ("torch.empty(2**50)", 4, "out_of_memory", "rank 1 is out of memory on cpu: planned "),
        ("raise ValueError('a bug')", 1, "failed", "rank 1 has ended: ValueError: a bug"),
    ],
)
def test_what_ended_another_rank_is_what_the_run_says_and_records(
    server: Server, folder: Path, fault: str, code: int, outcome: str, says: str
) -> None:
    script = folder / "train_until_fault.py"
    script.write_text(
        "import sys\nimport torch\nfrom deepscale import loop, train\none = loop.Fit._one\n"
        "def step(fit, batches):\n"
        f"    if fit.step == 4 and fit.run.world.rank == 1:\n        {fault}\n"
        "    one(fit, batches)\nloop.Fit._one = step\ntrain.main(sys.argv[1:])\n"
    )
    with Started(server, folder, [*TORCH, "--max-steps", "1000"], 2, script=str(script)) as run:
        assert run.end() == [code, code], run.text()
        (sentence,) = run.said("deepscale: ")
        assert sentence.startswith(f"deepscale: {says}"), run.text()
    recorded = only_run(folder)
    assert (recorded.status, recorded.tags["outcome"], len(recorded.losses())) == ("FAILED", outcome, 4)
    assert recorded.tags["outcome_text"].startswith(says)


def test_a_short_soak(tmp_path: Path) -> None:
    """Five kills of runs of two ranks, where `make soak` has a hundred of all kinds: nothing lost, nothing left, the same curves."""
    pytest.importorskip("deepspeed")
    assert soak.main(["--kills", "5", "--chains", "1", "--kinds", "2:2", "--json", str(tmp_path / "soak.json")]) == 0
    written = json.loads((tmp_path / "soak.json").read_text())
    assert written["kills"] == 5 and any(row["event"] == "finished" for row in written["rows"])


# --------------------------------------------------------------------------------------------------------------------- folders


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_does_not_block_it(server: Server, folder: Path) -> None:
    with Started(server, folder, ENDLESS) as first:
        first.until_said("checkpoint of step 5 ")
        with Started(server, folder, ENDLESS, 2) as second:
            assert second.end() == [2, 2]
            (sentence,) = set(second.said("deepscale: "))
        assert f"ck is in use by another run (process {first.ranks[0]} on " in sentence and "--checkpoint-dir" in sentence
        assert not first.ended()
        first.send(signal.SIGKILL)
        assert first.end() == [-signal.SIGKILL]
    with Started(server, folder, ENDLESS) as third:
        third.until_said("going on after step")
        third.send(signal.SIGTERM)
        assert third.end() == [75]
    assert only_run(folder).status == "KILLED"


def test_a_run_that_is_killed_before_its_first_checkpoint_keeps_its_record(server: Server, folder: Path) -> None:
    """With --resume auto it begins again in the same MLflow run, with the tags that are given; what it is told to tell comes in lines."""
    arguments = [
        *TORCH,
        "--max-steps",
        "300",
        "--eval-every",
        "200",
        "--checkpoint-every",
        "10000steps",
        "--checkpoint-dir",
        "ck",
        "--resume",
        "auto",
    ]
    with Started(server, folder, [*arguments, "--tags", "question=a b"]) as first:
        first.until_said("step 1/")
        first.send(signal.SIGKILL)
        assert first.end() == [-signal.SIGKILL]
    assert only_run(folder).status == "RUNNING"
    lines = folder / "lines"
    with Started(server, folder, [*arguments, "--tags", "question=c=d"], 1, {"DEEPSCALE_METRICS": str(lines)}) as second:
        assert second.end() == [0]
    recorded = only_run(folder)
    assert (recorded.status, recorded.tags["question"], len(recorded.losses())) == ("FINISHED", "c=d", 300)
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(line["step"], "val/accuracy" in line, "test/accuracy" in line) for line in told] == [(200, 1, 0), (300, 1, 0), (300, 0, 1)]
    with Started(server, folder, [*arguments[:-1], "never", "--lr", "0.5", "--checkpoint-dir", "other"]) as third:
        third.until_said("step 1/")
    assert len(runs_in(folder)) == 2, "another run has its own"


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 16 MiB at folder/ck."""
    disk = folder / "ck"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield disk
    while not subprocess.run(["umount", "--lazy", str(disk)], capture_output=True).returncode:
        pass  # what is mounted over it, too


def fill(file: Path, until: Callable[[], bool]) -> None:
    """Takes whatever room there is, until something is so."""
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        with suppress(OSError), file.open("ab", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))


def test_a_full_disk_and_one_that_turns_read_only_cost_checkpoints_and_no_training(server: Server, folder: Path, small_disk: Path) -> None:
    with Started(server, folder, ENDLESS) as run:
        run.until_said("checkpoint of step 5 ")
        fill(small_disk / "filler", until=lambda: "was not saved: " in run.text())
        assert "No space left on device; training goes on, the last good one is ck/step-" in run.text()
        intact = checkpoints.find(small_disk, pytest.fail)
        assert intact is not None
        (small_disk / "filler").unlink()
        saved = run.text().count(" saved in ")
        run.until_said(" saved in ", saved + 2)
        # Over it once more, for a file system in which files are open for writing cannot be made read-only.
        subprocess.run(["mount", "--bind", str(small_disk), str(small_disk)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(small_disk)], check=True)
        run.until_said("Read-only file system")
        subprocess.run(["umount", str(small_disk)], check=True)
        saved = run.text().count(" saved in ")
        run.until_said(" saved in ", saved + 2)
        run.send(signal.SIGTERM)
        assert run.end() == [75]
    newest = checkpoints.find(small_disk, pytest.fail)
    assert newest is not None and newest.step > intact.step
    assert not [path.name for path in small_disk.iterdir() if path.name.endswith(".tmp")]


# -------------------------------------------------------------------------------------------------------------- data, tracking


def test_a_beton_that_was_damaged_between_two_runs_is_written_again(server: Server, folder: Path) -> None:
    pytest.importorskip("ffcv")
    arguments = [*TORCH, "--feed", "ffcv", "--max-steps", "6", "--data-dir", "data", "--run-name", "ffcv"]
    for damage in (False, True):
        if damage:
            (beton,) = (folder / "data").rglob("*.beton")
            with beton.open("r+b") as file:  # in the middle: the length stays
                file.seek(beton.stat().st_size // 2)
                file.write(b"damaged")
        with Started(server, folder, arguments) as run:
            assert run.end(200) == [0], run.text()
            assert ("is damaged: its SHA-256 is not the recorded one: writing it again" in run.text()) == damage
    before, after = runs_in(folder)
    assert before.tags["feed"] == after.tags["feed"] == "ffcv"
    assert len(before.losses()) == len(after.losses()) == 6


class TrackingServer:
    """A real `mlflow server` on the loopback interface."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.port = folder, free_port()
        shutil.copy(store, folder / "served.db")
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/served.db"]
        command += ["--default-artifact-root", str(self.folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, text=True, start_new_session=True)
        deadline = time.monotonic() + 120
        while b"OK" not in self._health():
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def _health(self) -> bytes:
        import urllib.error
        import urllib.request

        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bytes(answer.read())
        except (urllib.error.URLError, OSError):
            return b""

    def kill(self) -> None:
        if self.process is not None:
            end_group(self.process)
            self.process.wait()
            self.process = None


@pytest.fixture
def tracking_server(tmp_path: Path, empty_store: Path) -> Iterator[TrackingServer]:
    served = TrackingServer(tmp_path, empty_store)
    yield served
    served.kill()


def test_a_tracking_server_that_dies_costs_no_training_and_no_record(
    server: Server, tmp_path: Path, tracking_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down at the start; killed in the middle, and so down at the end; `deepscale report --resend` then brings both runs over whole."""
    from mlflow import MlflowClient

    environment: dict[str, str] = {"MLFLOW_TRACKING_URI": tracking_server.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    with Started(server, tmp_path, [*TORCH, "--max-steps", "5", "--run-name", "at the start"], 1, environment) as run:
        assert run.end(200) == [0], run.text()
        assert run.text().count("training goes on, and what could not be sent is kept in") == 1
    tracking_server.start()
    long = [*TORCH, "--max-steps", "400", "--run-name", "in the middle"]
    with Started(server, tmp_path, long, 1, environment) as run:
        run.until_said("step 1/")
        time.sleep(1.5)
        tracking_server.kill()
        assert run.end(200) == [0], run.text()
    tracking_server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.uri)
    with chdir(tmp_path):
        report(["--resend"])
    client = MlflowClient(tracking_server.uri)
    found: dict[str, Any] = {}
    for recorded in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        history = client.get_metric_history(recorded.info.run_id, "train/loss")
        found[recorded.info.run_name] = (recorded.info.status, sorted({metric.step for metric in history}))
    assert found == {"at the start": ("FINISHED", list(range(1, 6))), "in the middle": ("FINISHED", list(range(1, 401)))}
