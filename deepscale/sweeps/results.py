"""The results of a sweep out of MLflow: its trials as rows, and their means over seeds, also while it runs.

A trial is a run with the tags of tags.py: the sweep's name, the trial's number, and what to compare by. Its runs may lie in one
store or in several (each trial of a job on a cluster writes its own); where a trial has several runs, the one that has ended counts.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from deepscale import config
from deepscale.config import Config
from deepscale.curves import LOCAL
from deepscale.errors import UsageError
from deepscale.sweeps.means import OverSeeds
from deepscale.sweeps.tags import AXES, CONVERGED, ENDED, FINISHED, METRIC, MODE, NON_FINITE, SPACE, STOPPED_EARLY, SWEEP, TRIAL, TRIALS
from deepscale.tracking_read import MlflowRun, Reader, listed
from deepscale.tracking_store import shown

RUNNING = "running"
ACCURACY = "val/accuracy"
# Columns of the table: metric -> heading.
NUMBERS = {
    "val/accuracy": "validation",
    "test/accuracy": "test",
    "train/loss": "training loss",
    "grad/first_layer_mean_abs": "first layer's gradient",
    "perf/seconds": "seconds",
}


@dataclass(frozen=True)
class Row:
    """One trial. settings: all of the run's, resolved, as text. numbers: last values of `NUMBERS`' metrics, the sweep's metric among them.

    outcome: one of `ENDED`, "running", or how a start ended that is tried again. curve: (step, value) of the sweep's metric.
    """

    number: int
    settings: dict[str, str]
    outcome: str
    numbers: dict[str, float]
    curve: tuple[tuple[int, float], ...]
    run: MlflowRun = field(repr=False, compare=False)
    reader: Reader = field(repr=False, compare=False)

    @property
    def steps(self) -> int:
        """Optimiser steps until the last validation."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def seed(self) -> int:
        """The seed it was trained with."""
        return int(self.settings.get("seed", 0))

    def converged(self, above: float) -> bool | None:
        """Whether its validation accuracy is above this share: not where it diverged, None where the end says nothing of it."""
        if self.outcome not in (FINISHED, STOPPED_EARLY, NON_FINITE):
            return None
        return self.outcome != NON_FINITE and self.numbers.get(ACCURACY, 0.0) > above


@dataclass(frozen=True)
class Point(OverSeeds):
    """The trials of one choice of settings, which differ in their seed alone."""

    settings: dict[str, str]
    rows: tuple[Row, ...]

    @cached_property
    def measured(self) -> tuple[Row, ...]:
        """The trials that means are taken over: those that finished, or where none did, those that a scheduler has stopped."""
        finished = tuple(row for row in self.rows if row.outcome == FINISHED)
        return finished or tuple(row for row in self.rows if row.outcome == STOPPED_EARLY)

    def values(self, metric: str) -> list[float]:
        """Last values of a metric."""
        return [row.numbers[metric] for row in self.measured if metric in row.numbers]

    def converged(self, above: float) -> tuple[int, int]:
        """(how many trials have converged, of how many)."""
        judged = [found for row in self.rows if (found := row.converged(above)) is not None]
        return sum(judged), len(judged)

    @property
    def ends(self) -> dict[str, int]:
        """Outcome -> how many trials."""
        return counted(row.outcome for row in self.rows)


