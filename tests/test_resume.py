"""A run that is cut off and goes on, against the same run that is not: every step's loss, its record, its learning rate, its evaluation.

Whole commands: in this process with plain torch, in one process group on 1 and 2 ranks (resume_worker.py), and through DeepSpeed's launcher.
"""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepscale import checkpoints, gradflow, loop, resume, tracking, tracking_store, train
from deepscale.config import Config, TrackingConfig
from deepscale.data.synthetic import synthetic
from deepscale.engine import TorchEngine
from deepscale.errors import UsageError
from deepscale.parsing import Every
from deepscale.saving import Saving
from deepscale.world import World

pytest.importorskip("deepspeed")
pytest.importorskip("mlflow")
tracking_store.import_mlflow()
from mlflow import MlflowClient  # noqa: E402

TINY = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "16",
    "--threads", "1", "--device", "cpu", "--kernel", "torch", "--lr", "0.01", "--layerscale-init", "1",
]  # fmt: skip
SHORT = [*TINY, "--eval-images", "40", "--max-steps", "10", "--eval-every", "4"]
CURVES = ("train/loss", "train/accuracy", "train/lr", "val/loss", "test/loss", "test/accuracy", "grad/first_layer_mean_abs")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy", "ignore:Detected call of `lr_scheduler.step"),
    pytest.mark.usefixtures("signals_as_before"),
]


class Run:
    """A run as MLflow and its folder give it back."""

    def __init__(self, folder: Path) -> None:
        self.client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        (run,) = self.client.search_runs(experiments)
        self.id, self.status, self.settings, self.tags = run.info.run_id, run.info.status, run.data.params, run.data.tags
        self.end = run.info.end_time
        (self.folder,) = (folder / "runs").iterdir()

    def curves(self) -> dict[str, dict[int, float]]:
        """The last value of each step of each curve."""
        return {name: {metric.step: metric.value for metric in self.client.get_metric_history(self.id, name)} for name in CURVES}

    def flow(self) -> gradflow.Flow:
        return gradflow.load(self.folder)


def assert_same(found: Run, expected: Run) -> None:
    """Bit for bit."""
    assert found.curves() == expected.curves()
    assert list(found.curves()["train/loss"]) == list(range(1, int(expected.settings["resolved_steps"]) + 1))
    assert (found.status, found.tags["outcome"]) == ("FINISHED", "finished")
    one, other = found.flow(), expected.flow()
    for name in ("steps", *gradflow.flow.LAYER_FIELDS, *gradflow.flow.BLOCK_FIELDS):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert one.meta["verdicts"] == other.meta["verdicts"]


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(in_tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("--max-steps", "10", folder="a", ask=5)` runs with plain torch in a folder of its own; SIGUSR1 comes before step 5."""
    one = loop.Fit._one

    def start(*arguments: str, folder: str, ask: int = 0, number: signal.Signals = signal.SIGUSR1) -> tuple[int, str]:
        def asked(fit: loop.Fit, batches: loop.Batches) -> None:
            if fit.step + 1 == ask:
                os.kill(os.getpid(), number)
            one(fit, batches)

        monkeypatch.setattr(loop.Fit, "_one", asked)
        place = in_tmp_path / folder
        if not place.is_dir():
            place.mkdir()
            shutil.copy(empty_store, place)
        code = 0
        with chdir(place):
            try:
                train.main(["--engine", "torch", *arguments])
            except SystemExit as ended:
                code = int(ended.code or 0)
        return code, "".join(capsys.readouterr())

    return start


def test_a_run_asked_to_end_goes_on_as_if_it_had_not_been(command: Command, in_tmp_path: Path) -> None:
    """Interrupted twice, once before its third step, with stochastic depth; nothing but --resume auto and the folder is typed for the rest."""
    settings = [*SHORT, "--drop-path", "0.3", "--accumulation", "2", "--record-every", "3"]
    assert command(*settings, folder="whole")[0] == 0
    child = subprocess.Popen(["sleep", "60"])  # of a process in which a training has ended: it is to answer signals as any
    child.terminate()
    assert child.wait(30) == -signal.SIGTERM
    code, said = command(*settings, "--checkpoint-every", "4steps", "--checkpoint-dir", "kept", folder="parts", ask=2)
    assert code == 75
    assert said.splitlines()[-1] == (
        "deepscale: interrupted by SIGUSR1 after step 2 of 10; all of it is saved in kept: type the same with --resume auto to go on"
    )
    first = Run(in_tmp_path / "parts")
    assert (first.status, first.tags["outcome"]) == ("KILLED", "interrupted")
    code, said = command("--checkpoint-dir", "kept", "--resume", "auto", folder="parts", ask=7)
    assert code == 75 and "going on after step 2, from kept/step-00000002" in said
    code, said = command("--checkpoint-dir", "kept", "--resume", "auto", folder="parts")
    assert code == 0 and "going on after step 7, from kept/step-00000007" in said and "tracking" not in said
    found = Run(in_tmp_path / "parts")
    assert found.id == first.id and found.folder == first.folder
    assert_same(found, Run(in_tmp_path / "whole"))
    # Once more: there is nothing left to do.
    code, said = command("--checkpoint-dir", "kept", "--resume", "auto", folder="parts")
    assert code == 0 and "the run in kept has ended after its 10 steps: nothing is left to train" in said
    assert Run(in_tmp_path / "parts").end == found.end


def test_a_time_budget_is_not_measured_again(command: Command, in_tmp_path: Path) -> None:
    """The length and the limit of evaluation that were found before are kept; asked to end within the measured steps, it still is measured."""
    settings = [*TINY, "--time-budget", "3s", "--checkpoint-dir", "kept"]
    assert command(*settings, folder="parts", ask=2)[0] == 75
    code, said = command("--resume", "auto", "--checkpoint-dir", "kept", folder="parts", ask=6)
    assert code == 75 and "fit into the time budget" in said
    first = Run(in_tmp_path / "parts").settings
    code, said = command("--resume", "auto", "--checkpoint-dir", "kept", folder="parts")
    found = Run(in_tmp_path / "parts")
    assert code == 0 and "fit into the time budget" not in said
    steps = int(first["resolved_steps"])
    assert found.settings == first and len(found.curves()["train/loss"]) == steps > 6
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.01, total_steps=steps, cycle_momentum=False)
    rates = found.curves()["train/lr"]
    for step in range(1, steps + 1):
        assert step <= loop.CALIBRATION_STEPS or rates[step] == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        reference.step()


def test_what_contradicts_the_stored_run_is_refused_by_name(command: Command, in_tmp_path: Path) -> None:
    """And what does not may be typed again, or differ."""
    saved = ["--checkpoint-every", "3steps", "--no-tracking"]
    assert command(*SHORT, *saved, "--checkpoint-dir", "kept", folder="a", ask=4)[0] == 75
    before = sorted(path.name for path in (in_tmp_path / "a" / "kept").iterdir())
    go_on = ["--checkpoint-dir", "kept", "--resume", "auto", "--no-tracking"]
    code, said = command(*go_on, "--lr", "0.001", "--seed", "3", "--depth", "14", "--threads", "2", folder="a")
    assert code == 2 and "is of a run with --lr 0.01 --seed 0, and --lr 0.001 --seed 3 was given; leave that out" in said
    code, said = command(*SHORT, *saved, "--checkpoint-dir", "kept", folder="a")
    assert code == 2 and "kept holds checkpoints already: type --resume auto" in said
    code, said = command("--resume", "kept/step-00000099", folder="a")
    assert code == 2 and "there is no checkpoint kept/step-00000099" in said
    # Without its folder typed a run has one of its own; a run of another length in it is another run, and said to be.
    code, said = command(*SHORT, "--resume", "auto", "--no-tracking", folder="a", ask=2)
    assert code == 75 and "yet: training starts from the beginning" in said
    (own,) = (in_tmp_path / "a" / "checkpoints").iterdir()
    assert own.name.startswith("convnext-14_width=4_") and [path.name for path in own.glob("step-*")] == ["step-00000002"]
    assert sorted(path.name for path in (in_tmp_path / "a" / "kept").iterdir()) == before
    # An older one by its path, with options that may differ; later ones of the same run are written again.
    code, said = command("--resume", "kept/step-00000003", "--activations", "recompute", "--keep", "5", "--no-tracking", folder="a")
    assert code == 0 and "going on after step 3" in said
    kept = sorted(path.name for path in (in_tmp_path / "a" / "kept").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (3, 4, 6, 8, 9, 10)] or kept == [f"step-{step:08d}" for step in (3, 4, 6, 9, 10)]


def test_other_images_are_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(*SHORT, "--checkpoint-dir", "kept", "--no-tracking", folder="a", ask=1)[0] == 75
    monkeypatch.setattr("deepscale.data.sources.synthetic", functools.partial(synthetic, test_images=3_000))
    code, said = command("--resume", "auto", "--checkpoint-dir", "kept", "--no-tracking", folder="a")
    assert code == 2 and "was trained on other images (synthetic, digest " in said and "--data-dir" in said


def test_a_store_that_does_not_know_the_run_gets_a_new_one(command: Command, in_tmp_path: Path, empty_store: Path) -> None:
    """Once deleted there, once at another address, which is said; what differs from the stored settings is a tag."""
    assert command(*SHORT, "--checkpoint-dir", "kept", folder="a", ask=2)[0] == 75
    first = Run(in_tmp_path / "a")
    first.client.delete_run(first.id)
    code, said = command("--resume", "auto", "--checkpoint-dir", "kept", folder="a", ask=4)
    assert code == 75 and f"does not know the run {first.id} that this one goes on with; a new run is made" in said
    second = Run(in_tmp_path / "a")
    assert second.id != first.id and list(second.curves()["train/loss"])[-2:] == [3, 4] and second.settings["lr"] == "0.01"
    code, said = command("--resume", "auto", "--checkpoint-dir", "kept", "--activations", "recompute", folder="a", ask=6)
    assert code == 75 and "does not know" not in said
    third = Run(in_tmp_path / "a")
    assert third.id == second.id and third.settings == second.settings and third.tags["resumed.activations"] == "recompute"
    shutil.copytree(in_tmp_path / "a" / "kept", in_tmp_path / "b" / "kept")
    shutil.copy(empty_store, in_tmp_path / "b")
    code, said = command("--resume", "auto", "--checkpoint-dir", "kept", folder="b")
    assert code == 0 and "has been recorded in " in said and "a new run is made" in said
    assert list(Run(in_tmp_path / "b").curves()["train/loss"])[-4:] == [7, 8, 9, 10]


def test_a_signal_before_training_and_one_in_an_evaluation(command: Command, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends the command at once; the second after a batch, and what was evaluated only in part is evaluated again."""
    settings = [*SHORT, "--eval-images", "600", "--no-tracking"]
    build = train.build_model

    def asked(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", asked)
        code, said = command(*settings, "--checkpoint-dir", "kept", folder="a")
    assert code == 75 and said.splitlines()[-1] == "deepscale: interrupted by SIGTERM" and "step 1/" not in said
    passes = 0
    forward = TorchEngine.forward

    def counting(engine: TorchEngine, images: Tensor, last: bool = True) -> Tensor:
        nonlocal passes
        passes += not engine.module.training
        if passes == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(engine, images, last)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "forward", counting)
        code, said = command(*settings, "--checkpoint-dir", "kept", folder="a")
    assert (code, passes) == (75, 2) and "interrupted by SIGTERM after step 4 of 10; all of it is saved" in said
    code, said = command("--resume", "auto", "--checkpoint-dir", "kept", "--no-tracking", folder="a")
    assert code == 0
    lines = [line for line in said.splitlines() if line.startswith("step 4: validation")]
    assert len(lines) == 1
    code, said = command(*settings, folder="b")
    assert lines[0] in said.splitlines()


