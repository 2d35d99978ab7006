"""The usual figures of a study, drawn of its rows: curves over the steps, the gradient against depth, a number against another.

Each function makes what a `Figure` of study.py draws with: `Figure("curves", "...", figures.curves("train/loss", "val/accuracy"))`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepscale import drawing
from deepscale.studies.study import Group, Points, Results, Row

Draw = Callable[[Results, Path], bool]
Doubles = NDArray[np.float64]
COLOURS = (*drawing.COLOURS, "#000000", "#8f8f8f")
BEYOND = 10.0  # times the usual height of a line
STYLES = ("-", (0, (4, 2)), (0, (1.5, 1.5)))
# Metric or field -> (axis label with its unit, what it is multiplied with, whether the axis is logarithmic).
AXES: dict[str, tuple[str, float, bool]] = {
    "train/loss": ("training loss, cross entropy in nats", 1.0, False),
    "val/loss": ("validation loss, cross entropy in nats", 1.0, False),
    "train/accuracy": ("training accuracy, %", 100.0, False),
    "val/accuracy": ("validation accuracy, %", 100.0, False),
    "test/accuracy": ("test accuracy, %", 100.0, False),
    "grad/first_layer_mean_abs": ("first layer's gradient, mean |g|", 1.0, True),
    "mean_abs": ("gradient of the weights, mean |g|", 1.0, True),
    "output_grad_l2": ("gradient at the block outputs, L2 norm", 1.0, True),
    "use": ("|branch| / |stream| of a block", 1.0, True),
    "gamma": ("|gamma|", 1.0, True),
    "output_std": ("block outputs, standard deviation", 1.0, True),
}


def curves(*metrics: str, cases: Sequence[str] = (), logarithmic: bool = False) -> Draw:
    """Metrics over the optimiser steps, a panel each, a line for each case: the mean over its seeds, with a band of one deviation."""

    def draw(found: Results, path: Path) -> bool:
        groups = _groups(found, cases)
        panels = {metric: lines for metric in metrics if (lines := {g.case.name: line for g in groups if len(line := over_seeds(g, metric)[0])})}
        if not panels:
            return False
        figure, axes = _panels(len(panels))
        names = _short(group.case.name for group in groups)
        for axis, (metric, lines) in zip(axes, panels.items(), strict=True):
            label, factor, log = AXES.get(metric, (metric, 1.0, False))
            for group in groups:
                if group.case.name not in lines:
                    continue
                look, (x, mean, deviation) = _look(groups.index(group)), over_seeds(group, metric)
                axis.plot(x, factor * mean, label=names[group.case.name], marker="o" if len(x) < 15 else None, markersize=3, **look)
                low = np.where(mean > deviation, mean - deviation, np.nan) if log or logarithmic else mean - deviation  # a logarithm has no 0
                axis.fill_between(x, factor * low, factor * (mean + deviation), color=look["color"], alpha=0.12, linewidth=0)
            _finish(axis, "optimiser step", label, logarithmic=log or logarithmic)
            if not (log or logarithmic):
                _cut(axis, {names[group.case.name]: factor * over_seeds(group, metric)[1] for group in groups if group.case.name in lines})
        legend(figure, axes[0])
        drawing.save(figure, path)
        return True

    return _showing(draw, cases)


def against_depth(field: str = "mean_abs", moments: Sequence[int] = (0, -1), cases: Sequence[str] = (), relative: bool = False) -> Draw:
    """A profile of each case's first row against depth, a panel for each of some of its records: 0 is the first, -1 the last.

    relative: depth as a share of the network's, for networks of different depths. What is exactly 0 leaves a gap in a logarithmic axis.
    """

    def draw(found: Results, path: Path) -> bool:
        rows = [(group, row) for group in _groups(found, cases) for row in group.rows[:1] if row.profiles.get(field)]
        if not rows:
            return False
        groups = [group for group, _ in rows]
        names = _short(group.case.name for group in groups)
        figure, axes = _panels(len(moments))
        label, factor, log = AXES.get(field, (field, 1.0, True))
        for axis, moment in zip(axes, moments, strict=True):
            steps = set()
            for group, row in rows:
                step, points = _record(row, field, moment)
                steps.add(int(step))
                line = _line(points)
                x = line[:, 0] / line[:, 0].max() if relative and len(line) else line[:, 0]
                y = np.where(line[:, 1] > 0, line[:, 1], np.nan) if log else line[:, 1]
                axis.plot(x, factor * y, label=names[group.case.name], linewidth=1.4, **_look(groups.index(group)))
            axis.set_title(f"step {min(steps):,}" + (f" to {max(steps):,}, the last of each" if len(steps) > 1 else ""), fontsize=10)
            _finish(axis, "depth, share of the layers" if relative else "layer, from the image to the head", label, logarithmic=log)
        legend(figure, axes[0])
        drawing.save(figure, path)
        return True

    return _showing(draw, cases, first_rows=True)


def over_records(field: str = "mean_abs", cases: Sequence[str] = ()) -> Draw:
    """A profile against depth, a panel for each case, a line for each record: light the first, dark the last. One seed."""

    def draw(found: Results, path: Path) -> bool:
        rows = [(group, row) for group in _groups(found, cases) for row in group.rows[:1] if row.profiles.get(field)]
        if not rows:
            return False
        pyplot = drawing.pyplot()
        figure, axes = _panels(len(rows), sharey=True)
        label, factor, log = AXES.get(field, (field, 1.0, True))
        colours = pyplot.get_cmap("viridis_r")
        for axis, (group, row) in zip(axes, rows, strict=True):
            moments = sorted(row.profiles[field], key=int)
            lines = {step: _line(row.profiles[field][step]) for step in moments}
            most = max(map(len, lines.values()))
            for i, step in enumerate(moments):
                line = _broken(lines[step], most)
                y = np.where(line[:, 1] > 0, line[:, 1], np.nan) if log else line[:, 1]
                marker = "." if 4 * len(lines[step]) < most else None
                colour = colours(0.1 + 0.9 * i / max(1, len(moments) - 1))
                axis.plot(line[:, 0], factor * y, color=colour, linewidth=1.2, marker=marker, label=f"step {int(step):,}")
            axis.set_title(group.case.name, fontsize=10)
            _finish(axis, "layer, from the image to the head", label, logarithmic=log)
        axes[0].legend(frameon=False, fontsize=8)
        drawing.save(figure, path)
        return True

    return _showing(draw, cases, first_rows=True)


def trainings_shown(draw: Draw, found: Results) -> int:
    """How many trainings of a case a figure shows: all seeds, or the first row of each alone."""
    shown = _groups(found, getattr(draw, "cases", ()))
    count = max((len(group.rows) for group in shown if group.case.compute is None), default=0)
    return min(count, 1) if getattr(draw, "first_rows", False) else count


def _showing(draw: Draw, cases: Sequence[str], first_rows: bool = False) -> Draw:
    draw.cases, draw.first_rows = cases, first_rows  # type: ignore[attr-defined]
    return draw


def over_seeds(group: Group, metric: str) -> tuple[Doubles, Doubles, Doubles]:
    """(steps, mean, standard deviation) of a curve over a case's rows, at the steps that all of them have."""
    found = [{int(step): value for step, value in row.curves.get(metric, ())} for row in group.rows]
    found = [curve for curve in found if curve]
    steps = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    values = np.array([[curve[step] for step in steps] for curve in found], float).reshape(len(found), len(steps))
    if not steps:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    return np.array(steps, float), values.mean(0), values.std(0, ddof=1) if len(found) > 1 else np.zeros(len(steps))