@dataclass(frozen=True)
class Sweep:
    """A sweep as far as it has come. trials: how many are planned, None where that is not known. metric: it is good where it is `mode`."""

    name: str
    space: str
    axes: tuple[str, ...]
    metric: str
    mode: str
    above: float
    trials: int | None
    rows: tuple[Row, ...]

    @cached_property
    def points(self) -> list[Point]:
        """One per choice of settings, the best mean first; those without a result last, in the order of their trials."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(tuple(self.of(row).values()), []).append(row)
        points = [Point(dict(zip(self.axes, values, strict=True)), tuple(rows)) for values, rows in groups.items()]
        sign = -1.0 if self.mode == "max" else 1.0

        def place(point: Point) -> float:
            mean = point.mean(self.metric)
            return math.inf if mean is None else sign * mean

        return sorted(points, key=place)

    def of(self, row: Row) -> dict[str, str]:
        """The settings of a trial that the sweep varies."""
        return {name: as_typed(row.settings.get(name, "")) for name in self.axes}

    @property
    def ends(self) -> dict[str, int]:
        """Outcome -> how many trials."""
        return counted(row.outcome for row in self.rows)

    @property
    def seeds(self) -> int:
        """How many different seeds there are."""
        return len({row.seed for row in self.rows})


def read(name: str, readers: Sequence[Reader]) -> Sweep:
    """The sweep of this name in some stores. Raises UsageError where there is none, listing the sweeps there are."""
    found: dict[int, Row] = {}
    for reader in readers:
        for run in reader.runs(where=f"tags.{SWEEP} = '{name}'" if "'" not in name else ""):
            if run.data.tags.get(SWEEP) == name and run.data.tags.get(TRIAL, "").isdigit():
                row = _row(reader, run)
                if row.number not in found or _counts_before(row, found[row.number]):
                    found[row.number] = row
    rows = tuple(found[number] for number in sorted(found))
    if not rows:
        known = dict.fromkeys(run.data.tags[SWEEP] for reader in readers for run in reader.runs() if TRIAL in run.data.tags)
        stores = ", ".join(dict.fromkeys(shown(reader.uri) for reader in readers))
        if not known:
            raise UsageError(f"no trial of a sweep is in {stores}; start one: python tune/sweep.py tune/spaces/small.yaml")
        raise UsageError(f"no trial of a sweep {name!r} is in {stores}; possible: {listed(known)}")
    said = rows[0].run.data.tags
    metric, mode = said.get(METRIC, ACCURACY), said.get(MODE, "max")
    planned = max((int(row.run.data.tags.get(TRIALS, 0)) for row in rows), default=0)
    axes = tuple(said[AXES].split()) if AXES in said else _differing(rows)
    return Sweep(name, said.get(SPACE, ""), axes, metric, mode, float(said.get(CONVERGED, 0.5)), planned or None, rows)


def _row(reader: Reader, run: MlflowRun) -> Row:
    metric = run.data.tags.get(METRIC, ACCURACY)
    numbers = {name: value for name in (*NUMBERS, metric) if math.isfinite(value := run.data.metrics.get(name, math.nan))}
    outcome = RUNNING if run.info.status == "RUNNING" else run.data.tags.get("outcome", run.info.status.lower())
    return Row(int(run.data.tags[TRIAL]), dict(run.data.params), outcome, numbers, tuple(reader.history(run, metric)), run, reader)


def _counts_before(row: Row, other: Row) -> bool:
    """Whether of two runs of a trial the first is the one to take."""
    return (row.outcome in ENDED, row.run.info.start_time) > (other.outcome in ENDED, other.run.info.start_time)


def _differing(rows: Sequence[Row]) -> tuple[str, ...]:
    """The settings that are not the same in all trials, but for the seed and what belongs to one run alone."""
    own = {*LOCAL, "seed", "run_name", "experiment", "resume"}
    return tuple(name for name in config.flat(Config()) if name not in own and len({row.settings.get(name) for row in rows}) > 1)


def counted(words: Iterable[str]) -> dict[str, int]:
    """How often each word is there, the first ones first."""
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return found


def as_typed(text: str) -> str:
    """A recorded setting as one types it.

    >>> as_typed("0.0"), as_typed("1e-06"), as_typed("none"), as_typed("10000")
    ('0', '1e-6', 'none', '10000')
    """
    try:
        return text if text.lstrip("-").isdigit() else re.sub(r"e([+-])0+", r"e\1", f"{float(text):g}")
    except ValueError:
        return text
