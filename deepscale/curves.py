"""`deepscale curves`: loss and accuracy of recorded runs over their steps, as one figure.

Runs are read from MLflow by name, or from JSON files that `--save` wrote: a run's settings, summary and curves of at most
200 points, small enough to lie in a repository.
"""

import json
from pathlib import Path
from typing import Any

from deepscale import config, drawing
from deepscale.errors import UsageError
from deepscale.tracking_read import Reader

POINTS = 200
CURVES = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "grad/first_layer_mean_abs")
LOCAL = ("data_dir", "checkpoint_dir", "local_rank", "deepspeed_config")  # of one machine; not stored
SMOOTH = 0.9  # weight of the past in the drawn running mean

Run = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Draws, and with --save stores, the curves of runs."""
    parser = config.parser("deepscale curves", "Draw the training curves of runs.")
    parser.add_argument("runs", nargs="+", help="names of runs in MLflow, or JSON files that --save wrote")
    parser.add_argument("--experiment", default="deepscale", help="MLflow experiment of the runs")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the figure to write (default: curves.png)")
    parser.add_argument("--save", type=Path, help="folder for one JSON file per run")
    given = parser.parse_args(arguments)
    runs = [read_file(Path(name)) if name.endswith(".json") else read_mlflow(name, given.experiment) for name in given.runs]
    if given.save:
        given.save.mkdir(parents=True, exist_ok=True)
        for run in runs:
            (given.save / f"{run['name'].replace(' ', '_')}.json").write_text(json.dumps(run, indent=1) + "\n")
    draw(runs, given.out)
    print(given.out)


def read_file(path: Path) -> Run:
    """A run that --save wrote. Raises UsageError."""
    try:
        run: Run = json.loads(path.read_text())
        assert set(run) >= {"name", "settings", "summary", "curves"}
    except (OSError, ValueError, AssertionError) as error:
        raise UsageError(f"{path} is not a file that `deepscale curves --save` wrote ({error or 'keys are missing'})") from None
    return run


def read_mlflow(name: str, experiment: str) -> Run:
    """The newest run of this name. Raises UsageError, listing the names there are."""
    reader = Reader()
    run = reader.run(name, experiment)
    curves = {key: thinned(reader.history(run, key)) for key in CURVES}
    text = reader.artifact(run, "summary.json")
    if text is None:
        raise UsageError(f"run {name!r} has no summary.json: it has not ended yet; type the same again when it has")
    settings = {key: value for key, value in run.data.params.items() if key not in LOCAL}
    return {"name": name, "settings": settings, "summary": json.loads(text.read_text()), "curves": curves}


def thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    """At most `POINTS` (step, mean) pairs, each the mean of equally many neighbours: noise is averaged, not sampled; with six digits."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [[float(group[-1][0]), float(f"{sum(value for _, value in group) / len(group):.6g}")] for group in groups]


def draw(runs: list[Run], out: Path) -> None:
    """Writes the figure: training loss and accuracy against the share of the run, validation as dots."""
    pyplot = drawing.pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, metric, scale in ((axes[0], "loss", 1.0), (axes[1], "accuracy", 100.0)):
        for run, colour in zip(runs, drawing.COLOURS * len(runs), strict=False):
            steps, values = zip(*run["curves"][f"train/{metric}"], strict=True)
            axis.plot(steps, [scale * v for v in values], color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps, [scale * v for v in running_mean(values)], color=colour, label=label(run))
            if run["curves"][f"val/{metric}"]:
                at, found = zip(*run["curves"][f"val/{metric}"], strict=True)
                axis.plot(at, [scale * v for v in found], "o", color=colour, markeredgecolor="white")
        axis.set_xlabel("optimiser steps")
        axis.set_xscale("log")
        axis.set_ylabel("cross entropy" if metric == "loss" else "accuracy, %")
        axis.grid(alpha=0.25)
    axes[0].legend(title="training; dots: validation", frameon=False, fontsize=8, title_fontsize=8)
    drawing.save(figure, out)


def running_mean(values: tuple[float, ...]) -> list[float]:
    """Exponential mean of the past, corrected for its start."""
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + (1 - SMOOTH)
        means.append(mean / weight)
    return means


def label(run: Run) -> str:
    """What tells a run apart."""
    s = run["settings"]
    return f"{int(s['built_depth']):,} layers, width {s['width']}, patch {s['patch_size']}, batch {s['batch_size']}"