def test_a_second_ctrl_c_ends_at_once_and_the_launchers_sigterm_does_not(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    forward = TorchEngine.forward

    def asked(engine: TorchEngine, images: Tensor, last: bool = True) -> Tensor:
        passes.append(len(passes))
        for number in {2: [signal.SIGINT, signal.SIGTERM], 3: [signal.SIGINT]}.get(len(passes), []):
            os.kill(os.getpid(), number)
        return forward(engine, images, last)

    monkeypatch.setattr(TorchEngine, "forward", asked)
    code, said = command(*SHORT, "--accumulation", "4", "--no-tracking", folder="a")
    assert (code, len(passes)) == (130, 3)
    assert said.splitlines()[-1] == "deepscale: interrupted by SIGINT"
    passes.clear()
    monkeypatch.setattr(loop, "PATIENCE_S", 0.05)  # a step that takes longer is not waited for where nothing can be saved
    monkeypatch.setattr(TorchEngine, "step", lambda engine: time.sleep(5))
    code, said = command(*SHORT, "--no-tracking", folder="a", ask=1, number=signal.SIGINT)
    assert (code, len(passes)) == (130, 1)


# ------------------------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("before", [1, 4, 7, 11])
def test_records_go_on_in_another_recorder(before: int) -> None:
    """Room for 4 records, so that they have been thinned; against a recorder that saw every step."""

    def train_some(recorder: gradflow.Recorder, model: torch.nn.Module, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            recorder.begin(step)
            model(torch.randn(2, 4)).square().sum().backward()
            recorder.gradients()
            recorder.finish()
            model.zero_grad()

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    whole, first, rest = (gradflow.Recorder(model, records=4) for _ in range(3))
    train_some(whole, model, range(1, 13))
    train_some(first, model, range(1, before + 1))
    numbers, values = first.state()
    rest.load(json.loads(json.dumps(numbers)), values)
    train_some(rest, model, range(before + 1, 13))
    for name in ("steps", *gradflow.flow.LAYER_FIELDS, *gradflow.flow.BLOCK_FIELDS):
        np.testing.assert_array_equal(getattr(rest.flow(), name), getattr(whole.flow(), name))
    with pytest.raises(UsageError, match="another network's"):
        gradflow.Recorder(torch.nn.Linear(4, 3)).load(numbers, values)


@pytest.mark.parametrize("folder", ["..", "../elsewhere", "/etc", "a/b", ""])
def test_a_folder_outside_runs_is_refused(folder: str) -> None:
    checkpoint = checkpoints.Checkpoint(Path("kept"), {"progress": {"run": {"folder": folder}}})
    with pytest.raises(UsageError, match="which is none of a run"):
        resume.folder_of(resume.Resumed(checkpoint, Config(), Config()))


def test_when_a_checkpoint_is_due() -> None:
    """After so many steps, or where rank 0's clock says so; never twice for a step."""

    class Nothing:
        world, last = World(0, 1, 0, 1, torch.device("cpu")), None

        def save(self, *given: Any, **named: Any) -> None: ...

    steps = Saving(Nothing(), Path(), Every(steps=4), True, dict)  # type: ignore[arg-type]
    assert [step for step in range(1, 13) if steps.due(step, False)] == [4, 8, 12] and not steps.wished()
    steps.save(8)
    assert not steps.due(8, False)
    minutes = Saving(Nothing(), Path(), Every(seconds=0.05), True, dict)  # type: ignore[arg-type]
    assert not minutes.wished() and not minutes.due(4, False) and minutes.due(4, True)
    time.sleep(0.06)
    assert minutes.wished()
    minutes.save(4)
    assert not minutes.wished()
    assert [steps.validated(accuracy) for accuracy in (0.2, 0.1, 0.2, 0.3)] == [True, False, False, True]


def test_metrics_that_were_not_sent_when_a_checkpoint_was_saved_are_not_lost(in_tmp_path: Path, empty_store: Path) -> None:
    """A process that is killed sends nothing more; one that lived sends the same once more, which changes nothing."""
    shutil.copy(empty_store, in_tmp_path)
    warned: list[str] = []
    given: dict[str, Any] = {"run_name": "r", "parameters": {}, "tags": {}, "dataset": None, "rank": 0, "warn": warned.append}
    first = tracking.open_tracker(TrackingConfig(), **given)
    first.log({"loss": 2.0, "odd": math.nan}, 7)
    pending = json.loads(json.dumps(first.pending(), allow_nan=False))
    assert [op["step"] for op in pending] == [7]
    second = tracking.open_tracker(TrackingConfig(), **given, run_id=first.run_id)
    second.again(pending)
    second.finish("FINISHED")
    client = MlflowClient(f"sqlite:///{in_tmp_path}/mlflow.db")
    (sent,) = client.get_metric_history(str(first.run_id), "loss")
    assert (sent.step, sent.value, sent.timestamp) == (7, 2.0, pending[0]["time_ms"])
    assert math.isnan(client.get_metric_history(str(first.run_id), "odd")[0].value)
    first.finish("FINISHED")
    assert len(client.get_metric_history(str(first.run_id), "loss")) == 1 and first.pending() == [] and not warned
