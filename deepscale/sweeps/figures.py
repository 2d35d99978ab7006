"""The two figures of a sweep: every choice of settings as a line over the axes to its result, and how much each axis explains."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepscale import drawing
from deepscale.sweeps.importance import Importance, is_logarithmic, numbers_of
from deepscale.sweeps.results import Point, Sweep
from deepscale.sweeps.table import form_of
from deepscale.sweeps.tags import STOPPED_EARLY

MOST_WORDS = 12  # values of an axis that each have a place of their own; numbers beyond lie on a scale
BAND = 0.42  # of the room between two values: over so much the lines through a value are spread, the best on top
NO_RESULT = -0.09  # height of what has none
GREY = "#9a9a9a"


def parallel(sweep: Sweep, path: Path) -> Path | None:
    """Parallel coordinates: one line per choice of settings, means over seeds; None where nothing has a result or nothing is varied."""
    means = [point.mean(sweep.metric) for point in sweep.points]
    known = [mean for mean in means if mean is not None]
    if not known or not sweep.axes:
        return None
    pyplot = drawing.pyplot()
    low, high = _range([value for point in sweep.points for value in point.values(sweep.metric)])
    span = len(sweep.axes)
    figure, axes = pyplot.subplots(figsize=(2.6 + 1.9 * span, 4.6), layout="constrained")
    heights = np.array([_heights(axes, i, name, sweep.points) for i, name in enumerate(sweep.axes)])  # (axes, points)
    colours = pyplot.get_cmap("viridis")
    best, worst = max(known), min(known)
    for i, (point, mean) in reversed(list(enumerate(zip(sweep.points, means, strict=True)))):  # the best are drawn last
        end = NO_RESULT if mean is None else (mean - low) / (high - low)
        colour = GREY if mean is None else colours(0.92 * (mean - worst) / (best - worst or 1.0))
        axes.plot(*_curve([*heights[:, i], end]), color=colour, linewidth=1.8, alpha=0.9, linestyle=_style(point))
        axes.plot([span], [end], "x" if mean is None else "o", color=colour, markersize=5, clip_on=False, zorder=3)
        for value in point.values(sweep.metric) if sweep.seeds > 1 else ():
            axes.annotate("–", (span, (value - low) / (high - low)), (7, 0), textcoords="offset points", color=colour, va="center", fontsize=9)
    _result_axis(axes, sweep, span, low, high, None in means)
    axes.set_xticks(range(span + 1), [*sweep.axes, _result_name(sweep)], fontsize=9)
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set_xlim(-0.05, span + 0.12)
    axes.set_ylim(-0.14 if None in means else -0.05, 1.05)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return drawing.save(figure, path)


def _heights(axes: Any, at: int, name: str, points: Sequence[Point]) -> NDArray[np.float64]:
    """Draws an axis; where it is crossed by each point's line. Points are in order, the best first."""
    axes.axvline(at, color="#444444", linewidth=0.8, zorder=1)
    found = [point.settings[name] for point in points]
    levels = _ordered(list(dict.fromkeys(found)))
    numbers = numbers_of(found)
    if numbers is not None and len(levels) > MOST_WORDS:
        return _scale(axes, at, numbers)
    gap = 1.0 / len(levels)
    for i, level in enumerate(levels):
        _label(axes, at, (i + 0.5) * gap, level)
    heights = np.zeros(len(points))
    for i, level in enumerate(levels):
        crossing = [p for p, value in enumerate(found) if value == level]
        spread = np.linspace(0.5, -0.5, len(crossing)) * BAND * gap if len(crossing) > 1 else [0.0]
        heights[crossing] = (i + 0.5) * gap + np.asarray(spread)
    return heights


def _scale(axes: Any, at: int, numbers: Sequence[float]) -> NDArray[np.float64]:
    """The heights of numbers on an axis of their own, linear or logarithmic, with its ends and three values between them."""
    logarithmic = is_logarithmic(numbers)
    values = np.log10(numbers) if logarithmic else np.array(numbers)
    low, high = values.min(), values.max()
    for height in np.linspace(0, 1, 5):
        value = low + height * (high - low)
        _label(axes, at, height, f"{10**value if logarithmic else value:.2g}")
    return (values - low) / ((high - low) or 1.0)


def _label(axes: Any, at: int, height: float, text: str) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    left = at == 0
    axes.annotate(
        text, (at, height), (-5 if left else 5, 0), textcoords="offset points", fontsize=9, va="center", ha="right" if left else "left",
        bbox=box, zorder=4,
    )  # fmt: skip


def _result_axis(axes: Any, sweep: Sweep, at: int, low: float, high: float, some_missing: bool) -> None:
    axes.axvline(at, color="#444444", linewidth=0.8, zorder=1)
    form = form_of(sweep.metric)
    from matplotlib.ticker import MaxNLocator

    where = {"textcoords": "offset points", "fontsize": 9, "va": "center"}
    for value in MaxNLocator(6).tick_values(low, high):
        if low <= value <= high:
            axes.annotate(form(value), (at, (value - low) / (high - low)), (20, 0), **where)
    if some_missing:
        axes.annotate("no result", (at, NO_RESULT), (20, 0), **where)


def _style(point: Point) -> str:
    """Of its line: whole where trainings finished, dashed where a scheduler stopped them all, dotted without a result."""
    return ":" if not point.measured else "--" if point.measured[0].outcome == STOPPED_EARLY else "-"


def _result_name(sweep: Sweep) -> str:
    what = [sweep.metric, *(["mean; – each seed"] if sweep.seeds > 1 else []), *(["dashed: stopped early"] if STOPPED_EARLY in sweep.ends else [])]
    return "\n".join(what)


def _curve(heights: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A line through the axes that crosses each level."""
    t = np.linspace(0, 1, 25)
    ease = t * t * (3 - 2 * t)
    x = np.concatenate([i + t for i in range(len(heights) - 1)])
    return x, np.concatenate([a + (b - a) * ease for a, b in itertools.pairwise(heights)])


def _ordered(levels: list[str]) -> list[str]:
    """Words in their order, before them numbers by size."""
    numbers = [level for level in levels if numbers_of([level]) is not None]
    return [level for level in levels if level not in numbers] + sorted(numbers, key=float)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def bars(sweep: Sweep, found: Importance, path: Path) -> Path:
    """The share of the variance that each axis explains; a mark where noise alone would end."""
    pyplot = drawing.pyplot()
    names = [share.name for share in found.shares]
    widths = [100 * share.share for share in found.shares]
    colours = [drawing.COLOURS[0]] * len(names)
    if found.rest is not None:
        names.append("the rest: seeds" if len(sweep.axes) == 1 else "the rest: seeds, other interactions")
        widths.append(100 * found.rest)
        colours.append("#c8c8c8")
    figure, axes = pyplot.subplots(figsize=(7, 1.3 + 0.36 * len(names)), layout="constrained")
    axes.barh(range(len(names)), widths, color=colours, height=0.62)
    for i, width in enumerate(widths):
        axes.annotate(
            f"{width:.0f} %" if width >= 9.95 else f"{width:.1f} %", (width, i), (5, 0), textcoords="offset points", va="center", fontsize=9
        )
    for i, share in enumerate(found.shares):
        axes.plot(
            [100 * share.chance] * 2, [i - 0.36, i + 0.36], color="black", linewidth=1.4, label="what noise alone would get" if i == 0 else None
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(widths) * 1.12)
    of = f"{sweep.metric} at step {found.at:,}" if found.at else sweep.metric
    axes.set_xlabel(f"share of the variance of {of}, %\n{found.measure} over {found.trials} trials", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return drawing.save(figure, path)
