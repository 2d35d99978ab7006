"""Pictures of gradient flow: a heatmap of depth against steps, and records overlaid against depth.

Logarithms are taken of positive values only; exact zeros, what is not finite and what is not recorded have colours of their own.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepscale import drawing
from deepscale.errors import UsageError
from deepscale.gradflow.flow import Flow
from deepscale.gradflow.values import Doubles, closed_by_gamma, depth_curve, geometric

ROWS = 1000  # of a heatmap, at most
TICKS = 8
COLOURS = (*drawing.COLOURS, "#000000", "#8f8f8f")
STYLES = ("-", (0, (4, 2)), (0, (1.5, 1.5)))  # one line on top of another still shows both
BELOW, ABOVE = 16, 12  # decades that an overlay shows around where the curves begin: what leaves them has vanished or exploded
# Cells without a logarithm: what they are called, and a colour that viridis does not have.
CLOSED, ZERO, NONFINITE, NOTHING = "exactly 0: closed by gamma", "exactly 0", "NaN or infinite", "not recorded"
CELLS = {CLOSED: "#e3e3e3", ZERO: "#8f8f8f", NONFINITE: "#d7191c", NOTHING: "#ffffff"}


def heatmap(flow: Flow, path: Path) -> Path:
    """Writes a PNG of depth (down) against records (right): the gradient at the block outputs, and mean |g| of the weights.

    Records are evenly spaced and labelled by their steps. Layers beyond `ROWS` are averaged geometrically in bins. Gammas and
    downsamplings, which have no depth of their own, are left out. Raises UsageError for a run without records.
    """
    if not len(flow.steps):
        raise UsageError("the run has no record of gradient flow to draw; train it with --record-every auto")
    pyplot = drawing.pyplot()
    closed = np.stack([closed_by_gamma(flow, record) for record in range(len(flow.steps))])
    own = flow.weights & (flow.layer_kinds != "downsample")
    nonfinite = np.where(np.nan_to_num(flow.nonfinite) > 0, np.inf, flow.mean_abs)
    panels = [("mean |g| of the weights, by layer", flow.layer_depths[own], nonfinite[:, own], closed[:, own])]
    if len(flow.block_names) and not np.isnan(flow.output_grad_l2).all():
        outputs = _unless_finite(np.asarray(flow.output_grad_l2, np.float64))
        panels.insert(0, ("gradient at the block outputs, L2 norm", flow.block_depths, outputs, np.zeros(outputs.shape, bool)))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.8), layout="constrained", squeeze=False)
    seen: set[str] = set()
    for axis, (title, depths, values, shut) in zip(axes[0], panels, strict=True):
        seen |= _panel(axis, values, shut)
        axis.set_title(title, fontsize=10)
        _label_steps(axis, flow.steps)
        _label_depths(axis, depths)
    axes[0, 0].set_ylabel("layer, from the image down to the head")
    if seen:
        patches = [pyplot.Rectangle((0, 0), 1, 1, facecolor=CELLS[name], edgecolor="#8f8f8f", linewidth=0.5) for name in CELLS if name in seen]
        figure.legend(patches, [name for name in CELLS if name in seen], loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    name = f"{flow.meta.get('run_name', 'gradient flow')} · {flow.depth:,} layers"
    figure.suptitle("\n".join(textwrap.wrap(name, 60 * len(panels))), fontsize=11)
    return drawing.save(figure, path)


def overlay(flows: Mapping[str, Flow], path: Path, record: int = -1, title: str = "") -> Path:
    """Writes a PNG of one record of each flow against depth: the gradient at the block outputs, and the signal's standard deviation.

    Flows of different depths are drawn on relative depth. At most `BELOW` and `ABOVE` decades are shown around the values that the
    gradient has at the last block and the signal at the first; a band under them holds what is exactly 0. Raises UsageError
    where there is nothing to draw.
    """
    drawn = {name: flow for name, flow in flows.items() if len(flow.steps) and len(flow.block_names)}
    if not drawn:
        raise UsageError("there is nothing to draw: no record with observed block outputs was given")
    pyplot = drawing.pyplot()
    relative = len({flow.depth for flow in drawn.values()}) > 1
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    sides = (("output_grad_l2", "gradient at the block outputs, L2 norm"), ("output_std", "signal: standard deviation of the block outputs"))
    for axis, (name, what) in zip(axes, sides, strict=True):
        lines = {}
        for label, flow in drawn.items():
            points = np.array(depth_curve(flow, record, name), np.float64).reshape(-1, 2)
            lines[label if len(points) else f"{label} (no finite value)"] = points / (flow.depth if relative else 1, 1)
        axis.set_title(what, fontsize=10)
        axis.set_xlabel("depth, share of the layers" if relative else "layer, from the image to the head")
        _lines(axis, lines, left=axis is axes[0])
    axes[0].yaxis.tick_right()
    figure.suptitle(title, fontsize=11)
    return drawing.save(figure, path)


def _lines(axis: Any, lines: Mapping[str, Doubles], left: bool) -> None:
    """Curves (points, 2) on a logarithmic axis, named beside their left or right ends."""
    looks: list[dict[str, Any]] = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "zorder": 2 + i % len(STYLES) / 10} for i in range(len(lines))
    ]
    shown = np.concatenate([line[:, 1] for line in lines.values()])
    shown = shown[shown > 0]
    origins = [line[-1 if left else 0, 1] for line in lines.values() if len(line)]
    origin = float(np.median([value for value in origins if value > 0] or [1.0]))
    low = max(float(shown.min(initial=origin)) / 2, origin / 10**BELOW)
    high = min(float(shown.max(initial=origin)) * 2, origin * 10**ABOVE)
    strips = {label: 0.025 * (i + 1) for i, label in enumerate(label for label, line in lines.items() if (line[:, 1] == 0).any())}
    band = 0.025 * (len(strips) + 2.5) if strips else 0.0
    axis.set_yscale("log")
    axis.set_ylim(low / (high / low) ** (band / (1 - band)), high)
    axis.margins(x=0.01)
    axis.grid(alpha=0.25)
    if strips:
        axis.fill_between([0, 1], 0, band, color="#eeeeee", transform=axis.transAxes, zorder=3)
        axis.text(0.5, band, "exactly 0", transform=axis.transAxes, ha="center", va="top", fontsize=8, color="#555555", zorder=5)
        axis.set_yticks([tick for tick in axis.get_yticks() if tick >= low])
        axis.minorticks_off()
    ends = []
    for (label, line), look in zip(lines.items(), looks, strict=True):
        axis.plot(line[:, 0], np.where(line[:, 1] > 0, line[:, 1], np.nan), linewidth=1.6, **look)
        zero, end = line[line[:, 1] == 0, 0], line[0 if left else -1, 1] if len(line) else np.nan
        dots = axis.plot(
            zero, np.full(len(zero), strips.get(label, 0.0)), ".", markersize=2.5, color=look["color"], transform=axis.get_xaxis_transform()
        )
        dots[0].set_zorder(4)
        share = band + (1 - band) * np.log(end / low) / np.log(high / low) if end > 0 else strips.get(label, 0.0)
        ends.append(float(np.clip(share, band if end > 0 else 0, 1)))
    axis.set_ylim(low / (high / low) ** (band / (1 - band)), high)
    _label_ends(axis, list(lines), ends, looks, left)


def _panel(axis: Any, values: NDArray[Any], closed: NDArray[np.bool_]) -> set[str]:
    """Draws values (S, P) in at most ROWS rows; the kinds of cells without a logarithm that are in it."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_rgba

    count = min(ROWS, values.shape[1])
    bins = np.arange(values.shape[1]) * count // values.shape[1]
    cells = geometric(values, bins, count).T  # (rows, S)
    shut = geometric(closed.astype(np.float64), bins, count).T > 0
    positive = cells[(cells > 0) & np.isfinite(cells)]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.1, 1.0)
    if high < 10 * low:  # noise within a decade is not spread over all colours
        low, high = low / 10**0.5, high * 10**0.5
    scale, colours = LogNorm(low, high), colormaps["viridis"]
    image = colours(scale(np.where((cells > 0) & np.isfinite(cells), cells, low)))
    kinds = {CLOSED: (cells == 0) & shut, ZERO: (cells == 0) & ~shut, NONFINITE: np.isinf(cells), NOTHING: np.isnan(cells)}
    for name, where in kinds.items():
        image[where] = to_rgba(CELLS[name])
    axis.imshow(image, aspect="auto", interpolation="nearest")
    axis.figure.colorbar(ScalarMappable(scale, colours), ax=axis, pad=0.02)
    return {name for name, where in kinds.items() if where.any()}


