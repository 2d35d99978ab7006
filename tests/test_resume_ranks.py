"""A run on several ranks that is cut off and goes on, against the same run that is not: bit for bit, for every ZeRO stage.

In one process group (resume_worker.py), where the last rank alone is asked to end; and through DeepSpeed's launcher, with real signals.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, end_group, free_port, run_ranks

from deepscale import tracking_store

pytest.importorskip("deepspeed")
pytest.importorskip("mlflow")
tracking_store.import_mlflow()
from mlflow import MlflowClient  # noqa: E402

Result = dict[str, Any]
TINY = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "16", "--eval-images", "20",
    "--threads", "1", "--device", "cpu", "--kernel", "torch", "--lr", "0.01", "--layerscale-init", "1", "--precision", "fp32",
]  # fmt: skip
SHORT = [*TINY, "--max-steps", "8", "--eval-every", "3"]
LONG = [*TINY, "--max-steps", "150", "--record-every", "20"]
GO_ON = ["--checkpoint-dir", "kept", "--resume", "auto"]
# Each engine with another setting that the loop goes on with.
ENGINES = {
    "zero 0": ["--zero", "0"],
    "zero 1": ["--zero", "1", "--accumulation", "2"],
    "zero 2": ["--zero", "2", "--clip", "0.5", "--schedule", "cosine"],
    "zero 3": ["--zero", "3", "--drop-path", "0.3"],
    "torch": ["--engine", "torch", "--record-every", "3"],
}


def cases_of(folder: Path, name: str, settings: list[str]) -> list[dict[str, Any]]:
    """The run; the same, cut off before its fifth step is over; the rest of that."""
    parts = str(folder / name / "parts")
    return [
        {"name": f"{name} whole", "folder": str(folder / name / "whole"), "arguments": settings},
        {"name": f"{name} first", "folder": parts, "arguments": [*settings, "--checkpoint-dir", "kept"], "ask": 5},
        {"name": f"{name} rest", "folder": parts, "arguments": GO_ON},
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, dict[str, Result]]:
    """What rank 0 saw of every case, by the number of ranks. A run goes from 2 ranks to 1 and back."""
    found: dict[int, dict[str, Result]] = {}
    moved = {"folder": str(folder / "moved"), "arguments": GO_ON}
    begin = {"name": "moved 2", "folder": str(folder / "moved"), "arguments": [*SHORT, "--zero", "2", *GO_ON], "ask": 3}
    for ranks, further in ((2, [begin]), (1, [{**moved, "name": "moved 1", "ask": 5}])):
        cases = [case for name, given in ENGINES.items() for case in cases_of(folder / str(ranks), name, [*SHORT, *given])]
        cases += [{"name": "long", "folder": str(folder / f"{ranks}" / "long"), "arguments": [*LONG, "--zero", "2" if ranks == 2 else "0"]}]
        found[ranks] = run_ranks("resume_worker.py", [*cases, *further], folder, ranks, 240)[0][0]
    found[2] |= run_ranks("resume_worker.py", [{**moved, "name": "moved back"}], folder, 2, 240)[0][0]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ENGINES)
def test_a_run_that_was_cut_off_equals_one_that_was_not(results: dict[int, dict[str, Result]], name: str, ranks: int) -> None:
    whole, first, rest = (results[ranks][f"{name} {part}"] for part in ("whole", "first", "rest"))
    assert (whole["code"], first["code"], rest["code"]) == (0, 75, 0)
    assert list(first["metrics"]["train/loss"]) == [1, 2, 3, 4, 5] and list(rest["metrics"]["train/loss"]) == [6, 7, 8]
    curves = {curve for curve in whole["metrics"] if not curve.startswith("perf/")}
    assert {"train/loss", "train/lr", "val/loss", "test/accuracy", "grad/first_layer_mean_abs", "depth_last/signal_std"} <= curves
    for curve in curves:
        assert {**first["metrics"].get(curve, {}), **rest["metrics"].get(curve, {})} == whole["metrics"][curve], curve


def test_from_two_ranks_to_one_and_back(results: dict[int, dict[str, Result]]) -> None:
    """Sums over ranks are rounded otherwise: the same to 1 in 10,000."""
    parts = [results[2]["moved 2"], results[1]["moved 1"], results[2]["moved back"]]
    assert [part["code"] for part in parts] == [75, 75, 0]
    whole = results[2]["zero 0 whole"]["metrics"]
    for curve in ("train/loss", "val/loss", "test/loss"):
        found = {step: value for part in parts for step, value in part["metrics"].get(curve, {}).items()}
        assert found == pytest.approx(whole[curve], rel=1e-4)
    assert [list(part["metrics"]["train/loss"]) for part in parts] == [[1, 2, 3], [4, 5], [6, 7, 8]]


# --------------------------------------------------------------------------------------------------------------- the launcher


class Launched:
    """A run through the launcher, whose log can be waited on; all of its processes are gone when the block is left."""

    def __init__(self, folder: Path, ranks: int, *arguments: str) -> None:
        self.log = folder / f"log-{time.monotonic_ns()}"
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(free_port())]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, str(REPOSITORY / "deepscale" / "train.py"), *arguments],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip
        self.family: list[psutil.Process] = []

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        end_group(self.process)

    def until(self, pattern: str) -> list[psutil.Process]:
        """Waits for a line; the ranks' processes, by rank."""
        deadline = time.monotonic() + 200
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        return sorted((p for p in self.family if "--local_rank=" in " ".join(p.cmdline())), key=lambda p: p.cmdline()[3])

    def end(self) -> int:
        """Waits for all of its processes; the command's exit code."""
        code = self.process.wait(120)
        _, alive = psutil.wait_procs(self.family, timeout=60)
        assert alive == [], self.log.read_text()
        return code


