"""One row of a study inside its processes: a training as typed, and what is made of it at the end, its file.

FOLDER/depth/cpu_26_layers_seed=0/
    output.txt               what the row's processes have said
    checkpoints/             it goes on from here; of several phases each has its own, PHASE/checkpoints/
    lock                     held while the row runs
"""

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from deepscale import errors, outcome, provenance, stop
from deepscale.curves import thinned
from deepscale.errors import UsageError
from deepscale.gradflow.flow import FILE, Flow
from deepscale.paths import as_folder
from deepscale.studies.stored import Key
from deepscale.studies.study import PREVIOUS, Case, Converged, Measured, Phase, Points
from deepscale.sweeps import rows, values
from deepscale.sweeps.tags import FINISHED, NON_FINITE, OUT_OF_MEMORY

RECORDS, LAYERS = 6, 100  # of a profile: records from the first to the last, and points of each against depth
TAGS = ("study", "scale", "case", "seed", "row", "phase")
SECONDS = "perf/seconds"
BEFORE = {"threads": "1", "checkpoint_every": "10m", "keep": "1"}  # what the study says comes later and wins


@dataclass(frozen=True)
class Job:
    """A row that is to be run. phases: (name, settings) of its trainings, one without a name for most; none where the case is computed.

    settings: all of the row's. typed: what is stored of them. free: settings that change no result, as typed for this start. folder: for what
    the row needs while it runs; file: where it is written in the end.
    """

    key: Key
    case: Case
    settings: Mapping[str, str]
    phases: tuple[Phase, ...]
    typed: Mapping[str, Any]
    free: Mapping[str, str]
    folder: Path
    file: Path
    criterion: Converged
    metrics: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()

    @property
    def experiment(self) -> str:
        """MLflow's experiment of the study."""
        return f"study-{self.key.study}"

    @property
    def output(self) -> Path:
        """What the row has said."""
        return self.folder / "output.txt"

    def place(self, phase: Phase) -> Path:
        """The folder with a phase's checkpoints, and in the end its trained weights."""
        return self.folder / as_folder(phase.name) / "checkpoints"

    def arguments(self, index: int) -> list[str]:
        """What is typed for a phase."""
        phase = self.phases[index]
        before = str(self.place(self.phases[index - 1])) if index else ""
        settings = {**BEFORE, **phase.settings, **self.free}
        typed = [word for name, text in settings.items() for word in values.arguments(name, text.replace(PREVIOUS, before))]
        own = {
            "seed": str(self.key.seed), "experiment": self.experiment, "run-name": f"{self.key.study} {self.key} {phase.name}".strip(),
            "tags": ",".join(f"{name}={text}" for name, text in self.tags(phase.name).items()),
            "checkpoint-dir": str(self.place(phase)), "resume": "auto",
        }  # fmt: skip
        return typed + [word for name, text in own.items() for word in (f"--{name}", text)]

    def tags(self, phase: str) -> dict[str, str]:
        """What marks the run in MLflow."""
        key = self.key
        found = (key.study, key.scale, as_folder(key.case), str(key.seed), key.name, as_folder(phase))
        return {name: text for name, text in zip(TAGS, found, strict=True) if text}


def become(output: Path, environment: Mapping[str, str], main: Callable[..., None], given: Any) -> NoReturn:
    """This process, just started, as a row's: its output goes into a file, Ctrl-C reaches the study alone, and it ends when the study does."""
    os.setsid()
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    os.environ.update(environment)
    sys.stdout.flush()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["deepscale", *(given if isinstance(given, list) else ())]
    stop.program(lambda _: main(given))


def _end_with_the_study() -> None:
    """However it ends: a training then keeps a checkpoint."""
    study = multiprocessing.parent_process()
    if study is not None:
        study.join()
        os.kill(os.getpid(), signal.SIGTERM)


def train(arguments: list[str]) -> None:
    """A phase."""
    from deepscale.train import main

    main(arguments)


@errors.command
def complete(given: tuple[Job, str]) -> None:
    """Writes the row's file: of trainings that have ended in this way, or of what its function measures now."""
    job, ended = given
    torch.set_num_threads(int({**BEFORE, **job.free}["threads"]))
    begin, started = time.monotonic(), time.time_ns() // 1_000_000
    compute = job.case.compute
    if compute is not None:
        measured, ended = _tried(lambda: compute(job.settings, job.key.seed))
        found = _own(job, measured, started, time.monotonic() - begin)
        _tell(job, found, ended, started)
    else:
        found = _recorded(job)
        if job.case.after is not None and ended == FINISHED:
            measured = job.case.after(job.place(job.phases[-1]), job.settings, job.key.seed)
            found = _joined(found, measured)
    numbers = {name: value for name, value in found["numbers"].items() if value is not None}
    steps = max((int(points[-1][0]) for name, points in found["curves"].items() if points and name.startswith(("train/", "val/"))), default=0)
    head = {
        "study": job.key.study, "scale": job.key.scale, "case": job.key.case, "typed": job.typed, "seed": job.key.seed, "outcome": ended,
        "converged": job.criterion.of(numbers, ended), "steps": steps,
    }  # fmt: skip
    found["commit"] = found["commit"] or provenance.commit()
    rows.write_file(job.file, head | found)


