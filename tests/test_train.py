"""The training command as a user starts it: real runs through DeepSpeed's launcher on one rank and two, and what MLflow keeps of them.

What does not need the launcher runs `main` in this process with plain torch. Data are the synthetic images, networks of 14 layers.
"""

import functools
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import REPOSITORY, Launch, end_group, free_port

from deepscale import checkpoints, config, loop, tracking_store, train
from deepscale.data.synthetic import synthetic
from deepscale.data.tensors import EvalFeed
from deepscale.engine import TorchEngine
from deepscale.world import World

pytest.importorskip("deepspeed")
pytest.importorskip("mlflow")
tracking_store.import_mlflow()
from mlflow import MlflowClient  # noqa: E402

TINY = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "16", "--eval-images", "40",
    "--threads", "1",
]  # fmt: skip
HERE = World(0, 1, 0, 1, torch.device("cpu"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy", "ignore:Detected call of `lr_scheduler.step"),
    pytest.mark.usefixtures("signals_as_before"),
]


@pytest.fixture
def with_database(in_tmp_path: Path, empty_store: Path) -> Path:
    """The test works in its own folder, where a tracking database lies."""
    shutil.copy(empty_store, in_tmp_path)
    return in_tmp_path


class Recorded:
    """A run as MLflow gives it back."""

    def __init__(self, client: MlflowClient, run: Any) -> None:
        self.client, self.id, self.status, self.name = client, run.info.run_id, run.info.status, run.info.run_name
        self.settings: dict[str, str] = run.data.params
        self.tags: dict[str, str] = run.data.tags
        self.inputs = run.inputs.dataset_inputs
        self.last: dict[str, float] = run.data.metrics

    def curve(self, name: str) -> dict[int, float]:
        return {metric.step: metric.value for metric in self.client.get_metric_history(self.id, name)}

    def losses(self) -> list[float]:
        curve = self.curve("train/loss")
        assert list(curve) == list(range(1, len(curve) + 1))
        return list(curve.values())

    def artifact(self, name: str) -> Any:
        return json.loads(Path(self.client.download_artifacts(self.id, name)).read_text())


def runs_in(folder: Path) -> list[Recorded]:
    """The runs of a folder's database, oldest first."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [Recorded(client, run) for run in reversed(client.search_runs(experiments, order_by=["attributes.start_time DESC"]))]


def in_process(*arguments: str, code: int | None = None) -> None:
    """Runs the command here, with plain torch; `code` is the exit code that is expected."""
    command = [*TINY, "--engine", "torch", "--device", "cpu", *arguments]
    if code is None:
        train.main(command)
        return
    with pytest.raises(SystemExit) as ended:
        train.main(command)
    assert ended.value.code == code


# --------------------------------------------------------------------------------------------------------------- the launcher


@pytest.mark.launcher
def test_a_run_on_one_rank_with_a_time_budget(launch: Launch, tmp_path: Path) -> None:
    """Everything a run leaves: the summary, MLflow's run, the weights; and the evaluation of these weights in this process."""
    budget = 6.0
    done = launch(*TINY, "--lr", "0.01", "--time-budget", f"{budget:.0f}s", "--checkpoint-dir", "weights", "--seed", "3")
    assert done.returncode == 0, done.output
    assert "Traceback" not in done.output and "Warning:" not in done.output
    for line in ("summary", "depth        14 layers (1+1+1+1 blocks)", "steps", "throughput", "validation", "test", "peak memory", "mlflow ui"):
        assert line in done.output, done.output
    (run,) = runs_in(tmp_path)
    assert run.status == "FINISHED"

    asked = config.parse([*TINY, "--lr", "0.01", "--time-budget", "6s", "--checkpoint-dir", "weights", "--seed", "3"])
    settings = {name: value for name, value in config.flat(asked).items() if name not in ("experiment", "run_name", "tags", "checkpoint_dir")}
    assert set(settings) <= set(run.settings)
    by_hand = {name: value for name, value in config.differing(asked).items() if name not in ("local_rank", "checkpoint_dir")}
    assert {name: run.settings[name] for name in ("lr", "time_budget", "seed", "depth", "width")} == {
        "lr": "0.01", "time_budget": "6.0", "seed": "3", "depth": "14", "width": "4",
    }  # fmt: skip
    assert len(by_hand) >= 10 and set(by_hand) <= set(run.settings)
    left_open = {"eval_every", "dataset", "feed", "eval_images", "record_every", "async_save", "image_size"}
    assert {name for name, value in run.settings.items() if value == "auto"} <= left_open
    assert {"resolved_steps", "resolved_eval_every", "resolved_eval_images", "resolved_dataset", "resolved_feed", "ranks"} <= set(run.settings)
    assert (run.settings["zero"], run.settings["precision"], run.settings["ranks"], run.settings["engine"]) == ("0", "fp32", "1", "deepspeed")
    assert (run.tags["dataset"], run.tags["feed"], run.tags["engine"]) == ("synthetic", "tensors", "deepspeed")
    assert run.tags["checkpoint_dir"] == "weights" and "checkpoint_dir" not in run.settings  # the comparison of runs opens with what differs
    assert json.loads(run.tags["hardware"])["cores"] >= 1 and json.loads(run.tags["versions"])["torch"] == importlib.metadata.version("torch")
    assert [given.dataset.name for given in run.inputs] == ["synthetic"]

    losses = run.losses()
    assert len(losses) == int(run.settings["resolved_steps"]) > loop.CALIBRATION_STEPS
    assert sum(losses[-5:]) < sum(losses[:5])
    assert run.last["perf/seconds"] < 2 * budget
    assert {1, 11} <= set(run.curve("grad/first_layer_mean_abs")) if len(losses) > 10 else {1}
    known = {"train/accuracy", "train/lr", "val/loss", "val/accuracy", "test/loss", "test/accuracy"}
    known |= {"perf/step_s", "perf/images_per_s", "perf/peak_memory_bytes", "grad/first_layer_mean_abs_bias"}
    assert known <= set(run.last)
    assert run.last["perf/peak_memory_bytes"] > 2**27
    assert run.artifact("deepspeed.json")["gradient_clipping"] == 5.0
    assert run.artifact("summary.json")["depth"] == "14 layers (1+1+1+1 blocks)"

    state, metadata = checkpoints.read(tmp_path / "weights" / "model.safetensors")
    model = checkpoints.network_of(metadata)
    model.load_state_dict(state)
    source = synthetic()
    feed = EvalFeed(source.test, source.info, batch=40, device=torch.device("cpu"), limit=40)
    found = loop.evaluate(TorchEngine(model, asked.replace(precision="fp32"), HERE), feed, HERE)
    assert found["loss"] == pytest.approx(run.last["test/loss"], rel=1e-5)
    assert found["accuracy"] == run.last["test/accuracy"]


@pytest.mark.launcher
def test_two_ranks_train_as_one(launch: Launch, tmp_path: Path, in_tmp_path: Path) -> None:
    """ZeRO 1 over two ranks through the launcher against plain torch on one, in this process: the same losses, once in MLflow."""
    settings = ["--max-steps", "8", "--accumulation", "2", "--clip", "0.5", "--drop-path", "0"]
    done = launch(*TINY, *settings, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert done.output.count("summary\n") == 1 and "Traceback" not in done.output
    in_process(*settings)
    two, one = runs_in(tmp_path)
    assert (two.status, two.settings["ranks"], two.settings["zero"], two.tags["engine"]) == ("FINISHED", "2", "1", "deepspeed")
    assert (one.settings["ranks"], one.tags["engine"]) == ("1", "torch")
    assert two.artifact("deepspeed.json")["train_micro_batch_size_per_gpu"] == 4
    assert len(two.losses()) == 8
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
    for name in ("val/loss", "test/loss", "grad/first_layer_mean_abs"):
        assert list(two.curve(name).values()) == pytest.approx(list(one.curve(name).values()), rel=1e-4)


@pytest.mark.launcher
def test_ctrl_c_closes_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    """SIGINT to every process, as a terminal sends it; the launcher adds a SIGTERM a moment later."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command += [str(REPOSITORY / "deepscale" / "train.py"), *TINY, "--max-steps", "1000000"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    log = tmp_path / "log"
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, **quiet)
    try:
        deadline = time.monotonic() + 200
        while "step 1/" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        assert sum("train.py" in " ".join(member.cmdline()) for member in family) == 3  # the launcher's second half, and two ranks
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == []
    finally:
        end_group(process)
    text = log.read_text()
    assert text.count("deepscale: interrupted") == 1
    assert f'File "{REPOSITORY}/deepscale' not in text, text  # the launcher's own traceback is all there is
    (run,) = runs_in(tmp_path)
    assert run.status == "KILLED"
    assert run.losses()


@pytest.mark.launcher
def test_exit_codes_come_through_the_launcher(launch: Launch, tmp_path: Path) -> None:
    """3 for a loss that is not finite, with the run closed as FAILED; 2 for bad input, said once though two ranks find it."""
    done = launch(*TINY, "--max-steps", "20", "--lr", "1e30", "--clip", "0")
    assert done.returncode == 3, done.output
    (sentence,) = [line for line in done.output.splitlines() if line.startswith("deepscale: ")]
    assert "the loss became" in sentence and "at step" in sentence and "whose output is not is stem." in sentence and "--lr" in sentence
    assert "Traceback" not in done.output
    (run,) = runs_in(tmp_path)
    assert run.status == "FAILED"
    assert all(math.isfinite(loss) for loss in run.losses())
    refused = launch(*TINY, "--depth", "3", ranks=2)
    assert refused.returncode == 2, refused.output
    assert refused.output.count("--depth 3 is out of range") == 1
    assert "Traceback" not in refused.output
    assert len(runs_in(tmp_path)) == 1


# ------------------------------------------------------------------------------------------------------------ in this process


def test_the_same_seed_gives_the_same_losses_and_another_does_not(with_database: Path) -> None:
    for seed in ("5", "5", "6"):
        in_process("--max-steps", "4", "--seed", seed, "--drop-path", "0.3", "--layerscale-init", "1")
    first, second, other = runs_in(with_database)
    assert first.losses() == second.losses()
    assert set(first.losses()).isdisjoint(other.losses())
    assert first.name == second.name != other.name
    assert "seed=6" in other.name


def test_interrupted_and_failed_runs_are_closed_as_such(
    with_database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the third step, which still ends where somebody asked for it; nothing is saved, and how to change that is said."""
    one = loop.Fit._one

    def fail() -> None:
        raise RuntimeError("a fault of ours")

    def third_step(action: Callable[[], None]) -> None:
        def step(fit: loop.Fit, batches: loop.Batches) -> None:
            if fit.step == 2:
                action()
            one(fit, batches)

        monkeypatch.setattr(loop.Fit, "_one", step)

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        third_step(functools.partial(os.kill, os.getpid(), number))
        in_process("--max-steps", "5", code=code)
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"deepscale: interrupted by {number.name} after step 3 of 5, and nothing of it is saved; next time type --checkpoint-every 10m"
        )
    third_step(fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        in_process("--max-steps", "5")
    third_step(lambda: torch.empty(2**50))  # the allocator itself refuses
    in_process("--max-steps", "5", code=4)
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("deepscale: out of memory on cpu: planned ") and "--accumulation 2" in sentence
    monkeypatch.setattr(loop.Fit, "_one", one)
    in_process("--max-steps", "5", "--lr", "1e30", "--clip", "0", code=3)
    runs = runs_in(with_database)
    assert [run.status for run in runs] == ["KILLED", "KILLED", "FAILED", "FAILED", "FAILED"]
    assert [run.tags["outcome"] for run in runs] == ["interrupted", "interrupted", "failed", "out_of_memory", "non_finite"]
    assert [len(run.losses()) for run in runs[:4]] == [3, 3, 2, 2]
    assert runs[3].tags["outcome_text"] == sentence.removeprefix("deepscale: ")


def test_memory_that_runs_out_before_the_first_step_is_recorded_too(with_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "build_engine", lambda *arguments: torch.empty(2**50))
    in_process("--max-steps", "1", code=4)
    (run,) = runs_in(with_database)
    assert (run.status, run.tags["outcome"]) == ("FAILED", "out_of_memory")
    assert int(run.settings["planned_memory_bytes"]) > 0


def test_without_data_and_network_auto_says_loudly_that_images_are_synthetic(with_database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (with_database / "data").mkdir()
    in_process("--dataset", "auto", "--no-download", "--max-steps", "1")
    assert "SYNTHETIC" in capsys.readouterr().err
    (run,) = runs_in(with_database)
    assert (run.settings["dataset"], run.settings["resolved_dataset"], run.tags["dataset"]) == ("auto", "synthetic", "synthetic")


def test_without_tracking_no_database_is_made(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_process("--max-steps", "1", "--no-tracking")
    assert "mlflow" not in capsys.readouterr().out
    (run,) = (in_tmp_path / "runs").iterdir()
    assert list(in_tmp_path.iterdir()) == [in_tmp_path / "runs"] and (run / "gradflow.npz").is_file()