def _unless_finite(values: Doubles) -> Doubles:
    """NaN beside recorded values of the same record stands for a gradient that is no number; alone, for not recorded."""
    recorded = ~np.isnan(values).all(1, keepdims=True)
    return np.where(np.isnan(values) & recorded, np.inf, values)


def _label_steps(axis: Any, steps: NDArray[np.int64]) -> None:
    shown = np.unique(np.round(np.linspace(0, len(steps) - 1, TICKS)).astype(int))
    axis.set_xticks(shown, [f"{steps[i]:,}" for i in shown])
    axis.set_xlabel("optimiser step")


def _label_depths(axis: Any, depths: NDArray[np.int64]) -> None:
    """Layer numbers beside the rows; rows are evenly spaced over the layers shown."""
    rows = min(ROWS, len(depths))
    first, last = int(depths[0]), int(depths[-1])
    step = next(size * 10**power for power in range(6) for size in (1, 2, 5) if size * 10**power * TICKS >= last - first)
    inner = (layer for layer in range(step, last, step) if min(layer - first, last - layer) >= step / 2)
    wanted = [first, *inner, last] if last > first else [first]
    places = (np.interp(wanted, depths, np.arange(len(depths))) + 0.5) * rows / len(depths) - 0.5  # a row's middle is its number
    axis.set_yticks(np.clip(places, 0, rows - 1), [f"{layer:,}" for layer in wanted])


def _label_ends(axis: Any, labels: list[str], ends: list[float], looks: list[dict[str, Any]], left: bool) -> None:
    """Names beside the axis at the heights (shares of the axis) where the lines end, apart from each other, each joined to its line."""
    edge, place = (0.0, -0.07) if left else (1.0, 1.07)
    order = np.argsort(ends, kind="stable")
    heights = apart([ends[i] for i in order], min(0.055, 1 / len(ends)))
    for i, height in zip(order, heights, strict=True):
        axis.annotate(
            labels[i], (edge, ends[i]), (place, height), xycoords="axes fraction", textcoords="axes fraction", color=looks[i]["color"], fontsize=8,
            ha="right" if left else "left", va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0, "relpos": (float(left), 0.5), **looks[i]},
        )  # fmt: skip


def apart(wanted: list[float], gap: float) -> list[float]:
    """Heights within 0 ... 1, as near to the ascending wanted ones as a gap between them allows."""
    groups: list[list[float]] = []  # of neighbours that touch: the wanted place of the lowest, one value each
    for i, value in enumerate(wanted):
        groups.append([value - gap * i])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    spread = [float(np.mean(group)) for group in groups for _ in group]
    room = 1 - gap * (len(wanted) - 1)
    return [min(max(value, 0.0), room) + gap * i for i, value in enumerate(spread)]
