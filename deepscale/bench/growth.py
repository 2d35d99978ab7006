"""`deepscale bench growth`: start, step time and memory against depth, the power laws fitted to them, and a figure.

Each network is measured in a fresh process (deep.py), as it is trained; what a pass keeps is counted (kept.py), for one image, and
is in proportion to the batch. Imports, which do not depend on depth, are not in the start, nor their memory in the growth.
"""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepscale import drawing
from deepscale.bench import networks
from deepscale.bench.kept import kept_bytes
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Goal, Report, Row, number
from deepscale.bench.worker import run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.errors import UsageError
from deepscale.models.convnext import smallest_segment
from deepscale.parsing import parse_depth
from deepscale.plan_choices import FAST_SEGMENT

DEPTHS = (26, 110, 302, 1_004, 3_002, 10_001)
GOAL_STEP = Goal(0.1)  # distance of the exponent from 1
GOAL_START = Goal(1.0)
GOAL_KEPT = Goal(1.0)
WARM_UP = 1
SHALLOW_LAYERS = 2_000  # that the steps of a shallow network go through together, at least: one alone is too short to time
STACKED, SMALLEST = f"stacked, segments of {FAST_SEGMENT}", "stacked, segments of sqrt(blocks / 10)"
KEEP, PLAIN = "stacked, nothing recomputed", "plain torch"
MARKERS = {STACKED: "o", SMALLEST: "s", PLAIN: "^", KEEP: "D"}
# Quantity, unit, and the title of its panel.
QUANTITIES = {
    "start": ("CPU s", "start: network, optimiser and engine"),
    "step": ("CPU s", "training step"),
    "growth": ("MB", "peak memory over the process"),
    "kept": ("MB", "activations kept for backward"),
}


@dataclass(frozen=True)
class Fit:
    """value = factor * layers ** exponent; `residual` is the root mean square of the values' factors off that law, 1 for none."""

    exponent: float
    factor: float
    residual: float
    first: int
    last: int


def fit(layers: Sequence[int], values: Sequence[float]) -> Fit:
    """The power law of least squares in log-log, over at least two depths."""
    x, y = [math.log(n) for n in layers], [math.log(value) for value in values]
    slope, intercept = statistics.linear_regression(x, y)
    off = [b - (intercept + slope * a) for a, b in zip(x, y, strict=True)]
    return Fit(slope, math.exp(intercept), math.exp(math.sqrt(statistics.fmean(d * d for d in off))), layers[0], layers[-1])


Curves = dict[str, dict[str, dict[int, float]]]  # of each quantity and network: value by layers


def main(arguments: list[str]) -> None:
    """Measures. Raises BenchError where a process fails, MissingPackageError where --out has no matplotlib."""
    options = Options("growth", "Cost against depth: start, step and memory of training, the exponents fitted to them, and a figure.")
    add = options.parser.add_argument
    shown = " ".join(str(depth) for depth in DEPTHS)
    add("--depths", nargs="+", type=parse_depth, default=list(DEPTHS), metavar="N", help=f"layers, at least four depths (default: {shown})")
    options.depth("plain-depth", 1_004, "the deepest of them that the plain network is built with, too")
    options.size("width", 8, "channels of stage 1")
    options.size("batch-size", 8, "images per step")
    add("--engine", choices=("deepspeed", "torch"), default="deepspeed", help="engine of the stacked networks (default: deepspeed)")
    options.size("zero", 2, "their ZeRO stage", low=0)
    options.size("steps", 3, "measured steps of the deepest; shallow ones take more")
    options.size("rounds", 1, "processes per network")
    options.size("threads", 1, "threads per process")
    options.kernel()
    add("--out", type=Path, metavar="FILE", help="also draw the figure into this file")
    options.time_limit()
    values, report = options.parse(arguments)
    depths = sorted({depth_of_blocks(blocks_for_depth(depth)) for depth in values.depths})
    if len(depths) < 4:
        raise UsageError(f"--depths {' '.join(map(str, values.depths))} are {len(depths)} different depths; type at least four, for example {shown}")
    if values.out is not None:
        drawing.pyplot()
        check_writable_figure(values.out)
    curves: Curves = {name: {} for name in QUANTITIES}
    for depth in depths:
        _measure(values, depth, curves)
    _report(values, curves, report)
    if values.out is not None:
        draw(curves, depths, values.out)
    report.publish(values.json)


def check_writable_figure(path: Path) -> None:
    """Refuses a figure that cannot be written before minutes of measuring. Raises UsageError."""
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--out {path} is no file in a folder that is there; type for example --out growth.png")


