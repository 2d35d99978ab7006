"""Sweeps on a real Ray: trials as real trainings, really killed, interrupted and gone on with, on one node and on two."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, end_group
from jobs import TINY, clean_environment

from deepscale.errors import UsageError
from deepscale.sweeps import command, driver, search
from deepscale.sweeps.driver import Asked, Resources
from deepscale.sweeps.space import Space, Trial
from deepscale.sweeps.values import Range
from deepscale.tracking_read import MlflowRun, Reader

LIMIT_S = 200.0
SECRET = "word-of-this-test-that-nobody-writes-down"


class Sweep:
    """A sweep as a command, in a folder."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.log = folder, folder / f"log-{time.time_ns()}"
        environment = clean_environment() | {"PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_TOKEN": SECRET}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(REPOSITORY / "tune" / "sweep.py"), *words],
                cwd=folder, env=environment, text=True, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for what the sweep will do."""
        limit = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"the sweep ended before {what}:\n{self.text()}"
            assert time.monotonic() < limit, f"no {what}:\n{self.text()}"
            time.sleep(0.05)

    def end(self) -> int:
        """Waits for the end; the exit code."""
        return self.process.wait(LIMIT_S)

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text()

    def trial(self, number: int) -> Path:
        """A trial's folder, once there is one."""
        return next(iter(self.folder.glob(f"sweeps/*/trials/{number:03}-*")), self.folder / "none")

    def trainings(self) -> list[psutil.Process]:
        """The living ranks of all trials."""
        return [process for process in psutil.process_iter() if _is_training(process, self.folder)]


def _is_training(process: psutil.Process, folder: Path) -> bool:
    try:
        words = process.cmdline()
        return "deepscale.train" in words and process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def sweeping(folder: Path, *words: str) -> Iterator[Sweep]:
    """A sweep of which nothing is left at the end."""
    pytest.importorskip("ray")
    sweep = Sweep(folder, *words)
    try:
        yield sweep
    finally:
        end_group(sweep.process)
        for process in sweep.trainings():
            process.kill()


def lines(sweep: Sweep, number: int) -> int:
    """How many validations a trial has told."""
    path = sweep.trial(number) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def runs(folder: Path, name: str) -> dict[int, MlflowRun]:
    """The trials' runs by number, of which each has one."""
    found = Reader(f"sqlite:///{folder / 'mlflow.db'}").runs(name, f"tags.sweep = '{name}' and tags.trial != ''")
    by_number = {int(run.data.tags["trial"]): run for run in found}
    assert len(by_number) == len(found), "a trial has two runs"
    return by_number


def ends(found: dict[int, MlflowRun]) -> list[str]:
    return [found[number].data.tags["outcome"] for number in sorted(found)]


def starts(sweep: Sweep, number: int) -> int:
    return (sweep.trial(number) / "output.txt").read_text().count("asked for 14 layers")


