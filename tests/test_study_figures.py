"""What a study's curves show: names without what all share, axes that a few lines do not spoil, and how many trainings there are."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepscale import drawing
from deepscale.studies import figures
from deepscale.studies.page import table
from deepscale.studies.study import ACCURACY, CPU, Case, Group, Results, Row, Scale, Study
from deepscale.sweeps.tags import FINISHED

NAMES = tuple(f"{name}, 26 layers" for name in ("one", "two, three", "four", "exploding"))


@pytest.fixture
def found() -> Results:
    """Two seeds of each case; the last one's loss is a million times the others'."""
    cases = tuple(Case(name) for name in NAMES)
    study = Study("x", "X", "x?", "nobody", cases, {CPU: Scale(seeds=(0, 1))}, {ACCURACY: "validation", "train/loss": "loss"})
    groups = {}
    for i, case in enumerate(cases):
        losses = [[step, (1e6 if i == 3 else 1.0) * (3 - step)] for step in (0, 1, 2)]
        rows = tuple(Row(case.name, seed, FINISHED, {ACCURACY: 0.3, "train/loss": 1.5}, {"train/loss": losses}) for seed in (0, 1))
        groups[case.name] = Group(case, rows, study.converged)
    return Results(study, CPU, groups)


def drawn(draw: figures.Draw, found: Results, monkeypatch: pytest.MonkeyPatch) -> Any:
    kept: list[Any] = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: kept.append(figure))
    assert draw(found, Path("unused.png"))
    return kept[0]


def test_a_line_that_explodes_leaves_the_axis_to_the_others(found: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(figures.curves("train/loss"), found, monkeypatch)
    (axis,) = figure.axes
    low, high = axis.get_ylim()
    assert -1 < low < 1 and 3 < high < 4
    assert axis.get_title() == "above, in part or wholly: exploding"
    assert [line.get_label() for line in axis.get_lines()] == ["one", "two, three", "four", "exploding"]
    (axis,) = drawn(figures.curves("train/loss", cases=NAMES[:2]), found, monkeypatch).axes
    assert not axis.get_title() and [line.get_label() for line in axis.get_lines()] == ["one", "two, three"]


def test_how_many_trainings_a_figure_shows(found: Results) -> None:
    first = dataclasses.replace(found.groups[NAMES[0]], rows=found.groups[NAMES[0]].rows[:1])
    found = dataclasses.replace(found, groups=found.groups | {NAMES[0]: first})
    assert figures.trainings_shown(figures.curves("train/loss"), found) == 2
    assert figures.trainings_shown(figures.curves("train/loss", cases=NAMES[:1]), found) == 1
    assert figures.trainings_shown(figures.over_records(cases=NAMES[1:]), found) == 1


def test_a_column_that_says_nothing_of_a_case_is_left_open(found: Results) -> None:
    case = dataclasses.replace(found.study.cases[0], columns=("train/loss",))
    study = dataclasses.replace(found.study, cases=(case, *found.study.cases[1:]))
    group = dataclasses.replace(found.groups[NAMES[0]], case=case)
    lines = table(Results(study, CPU, found.groups | {NAMES[0]: group}))
    assert lines[0] == ["case", "validation", "loss", "n", "converged"]
    assert lines[1][1:] == ["–", "1.5000 ± 0.0000", "2", "–"]
    assert lines[2][1:] == ["30.00 ± 0.00 %", "1.5000 ± 0.0000", "2", "0 of 2"]


def test_layers_without_a_gradient_leave_a_gap(found: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """At step 1 only the first and the last layer have one, at step 2 all but some in the middle."""
    profile = {"1": [[1, 1.0], [100, 1.0]], "2": [[x, 1.0] for x in range(1, 101) if not 40 < x < 60]}
    row = dataclasses.replace(found.groups[NAMES[0]].rows[0], profiles={"mean_abs": profile})
    group = dataclasses.replace(found.groups[NAMES[0]], rows=(row,))
    found = dataclasses.replace(found, groups={NAMES[0]: group})
    (axis,) = drawn(figures.over_records("mean_abs"), found, monkeypatch).axes
    first, second = axis.get_lines()
    assert [len(line.get_xdata()) for line in (first, second)] == [3, 82]
    assert [int(np.isnan(line.get_xdata()).sum()) for line in (first, second)] == [1, 1]
    assert (first.get_marker(), second.get_marker()) == (".", "None")
