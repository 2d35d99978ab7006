"""What a study is: its question, its cases, what was published of them, and what was found; all of it data.

    STUDY = Study(
        name="depth", title="...", question="...", source="...",
        cases=(Case("26 layers", {"depth": "26"}, published={"val/accuracy": 0.94}),),
        scales={SMOKE: Scale({"dataset": "synthetic", "max_steps": "8"}), CPU: Scale({...}, seeds=(0, 1, 2)), FULL: Scale({...})},
        columns={"val/accuracy": "validation"},
        findings=(Finding("All depths converge.", lambda found: found.converged()),),
    )

A row is one case with one seed: a training by deepscale/train.py with the settings that one would type (or several, one after the other:
`phases`), or a function of its own (`compute`). Settings are texts by their names in config.py; those of a case win over those of the scale.
Numbers are in the unit of their metric: accuracies are shares (0.94), gradients as recorded, times in seconds.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepscale.errors import unknown_choice
from deepscale.sweeps.means import OverSeeds
from deepscale.sweeps.tags import FINISHED, NON_FINITE, STOPPED_EARLY

# Studies in the order in which they are listed; each is the `STUDY` of the module of its name.
STUDIES = (
    "toy",
    "depth",
    "components",
    "layerscale",
    "limit",
    "vgg",
    "mlp",
    "plain",
    "paired",
    "normfree",
    "dropped",
    "used",
    "reversible",
    "frontier",
)
SMOKE, CPU, FULL = SCALES = ("smoke", "cpu", "full")
ACCURACY = "val/accuracy"
# Of smoke scale: a ConvNeXt of a few small steps.
TINY = {
    "dataset": "synthetic", "feed": "tensors", "width": "4", "patch_size": "4", "batch_size": "16", "max_steps": "4", "eval_images": "40",
    "engine": "torch", "kernel": "torch",
}  # fmt: skip
PREVIOUS = "{previous}"  # in a phase's settings: the folder in which the phase before has left its model.safetensors

Settings = Mapping[str, str]
Points = Sequence[Sequence[float]]  # (step, value) pairs, or (layer, value) of a profile


@dataclass(frozen=True)
class Measured:
    """What a function has measured. curves: name -> (x, value), at most 200 are kept. profiles: field -> moment -> (layer, value).

    about: what the row says of its origin where that is not here and now ("hardware", "versions", "commit", "started" in ms).
    """

    numbers: Mapping[str, float]
    curves: Mapping[str, Points] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, Points]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One of several trainings of a row, each a run of its own; `PREVIOUS` in its settings is the folder of the one before."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Case:
    """A line of the table. published: metric -> the number of the source.

    compute: instead of a training, a function of all settings (scale's and case's) and the seed. after: measures a trained network, given
    the folder with its model.safetensors, the settings and the seed; what it returns is added to the row. Both run in a process of their own,
    with one thread, and are functions of a module, not lambdas. columns: those metrics of the table that say something of the case, () for all.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    compute: Callable[[Settings, int], Measured] | None = None
    after: Callable[[Path, Settings, int], Measured] | None = None
    columns: tuple[str, ...] = ()

    def tells(self, metric: str) -> bool:
        """Whether a metric says something of the case."""
        return not self.columns or metric in self.columns


@dataclass(frozen=True)
class FromSweep:
    """Rows that a sweep has written: the folder's name in docs/results, and the commands that write them. A case is the rows whose
    varied settings are its own."""

    folder: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """A size of a study. fixed: settings of all its rows. cases: names, () for all. note: what differs from the original.

    changes: case -> settings that win over the case's own at this size. once: cases that are run with the first seed alone.
    sweep: where rows come from that the study does not run itself.
    """

    fixed: Settings = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    cases: tuple[str, ...] = ()
    note: str = ""
    changes: Mapping[str, Settings] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    sweep: FromSweep | None = None


@dataclass(frozen=True)
class Converged:
    """What the column `converged` says: a metric's last value above a bound, or below one."""

    metric: str = ACCURACY
    above: float | None = 0.5
    below: float | None = None

    def __str__(self) -> str:
        bound = self.above if self.above is not None else self.below
        assert bound is not None
        name = {ACCURACY: "validation accuracy", "train/accuracy": "training accuracy"}.get(self.metric, self.metric)
        return f"{name} {'above' if self.above is not None else 'below'} " + (f"{bound:.0%}" if self.metric.endswith("accuracy") else f"{bound:g}")

    def of(self, numbers: Mapping[str, float], outcome: str) -> bool | None:
        """Whether a row has converged; None where its end says nothing of it."""
        if outcome not in (FINISHED, STOPPED_EARLY, NON_FINITE):
            return None
        value = numbers.get(self.metric)
        if value is None or outcome == NON_FINITE:
            return False if outcome == NON_FINITE else None
        return (self.above is None or value > self.above) and (self.below is None or value < self.below)


