"""The CSV files behind the figures: every layer or block a row, every record a column."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepscale.gradflow.flow import Flow
from deepscale.report.quantities import Quantity
from deepscale.report.run import NUMBERS, ReportRun
from deepscale.report.thin import chosen

FILES = {"output": "gradient_at_blocks.csv", "weight": "gradient_of_weights.csv", "signal": "signal.csv"}
FIRST_LAYER = "first_layer.csv"
# Values in all files of a report, about 450 MB and 10 s. Beyond it the files hold fewer records, never fewer layers.
MOST_VALUES = 50_000_000


def records_kept(flow: Flow, runs: int) -> int:
    """How many records of this run its files hold, in a report of so many runs; at least the first and the last."""
    width = len(flow.layer_names) + 2 * len(flow.block_names)
    return max(2, MOST_VALUES // (runs * width))


def quantity_csv(quantity: Quantity, records: int) -> str:
    """Name, depth, and the value at each of at most so many records."""
    rows = chosen(len(quantity.steps), records)
    lines = [",".join(["name", "depth", *(f"step {step}" for step in quantity.steps[rows])])]
    form = ",%.4g" * len(rows)
    values = np.where(quantity.broken[rows], np.inf, quantity.values[rows]).T.tolist()
    for name, depth, row in zip(quantity.names.tolist(), quantity.depths.tolist(), values, strict=True):
        lines.append(f"{name},{depth}" + form % tuple(row))
    return "\n".join(lines) + "\n"


def curve_csv(points: Sequence[tuple[float, float]], name: str) -> str:
    """Step and value."""
    return "\n".join([f"step,{name}", *(f"{step:g},{value:.6g}" for step, value in points)]) + "\n"


def runs_csv(runs: Sequence[ReportRun]) -> str:
    """One row per run: numbers, verdict and all settings."""
    settings = sorted({name for run in runs for name in run.shown_settings()})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "id", *NUMBERS, "converged", "verdict", "status", *settings])
    for run in runs:
        numbers = run.all_numbers()
        own: list[Any] = [numbers.get(key, "") for key in NUMBERS]
        converged = "" if run.converged is None else str(run.converged).lower()
        writer.writerow([run.name, run.id, *own, converged, run.verdict, run.status, *(run.shown_settings().get(key, "") for key in settings)])
    return text.getvalue()