def test_a_sweep_of_four_trials(tmp_path: Path) -> None:
    """Plain torch and DeepSpeed, two of which diverge and one of which is killed: it is tried again, they are not."""
    (tmp_path / "rates.yaml").write_text(
        "question: which rate is too much?\ngrid: {lr: [1e-3, 1e+30], engine: [torch, deepspeed]}\nfixed: {max_steps: 30, eval_every: 10}\n"
    )
    with sweeping(tmp_path, "rates.yaml", *TINY, "--checkpoint-every", "10steps") as sweep:
        sweep.until(lambda: lines(sweep, 1) > 0, "a validation of trial 1")
        (first,) = [process for process in sweep.trainings() if str(sweep.trial(1) / "checkpoints") in process.cmdline()]
        first.kill()
        assert sweep.end() == 0, sweep.text()
        assert not sweep.trainings()
        assert [starts(sweep, number) for number in (1, 2, 3, 4)] == [2, 1, 1, 1]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sweep.trial(1) / "output.txt" in files and not [path for path in files if SECRET.encode() in path.read_bytes()]
    found = runs(tmp_path, "rates")
    assert ends(found) == ["finished", "finished", "non_finite", "non_finite"]
    assert [run.info.status for _, run in sorted(found.items())] == ["FINISHED", "FINISHED", "FAILED", "FAILED"]
    assert {run.data.tags["space"] for run in found.values()} == {"rates"}
    reader = Reader(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [step for step, _ in reader.history(found[1], "val/accuracy")] == [10, 20, 30]
    said = sweep.text()
    assert (
        re.search(r"^\| 0\.001 +\| torch +\|.* % ", said, flags=re.M) and "report  sweeps/rates/" in said and "mlflow ui --backend-store-uri" in said
    )


def test_a_sweep_that_is_interrupted_and_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends every training with a checkpoint; kill -9 too. What has ended is not trained again, and ASHA knows it: it stops the worst."""
    (tmp_path / "asha.yaml").write_text(
        "question: who is stopped?\ngrid: {lr: [1e-7, 1e-2, 1e-8]}\nfixed: {max_steps: 300, eval_every: 30}\n"
        "metric: val/loss\nmode: min\nscheduler: asha\n"
    )
    words = ["asha.yaml", *TINY, "--engine", "torch", "--concurrent", "1", "--checkpoint-every", "10m"]
    with sweeping(tmp_path, *words) as sweep:
        sweep.until(lambda: lines(sweep, 1) > 0, "a validation of trial 1")
        sweep.process.send_signal(signal.SIGINT)
        assert sweep.end() == 130, sweep.text()
        assert not sweep.trainings() and "type the same with --resume" in sweep.text()
        assert list((sweep.trial(1) / "checkpoints").glob("step-*"))
    with sweeping(tmp_path, *words, "--resume") as sweep:
        sweep.until(lambda: lines(sweep, 2) > 0, "a validation of trial 2")
        (second,) = sweep.trainings()
        sweep.process.kill()
        second.terminate()  # what it gets when Ray has seen that the driver is gone, some seconds later: by then it may have ended by itself
        limit = time.monotonic() + 60
        while sweep.trainings():
            assert time.monotonic() < limit
            time.sleep(0.1)
    assert [run.info.status for run in runs(tmp_path, "asha").values()].count("RUNNING") == 0
    with sweeping(tmp_path, *words, "--resume") as sweep:
        assert sweep.end() == 0, sweep.text()
        assert not sweep.trainings()
        assert starts(sweep, 1) == 2 and starts(sweep, 2) == 2
    found = runs(tmp_path, "asha")
    assert ends(found) == ["finished", "finished", "stopped_early"]
    assert [run.info.status for _, run in sorted(found.items())] == ["FINISHED", "FINISHED", "KILLED"]
    reader = Reader(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [[step for step, _ in reader.history(found[number], "val/loss")] for number in (1, 2)] == [list(range(30, 330, 30))] * 2
    monkeypatch.chdir(tmp_path)
    for again, sentence in ((words, "there is a sweep asha already"), ([*words, "--resume", "--max-steps", "60"], "was begun with another fixed")):
        with pytest.raises(SystemExit) as refused:
            command.main(again)
        assert refused.value.code == 2 and sentence in capsys.readouterr().err


def test_a_trial_of_two_ranks_on_two_nodes(tmp_path: Path) -> None:
    """A Ray cluster of two nodes of a core each: a trial of two ranks, under ZeRO-1, has one on each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        asked = ["--grid", "zero=1", "--address", cluster.address, "--ranks-per-trial", "2", "--nodes", "2", "--name", "nodes"]
        with sweeping(tmp_path, *asked, *TINY, "--max-steps", "4") as sweep:
            assert sweep.end() == 0, sweep.text()
            assert "sweep: 2 nodes, 2 cores, 0 GPUs" in sweep.text()
            assert "cpu x 2, fp32, ZeRO 1" in (sweep.trial(1) / "output.txt").read_text()
            assert (sweep.trial(1) / "output-1.txt").exists()
    finally:
        cluster.shutdown()
    assert runs(tmp_path, "nodes")[1].data.params["ranks"] == "2"


# ---------------------------------------------------------------------------------------------------------------- without Ray


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([(2, 0)], Asked(), Resources(1, 1, 0)),
        ([(2, 0)], Asked(ranks_per_trial=2), Resources(2, 1, 0)),
        ([(8, 0)], Asked(ranks_per_trial=2, cpus_per_trial=8), Resources(2, 4, 0)),
        ([(32, 4)], Asked(), Resources(1, 8, 1)),
        ([(32, 4)], Asked(gpus_per_trial=0.5), Resources(1, 4, 0.5)),
        ([(64, 8)] * 2, Asked(gpus_per_trial=8), Resources(8, 8, 1)),
        ([(64, 4)] * 2, Asked(gpus_per_trial=8, cpus_per_trial=16), Resources(8, 2, 1)),
        ([(32, 4)], Asked(gpus_per_trial=0), Resources(1, 1, 0)),
    ],
)
def test_what_a_trial_takes(nodes: list[tuple[int, int]], asked: Asked, expected: Resources) -> None:
    assert driver.resources([{"CPU": cores, "GPU": gpus} for cores, gpus in nodes], asked) == expected


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(gpus_per_trial=1), "there are 2 nodes with 4 cores and 0 GPUs in all"),
        (Asked(cpus_per_trial=3), "does not fit"),
        (Asked(ranks_per_trial=2, cpus_per_trial=1), "less than a core for each of 2 ranks"),
        (Asked(gpus_per_trial=2, ranks_per_trial=1), "each rank takes one GPU"),
        (Asked(gpus_per_trial=-1), "--gpus-per-trial -1"),
        (Asked(ranks_per_trial=5), "type smaller"),
    ],
)
def test_what_does_not_fit_is_refused(asked: Asked, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        driver.resources([{"CPU": 2}, {"CPU": 2}], asked)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--grid", "lr=1e-3", "--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
        (["--grid", "lr=1e-3", "--address", "nowhere"], "no Ray cluster answers at nowhere"),
        (["--grid", "lr=1e-3", "--name", "a/b"], "is no name of a folder"),
        (["--grid", "lr=1e-3", "--scheduler", "asha"], "max_steps is not given"),
        ([], "give one space"),
        (["none.yaml"], "none.yaml cannot be read"),
        (["--grid", "colour=red"], "possible: "),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    words: Sequence[str], sentence: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(in_tmp_path.iterdir())


def space(**more: object) -> Space:
    plain = {"name": "s", "question": "?", "fixed": {}, "grid": {"norm": ("none", "layernorm")}, "ranges": {"lr": Range(1e-4, 1e-2, log=True)}}
    return Space(**plain | {"search": "optuna", "samples": 12, "seeds": (0, 1)} | more)  # type: ignore[arg-type]


def reached(trial: Trial) -> dict[str, float]:
    """A training whose best learning rate is the greatest."""
    return {"val/accuracy": float(trial.settings["lr"]) * 100, "step": 10}


def test_optuna_draws_points_each_with_every_seed_and_learns() -> None:
    pytest.importorskip("optuna")
    asked = search.Optuna(space(samples=40), {}, replay=False)
    drawn = []
    while trial := asked.next():
        asked.tell(trial.number, "finished", reached(trial))
        drawn.append(trial)
    assert [trial.number for trial in drawn] == list(range(1, 81))
    assert all(first.settings | {"seed": "1"} == second.settings for first, second in zip(drawn[::2], drawn[1::2], strict=True))
    rates = [float(trial.settings["lr"]) for trial in drawn[::2]]
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    even = (1e-2 - 1e-4) / math.log(1e-2 / 1e-4)  # the mean of what is drawn evenly in the logarithm
    assert statistics.fmean(rates[-10:]) > 2 * even, "the later points are no better than those drawn evenly"


def test_optuna_goes_on_with_what_is_left() -> None:
    """Trials that have ended are not given again, those that have begun are, and the points after them are new."""
    pytest.importorskip("optuna")
    asked = search.Optuna(space(), {}, replay=False)
    first = [trial for _ in range(6) if (trial := asked.next())]
    known = {trial.number: {"number": trial.number, "settings": trial.settings} for trial in first}
    for trial in first[:3]:
        known[trial.number] |= {"outcome": "finished", "last": reached(trial)}
    known[4] |= {"outcome": "non_finite", "last": {}}
    again = search.Optuna(space(), known, replay=False)
    left = []
    while trial := again.next():
        left.append(trial)
    assert left[:2] == first[4:6] and [trial.number for trial in left] == list(range(5, 25))
    assert not {trial.settings["lr"] for trial in left[2:]} & {trial.settings["lr"] for trial in first}
    states = [trial.state.name for trial in again.study.trials[:3]]
    assert states == ["COMPLETE", "PRUNED", "RUNNING"]
    assert search.Optuna(space(), known, replay=True).next() == first[0]


def test_median_stopping_stops_and_never_pauses() -> None:
    """Paused trials must save what Tune can restore; by itself the rule pauses while it has seen too few trials and others wait."""
    pytest.importorskip("ray")
    from ray.tune.experiment import Trial as TuneTrial
    from ray.tune.schedulers import TrialScheduler

    class Known(SimpleNamespace):
        __hash__ = object.__hash__

    controller: Any = Known(get_live_trials=lambda: [Known(status=TuneTrial.PENDING)])
    rule = search.scheduler(space(search="grid", scheduler="median", fixed={"max_steps": "90", "eval_every": "10"}))
    assert rule.set_search_properties("val/accuracy", "max")
    decisions: list[list[str]] = []
    for number, accuracy in enumerate((0.5, 0.6, 0.7, 0.1, 0.8)):
        trial: Any = Known(trial_id=str(number), is_finished=lambda: True)
        rule.on_trial_add(controller, trial)
        decisions.append([])
        for step in (10, 20, 90):
            decisions[-1].append(rule.on_trial_result(controller, trial, {"step": step, "val/accuracy": accuracy}))
            if decisions[-1][-1] == TrialScheduler.STOP:
                break
        rule.on_trial_complete(controller, trial, {"step": step, "val/accuracy": accuracy})
    goes_on = [TrialScheduler.CONTINUE] * 3
    assert decisions == [goes_on, goes_on, goes_on, [TrialScheduler.STOP], goes_on]


def test_what_trials_have_left_is_read(tmp_path: Path) -> None:
    for number, name in ((2, "trial.json"), (1, "trial.json"), (1, "ended.json")):
        folder = tmp_path / f"{number:03}-x"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(
            json.dumps({"number": number, "settings": {}} | ({"outcome": "finished", "last": {}} if name == "ended.json" else {}))
        )
    assert list(search.begun(tmp_path)) == [1, 2]
    assert ["outcome" in record for record in search.begun(tmp_path).values()] == [True, False]