def told(folder: Path) -> tuple[str, str, dict[int, float]]:
    """(status, outcome, losses) of the one run of a folder's database."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    return run.info.status, run.data.tags.get("outcome", ""), losses


@pytest.mark.launcher
def test_two_ranks_asked_to_end_then_killed(results: dict[int, dict[str, Result]], tmp_path: Path, empty_store: Path) -> None:
    """SIGUSR1 to rank 1 alone: both end after the same step, and 75 comes through the launcher. Then SIGKILL to all; then to the end."""
    shutil.copy(empty_store, tmp_path)
    saved = ["--zero", "2", "--checkpoint-every", "10steps", *GO_ON]
    with Launched(tmp_path, 2, *LONG, *saved) as run:
        ranks = run.until("checkpoint of step 20 saved")
        ranks[1].send_signal(signal.SIGUSR1)
        assert run.end() == 75, run.log.read_text()
        assert "deepscale: interrupted on another rank after step" in run.log.read_text() and "Traceback" not in run.log.read_text()
    status, outcome, before = told(tmp_path)
    assert (status, outcome) == ("KILLED", "interrupted") and 20 <= len(before) < 150
    with Launched(tmp_path, 2, *LONG, *saved) as run:
        for rank in run.until(f"checkpoint of step {10 * (len(before) // 10 + 2)} saved"):
            rank.kill()
        assert run.end() != 0
        assert f"going on after step {len(before)}, from" in run.log.read_text()
    assert told(tmp_path)[0] == "RUNNING"
    with Launched(tmp_path, 2, *LONG, *saved) as run:
        assert run.end() == 0, run.log.read_text()
    status, outcome, losses = told(tmp_path)
    assert (status, outcome) == ("FINISHED", "finished")
    assert losses == results[2]["long"]["metrics"]["train/loss"]


@pytest.mark.launcher
def test_the_deepspeed_command_is_ended(results: dict[int, dict[str, Result]], tmp_path: Path, empty_store: Path) -> None:
    """It passes SIGTERM on to nobody; its rank sees that it has gone, saves and ends. The rest equals the run that was not cut off."""
    shutil.copy(empty_store, tmp_path)
    with Launched(tmp_path, 1, *LONG, "--zero", "0", "--checkpoint-every", "10steps", *GO_ON) as run:
        (rank,) = run.until("checkpoint of step 10 saved")
        rank.suspend()  # else it may have ended before the command has
        run.process.terminate()
        assert run.process.wait(60) == -signal.SIGTERM
        rank.resume()
        run.end()
    status, outcome, before = told(tmp_path)
    assert (status, outcome) == ("KILLED", "interrupted") and "because its launcher has gone" in run.log.read_text()
    with Launched(tmp_path, 1, *GO_ON) as run:
        assert run.end() == 0, run.log.read_text()
    assert f"going on after step {len(before)}, from" in run.log.read_text()
    assert told(tmp_path)[2] == results[1]["long"]["metrics"]["train/loss"]