@dataclass(frozen=True)
class Row:
    """One finished row, as its file holds it. varied: of a sweep's row, the settings that it varies. settings: all, resolved, as text."""

    case: str
    seed: int
    outcome: str
    numbers: Mapping[str, float]
    curves: Mapping[str, Points] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, Points]] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    varied: Settings = field(default_factory=dict)
    verdict: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)  # commit, hardware, versions, started
    path: Path | None = None


@dataclass(frozen=True)
class Group(OverSeeds):
    """The rows of a case, which differ in their seed alone. Means are over those that finished."""

    case: Case
    rows: tuple[Row, ...]
    criterion: Converged

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows that finished."""
        return tuple(row for row in self.rows if row.outcome in (FINISHED, STOPPED_EARLY))

    def values(self, metric: str) -> list[float]:
        """Last values of a metric, one for each seed."""
        return [row.numbers[metric] for row in self.measured if metric in row.numbers]

    def converged(self) -> tuple[int, int]:
        """(how many rows have converged, of how many that could tell)."""
        judged = [found for row in self.rows if (found := self.criterion.of(row.numbers, row.outcome)) is not None]
        return sum(judged), len(judged)


@dataclass(frozen=True)
class Results:
    """The rows of a study at one scale, as far as there are any: `found["26 layers"].mean("val/accuracy")`."""

    study: "Study"
    scale: str
    groups: Mapping[str, Group]

    def __getitem__(self, case: str) -> Group:
        return self.groups[case] if case in self.groups else Group(self.study.case(case), (), self.study.converged)

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of the cases."""
        return [row for group in self.groups.values() for row in group.rows]

    def mean(self, case: str, metric: str = ACCURACY) -> float | None:
        """Mean of a case over its seeds; None where it was not measured."""
        return self[case].mean(metric)

    def converged(self, *cases: str) -> bool | None:
        """Whether all rows of these cases (of all that have rows) have converged; None where one of those named has none."""
        counts = [self[case].converged() for case in cases or self.groups]
        if not counts or not all(of for _, of in counts):
            return None
        return all(count == of for count, of in counts)

    def none_converged(self, *cases: str) -> bool | None:
        """Whether no row of these cases has converged; None where one of them has none."""
        counts = [self[case].converged() for case in cases]
        return None if not all(of for _, of in counts) else not any(count for count, _ in counts)


@dataclass(frozen=True)
class Finding:
    """A claim, of the source or of the field. holds: True, False, or None where these rows do not test it.

    measured: the numbers that it rests on, in words, made of the rows; "" where there are none.
    """

    sentence: str
    holds: Callable[[Results], bool | None]
    measured: Callable[[Results], str]


@dataclass(frozen=True)
class Figure:
    """A picture. draw writes it as PNG and returns False where these rows have nothing to show. figures.py has the usual ones."""

    name: str
    caption: str
    draw: Callable[[Results, Path], bool]


@dataclass(frozen=True)
class Study:
    """A study. source: who published it, and where. columns: metric -> heading, in the table's order.

    curves: metrics whose curves the rows keep beside loss, accuracy and the first layer's gradient. profiles: which of gradflow's fields
    (flow.LAYER_FIELDS, BLOCK_FIELDS) the rows keep against depth, at records from the first to the last. notes: sentences for the page.
    """

    name: str
    title: str
    question: str
    source: str
    cases: tuple[Case, ...]
    scales: Mapping[str, Scale]
    columns: Mapping[str, str]
    findings: tuple[Finding, ...] = ()
    figures: tuple[Figure, ...] = ()
    converged: Converged = Converged()
    curves: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ("mean_abs",)
    notes: tuple[str | Callable[[Results], str], ...] = ()

    def case(self, name: str) -> Case:
        """A case by its name. Raises UsageError, listing the known ones."""
        for case in self.cases:
            if case.name == name:
                return case
        raise unknown_choice(f"study {self.name}'s case", name, [case.name for case in self.cases])

    def scale(self, name: str) -> Scale:
        """A scale by its name. Raises UsageError, listing the known ones."""
        if name not in self.scales:
            raise unknown_choice(f"study {self.name}'s scale", name, self.scales)
        return self.scales[name]

    def of_scale(self, scale: str) -> tuple[Case, ...]:
        """The cases that are run at a scale."""
        names = self.scale(scale).cases
        return tuple(self.case(name) for name in names) if names else self.cases

    def settings(self, scale: str, case: Case, phase: Phase | None = None) -> dict[str, str]:
        """All that is typed for a row, but for its seed."""
        own = self.scale(scale)
        return {**own.fixed, **case.settings, **(phase.settings if phase else {}), **own.changes.get(case.name, {})}


def load(name: str) -> Study:
    """A study by its name. Raises UsageError, listing the known ones."""
    if name not in STUDIES:
        raise unknown_choice("the study", name, STUDIES)
    study: Study = importlib.import_module(f"deepscale.studies.{name}").STUDY
    return study