def _groups(found: Results, cases: Sequence[str]) -> list[Group]:
    return [group for name, group in found.groups.items() if group.rows and (not cases or name in cases)]


def _short(cases: Iterable[str]) -> dict[str, str]:
    """Case -> its name without what all of them begin or end with.

    >>> _short(["110 layers, paired, at init", "110 layers, mirrored, at init"])
    {'110 layers, paired, at init': 'paired', '110 layers, mirrored, at init': 'mirrored'}
    """
    parts = {name: name.split(", ") for name in cases}
    for end in (0, -1):
        while len(parts) > 1 and len({part[end] for part in parts.values()}) == 1 and all(len(part) > 1 for part in parts.values()):
            for part in parts.values():
                part.pop(end)
    return {name: ", ".join(part) for name, part in parts.items()}


def _cut(axis: Any, lines: Mapping[str, Doubles]) -> None:
    """Ends a linear axis where a few lines would press all others to its foot, and names those that leave it."""
    highest = {name: float(np.nanmax(line)) for name, line in lines.items()}
    usual = float(np.median(list(highest.values())))
    beyond = [name for name, value in highest.items() if value > BEYOND * usual > 0]
    if beyond:
        low, high = min(float(np.nanmin(line)) for line in lines.values()), max(value for name, value in highest.items() if name not in beyond)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axis.set_title(f"above, in part or wholly: {', '.join(beyond)}", fontsize=8)