def _measure(values: argparse.Namespace, depth: int, curves: Curves) -> None:
    """All of one depth, written to `curves`."""
    segments = {STACKED: FAST_SEGMENT, SMALLEST: smallest_segment(blocks_for_depth(depth)), KEEP: 0}
    if depth <= values.plain_depth:
        segments[PLAIN] = 0
    for name, segment in segments.items():
        say(f"{depth:,} layers, {name}")
        curves["kept"].setdefault(name, {})[depth] = values.batch_size * _kept(values, depth, segment, name == PLAIN) / 1e6
        if name == KEEP:
            continue
        wanted = settings_of(values, "width", "batch_size", "threads", "kernel") | {"depth": depth, "segment": segment, "warm_up": WARM_UP}
        wanted |= {"steps": max(values.steps, SHALLOW_LAYERS // depth)}
        if name == PLAIN:
            wanted |= {"network": "plain", "engine": "torch"}
        else:
            wanted |= {"engine": values.engine, "zero": values.zero if values.engine == "deepspeed" else 0}
        done = [run_worker("deepscale.bench.deep", wanted, threads=values.threads, limit_s=values.time_limit) for _ in range(values.rounds)]
        measured = {
            "start": [result["build_cpu_s"] + result["start_cpu_s"] for result in done],
            "step": [statistics.median(result["step_cpu_s"]) for result in done],
            "growth": [(result["peak_bytes"] - result["imported_bytes"]) / 1e6 for result in done],
        }
        for quantity, numbers in measured.items():
            curves[quantity].setdefault(name, {})[depth] = statistics.median(numbers)


def _kept(values: argparse.Namespace, depth: int, segment: int, plain: bool) -> int:
    """Bytes that a pass of one image keeps."""
    settings = networks.configuration(depth=depth, width=values.width, batch_size=1, segment=segment, engine="torch")
    images, _ = networks.random_batch(1, channels_last=not plain)
    return kept_bytes(networks.build(settings, plain), images)


def fits_of(curve: dict[int, float]) -> dict[str, Fit]:
    """The laws of a curve over all its depths and over the deeper half of them, at least three: two are always on a line."""
    layers = sorted(curve)
    half = layers[-max(3, (len(layers) + 1) // 2) :]
    return {"all": fit(layers, [curve[n] for n in layers]), "deep half": fit(half, [curve[n] for n in half])}


def _report(values: argparse.Namespace, curves: Curves, report: Report) -> None:
    """The table of measurements, and the exponents with their goals."""
    for name in MARKERS:
        for layers in sorted(curves["kept"].get(name, ())):
            cells = {f"{quantity}, {unit}": curves[quantity].get(name, {}).get(layers, "") for quantity, (unit, _) in QUANTITIES.items()}
            report.records.append({"network": name, "layers": f"{layers:,}", **cells})
    fits = {quantity: {name: fits_of(curve) for name, curve in found.items() if len(curve) >= 4} for quantity, found in curves.items()}
    step, start, start_deep = fits["step"][STACKED]["deep half"], fits["start"][STACKED]["all"], fits["start"][STACKED]["deep half"]
    kept = fits["kept"][SMALLEST]["deep half"]
    report.rows = [
        Row(f"step of {STACKED}: distance of the exponent from 1, {_over(step)}", "", (abs(step.exponent - 1),), GOAL_STEP),
        Row(f"start of {STACKED}: exponent, {_over(start)}", "", (start.exponent,), GOAL_START),
        Row(f"start of {STACKED}: exponent, {_over(start_deep)}", "", (start_deep.exponent,)),
        Row(f"kept by {SMALLEST}: exponent, {_over(kept)}", "", (kept.exponent,), GOAL_KEPT),
    ]
    for quantity, by_name in fits.items():
        for name, laws in by_name.items():
            found = (f"{number(law.exponent)} over {_over(law)} (off by a factor of {law.residual:.3f})" for law in laws.values())
            report.notes.append(f"exponent of {quantity}, {name}: {', '.join(found)}")
    how = f"DeepSpeed, ZeRO {values.zero}" if values.engine == "deepspeed" else "plain torch"
    report.notes.append(
        f"stacked: {how}, segments of so many blocks recomputed; exponents are fitted by least squares in log-log; MB are 1e6 bytes; "
        f"kept is counted for one image and multiplied by the batch"
    )
    report.details["fits"] = {
        quantity: {name: {over: dataclasses.asdict(law) for over, law in laws.items()} for name, laws in by_name.items()}
        for quantity, by_name in fits.items()
    }


def _over(law: Fit) -> str:
    return f"{law.first:,} to {law.last:,} layers"


def draw(curves: Curves, depths: Sequence[int], out: Path) -> None:
    """Writes the figure: each quantity against depth in log-log, dots measured, lines the laws of the deeper half."""
    pyplot = drawing.pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.4), layout="constrained")
    colours = dict(zip(MARKERS, drawing.COLOURS, strict=False))
    for axis, (quantity, (unit, title)) in zip(axes.flat, QUANTITIES.items(), strict=True):
        for name, curve in curves[quantity].items():
            law = fits_of(curve)["deep half"] if len(curve) >= 4 else None
            text = name if law is None else f"{name}: exponent {law.exponent:.2f}"
            layers = sorted(curve)
            points = [curve[n] for n in layers]
            axis.plot(layers, points, MARKERS[name], color=colours[name], markeredgecolor="white", markersize=7, label=text, zorder=3)
            if law is not None:
                ends = (law.first, law.last)
                axis.plot(ends, [law.factor * n**law.exponent for n in ends], color=colours[name], linewidth=1.3)
        axis.set(xscale="log", yscale="log", ylabel=unit, xlabel="layers", title=title)
        axis.set_xticks(depths, [f"{n:,}" for n in depths])
        axis.yaxis.set_major_locator(pyplot.matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.3)  # the legend lies above what is drawn
        axis.legend(loc="upper left", frameon=False, fontsize=8, title="lines: laws of the deeper half", title_fontsize=8)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
