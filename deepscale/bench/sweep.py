"""`deepscale bench sweep`: what a trial of a sweep takes beside its training, and what two trials at once take of each other's time."""

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepscale.bench.options import Options, say
from deepscale.bench.report import Goal, Row, ratio
from deepscale.bench.worker import BenchError, start_of, tail
from deepscale.sweeps.search import BEGUN, ENDED
from deepscale.sweeps.tags import SWEEP, TRIAL
from deepscale.tracking_read import Reader

GOAL_OVERHEAD_S = Goal(15.0)
GOAL_TOGETHER = Goal(1.15)
NOT_OURS = ("MLFLOW_TRACKING_URI", "SLURM_JOB_ID", "RAY_ADDRESS")  # the sweep has a store and a Ray of its own
SECONDS = "perf/seconds"


@dataclass(frozen=True)
class Trial:
    """When a trial's worker began it and when it had ended, in seconds since 1970, and the seconds of its training."""

    begun: float
    ended: float
    training: float


def main(arguments: list[str]) -> None:
    """Runs sweeps of equal trials one at a time and two at a time, in turn, in a folder that is removed. Raises BenchError where one fails."""
    options = Options("sweep", "Equal trials of a sweep, one at a time and two at a time, on synthetic images.")
    options.depth("depth", 110, "layers of each network")
    options.size("width", 8, "channels of stage 1")
    options.size("patch-size", 4, "pixels of a patch")
    options.size("batch-size", 64, "images of a step")
    options.size("steps", 300, "steps of each training")
    options.size("rounds", 3, "sweeps of each kind")
    options.time_limit()
    values, report = options.parse(arguments)
    training = {"depth": values.depth, "width": values.width, "patch-size": values.patch_size, "batch-size": values.batch_size}
    training |= {"max-steps": values.steps, "eval-every": values.steps, "dataset": "synthetic", "feed": "tensors"}
    alone: list[list[Trial]] = []
    together: list[list[Trial]] = []
    started: list[float] = []
    with tempfile.TemporaryDirectory(prefix="deepscale-bench-", dir=".") as folder:
        for number in range(values.rounds):
            for measured, concurrent in ((alone, 1), (together, 2)):
                say(f"round {number + 1} of {values.rounds}: trials of {values.depth} layers, {concurrent} at a time")
                begin = time.time()
                measured.append(run_sweep(Path(folder), f"{number}-{concurrent}", training, concurrent, values.time_limit))
                started.append(measured[-1][0].begun - begin)
    # From the start of one trial to the start of the next: what Ray does between them belongs to the trial.
    beside = [second.begun - first.begun - first.training for first, second in alone]
    report.rows = [
        Row("a trial beside its training: Ray's worker, imports, the engine's start, the record and the end", "s", tuple(beside), GOAL_OVERHEAD_S),
        ratio("each of two trials at once / one alone", _lasting(together), _lasting(alone), GOAL_TOGETHER),
        ratio("training of each of two at once / alone", _training(together), _training(alone)),
        Row("between the end of a trial and the start of the next", "s", tuple(second.begun - first.ended for first, second in alone)),
        Row("training", "s", tuple(_training(alone))),
        Row("from the command to the first trial, once a sweep", "s", tuple(started)),
    ]
    report.publish(values.json)


def _lasting(sweeps: Sequence[Sequence[Trial]]) -> list[float]:
    return [sum(trial.ended - trial.begun for trial in trials) / len(trials) for trials in sweeps]


def _training(sweeps: Sequence[Sequence[Trial]]) -> list[float]:
    return [sum(trial.training for trial in trials) / len(trials) for trials in sweeps]


def run_sweep(folder: Path, name: str, training: Mapping[str, object], concurrent: int, limit_s: float) -> list[Trial]:
    """A sweep of two equal trainings in a folder, `concurrent` at a time: its trials in the order of their numbers. Raises BenchError."""
    # Two weight decays, which no step is slower or faster for.
    options = {"grid": "weight_decay=0.01,0.02", "name": name, "concurrent": concurrent, "cpus-per-trial": 1, **training}
    command, environment, shown = start_of("deepscale.sweeps.command", options, threads=1, accelerator="")
    environment = {name: value for name, value in environment.items() if name not in NOT_OURS}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            code = subprocess.run(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s
            ).returncode
            how = f"ended with exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            how = f"did not end within {limit_s:.0f} s; type a longer --time-limit or smaller sizes"
        if how:
            output.seek(0)
            raise BenchError(f"{shown} {how}{tail(output.read())}")
    reader = Reader(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    runs = {int(run.data.tags[TRIAL]): run for run in reader.runs(name, f"tags.{SWEEP} = '{name}' and tags.{TRIAL} != ''")}
    places = {int(place.name.split("-")[0]): place for place in (folder / "sweeps" / name / "trials").iterdir()}
    return [
        Trial((places[number] / BEGUN).stat().st_mtime, (places[number] / ENDED).stat().st_mtime, runs[number].data.metrics[SECONDS])
        for number in sorted(runs)
    ]
