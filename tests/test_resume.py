"""A run that is cut off and goes on, against the same run that is not: every step's loss, its record, its learning rate, its evaluation.

Whole commands: in this process with plain torch, in one process group on 1 and 2 ranks (resume_worker.py), and through DeepSpeed's launcher.
"""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

from deepscale import gradflow, loop, tracking_store, train

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