def _record(row: Row, field: str, moment: int) -> tuple[str, Points]:
    steps = sorted(row.profiles[field], key=int)
    return steps[moment], row.profiles[field][steps[moment]]


def _line(points: Points) -> Doubles:
    return np.array(points, float).reshape(-1, 2)


def _broken(line: Doubles, most: int) -> Doubles:
    """The line with a gap wherever ten points in a row are missing, of the `most` that others have: layers that gamma closes have none."""
    usual = (line[-1, 0] - line[0, 0]) / most if len(line) else 0.0
    gaps = np.flatnonzero(np.diff(line[:, 0]) > 10 * usual) + 1
    return np.insert(line, gaps, np.nan, axis=0)


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}


def _panels(count: int, **options: Any) -> tuple[Any, Any]:
    """A figure with so many axes, at most three beside each other."""
    across = min(count, 3)
    down = -(-count // across)
    figure, axes = drawing.pyplot().subplots(down, across, figsize=(4.6 * across + 0.6, 3.7 * down), layout="constrained", squeeze=False, **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _finish(axis: Any, x: str, y: str, logarithmic: bool) -> None:
    if logarithmic and any((np.asarray(line.get_ydata(), float) > 0).any() for line in axis.get_lines()):
        axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    axis.margins(x=0.02)


def legend(figure: Any, axis: Any) -> None:
    """Below all panels."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        inches = 0.6 + 0.08 * max(map(len, labels))  # of an entry: its line, and letters of 8 points
        columns = max(1, min(len(labels), 5, int(figure.get_figwidth() / inches)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def scatter(x: str, y: str, names: Mapping[str, str] | None = None, logarithmic: tuple[bool, bool] = (False, False)) -> Draw:
    """One number of each row against another, a dot for each row. names: metric -> axis label."""

    def draw(found: Results, path: Path) -> bool:
        groups = [group for group in found.groups.values() if any(x in row.numbers and y in row.numbers for row in group.rows)]
        if not groups:
            return False
        figure, (axis,) = _panels(1)
        labels = [(names or {}).get(metric) or AXES.get(metric, (metric, 1.0, False))[0] for metric in (x, y)]
        factors = [AXES.get(metric, (metric, 1.0, False))[1] for metric in (x, y)]
        for i, group in enumerate(groups):
            dots = np.array([[row.numbers[x], row.numbers[y]] for row in group.rows if x in row.numbers and y in row.numbers])
            axis.plot(factors[0] * dots[:, 0], factors[1] * dots[:, 1], "o", color=_look(i)["color"], markeredgecolor="white", label=group.case.name)
        _finish(axis, labels[0], labels[1], logarithmic[1])
        if logarithmic[0]:
            axis.set_xscale("log")
        legend(figure, axis)
        drawing.save(figure, path)
        return True

    return draw