def _tried(measure: Callable[[], Measured]) -> tuple[Measured, str]:
    """What a function has measured and FINISHED; nothing, where its numbers or the memory have run out, which is a result too."""
    try:
        return measure(), FINISHED
    except Exception as error:
        ended = outcome.outcome_of(error)
        if ended not in (NON_FINITE, OUT_OF_MEMORY):
            raise
        print(f"deepscale: {error}", flush=True)
        return Measured({}), ended


def _own(job: Job, measured: Measured, started: int, seconds: float) -> dict[str, Any]:
    """What the file holds of a function's result."""
    origin = {"started": started, "commit": provenance.commit(), "hardware": provenance.hardware(), "versions": provenance.versions()}
    numbers = {SECONDS: seconds, **measured.numbers}
    found: dict[str, Any] = {"numbers": {}, "verdict": "", **origin, **measured.about, "settings": dict(job.settings), "curves": {}}
    return _joined(found, dataclasses.replace(measured, numbers=numbers))


def _joined(found: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """The record with what a function has measured added."""
    numbers = found["numbers"] | {name: rows.number(value) for name, value in measured.numbers.items()}
    curves = found["curves"] | {name: rows.points(_few(points)) for name, points in measured.curves.items()}
    profiles = found.get("profiles", {}) | {
        name: {moment: rows.points(_few(points)) for moment, points in moments.items()} for name, moments in measured.profiles.items()
    }
    return found | {"numbers": numbers, "curves": curves} | ({"profiles": profiles} if profiles else {})


def _few(points: Points) -> Points:
    return points if len(points) <= 200 else thinned([(int(x), value) for x, value in points])


def _recorded(job: Job) -> dict[str, Any]:
    """What MLflow has of the row's trainings: the last one's numbers, all their curves one after the other. Raises UsageError."""
    from deepscale.tracking_read import Reader

    reader, after, took = Reader(), 0.0, 0.0
    found: dict[str, Any] = {}
    numbers: dict[str, float] = {}
    curves: dict[str, list[list[float]]] = {}
    for phase in job.phases:
        where = " and ".join(f"tags.{name} = '{text}'" for name, text in job.tags(phase.name).items() if name in ("row", "phase"))
        runs = reader.runs(job.experiment, where)
        if not runs and not phase.name:
            raise UsageError(f"MLflow has no run of {job.key}; remove {job.folder} to train it again")
        if not runs:  # the phases before it have ended in another way than FINISHED
            break
        run = runs[0]
        found = rows.of_run(run, reader, job.metrics, job.curves)
        for name, points in found["curves"].items():
            curves.setdefault(name, []).extend([[step + after, value] for step, value in points])
        after = max([after, *(points[-1][0] for points in curves.values() if points)])
        if len(job.phases) > 1:
            took += found["numbers"].get(SECONDS) or 0.0
            numbers |= {f"{phase.name}: {name}": value for name, value in found["numbers"].items() if name in job.metrics} | {SECONDS: took}
    own = {name: float(found["settings"][name]) for name in ("parameters", "built_depth", "planned_memory_bytes") if name in found["settings"]}
    found |= {"numbers": own | found["numbers"] | numbers, "curves": {name: rows.points(_few(points)) for name, points in curves.items()}}
    record = reader.artifact(run, FILE) if job.profiles else None
    if record is not None:
        from deepscale.gradflow.flow import read

        found["profiles"] = profiles(read(record), job.profiles)
    return found


def profiles(flow: Flow, names: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Fields of a record against depth: name -> step -> (layer, value), of some records from the first to the last."""
    from deepscale.gradflow.values import depth_curve

    last = len(flow.steps) - 1
    chosen = sorted({round(last * i / (RECORDS - 1)) for i in range(RECORDS)}) if last >= 0 else []
    return {name: {str(flow.steps[i]): rows.points(depth_curve(flow, i, name, LAYERS)) for i in chosen} for name in names}


def _tell(job: Job, found: Mapping[str, Any], ended: str, started: int) -> None:
    """A computed row's numbers as a run in MLflow; a store that fails costs no result."""
    from deepscale.tracking_store import Store, cause, shown, store_uri

    uri, now = store_uri(), time.time_ns() // 1_000_000
    try:
        store = Store(uri, job.experiment, f"{job.key.study} {job.key}", started)
        store.open()
        store.send([{"op": "parameters", "values": dict(job.settings)}])
        store.send([{"op": "tags", "values": {**job.tags(""), "outcome": ended}}])
        store.send(
            [{"op": "metrics", "step": 0, "time_ms": now, "values": {name.replace("%", "percent"): v for name, v in found["numbers"].items()}}]
        )
        store.send([{"op": "finish", "status": "FINISHED", "time_ms": now}])
    except Exception as error:  # whatever MLflow raises
        print(f"not recorded in MLflow: {shown(uri)} {cause(error)}", flush=True)
