"""A training that has ended as one small JSON file: what was trained, how it ended, its numbers and curves, and where it was measured.

The trials of a sweep are written here, the rows of a study by studies/row.py, in the same format. Small enough to lie in a
repository, and complete enough that tables and figures can be made of the files without MLflow. Nothing in them names a folder of the machine.
"""

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepscale.curves import CURVES, LOCAL, thinned
from deepscale.files import atomic
from deepscale.paths import as_folder
from deepscale.sweeps.results import Row, Sweep
from deepscale.sweeps.tags import ENDED
from deepscale.tracking_read import MlflowRun, Reader

COMMIT = "mlflow.source.git.commit"
LAST = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "train/loss", "train/accuracy", "grad/first_layer_mean_abs")
COST = ("perf/seconds", "perf/peak_memory_bytes", "perf/peak_memory_over_start_bytes")
FIRST_LAYER, STEP_S = "grad/first_layer_mean_abs", "perf/step_s"


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """Writes the files of all trials that have ended and are not there yet as they are now; returns these. Raises UsageError."""
    written = []
    for row in sweep.rows:
        if row.outcome not in ENDED:
            continue
        path = folder / f"{name_of(sweep, row)}.json"
        if write_file(path, record(sweep, row)):
            written.append(path)
    return written


def name_of(sweep: Sweep, row: Row) -> str:
    """A trial's name as a file: "007-activation=gelu_norm=none_seed=1"."""
    label = " ".join(f"{name}={value}" for name, value in (sweep.of(row) | {"seed": str(row.seed)}).items())
    return f"{row.number:03}-{as_folder(label)}"


def record(sweep: Sweep, row: Row) -> dict[str, Any]:
    """What the file holds. Reads the trial's curves."""
    return {
        "sweep": sweep.name,
        "space": sweep.space,
        "trial": row.number,
        "varied": sweep.of(row),
        "seed": row.seed,
        "outcome": row.outcome,
        "converged": row.converged(sweep.above),
        "steps": row.steps,
        **of_run(row.run, row.reader),
    }


def of_run(run: MlflowRun, reader: Reader, metrics: Sequence[str] = (), curves: Sequence[str] = ()) -> dict[str, Any]:
    """What a file holds of a run: its numbers, verdict, origin, settings and curves; of more metrics than the usual ones where asked."""
    names = dict.fromkeys((*LAST, *COST, *metrics))
    numbers = {name: run.data.metrics[name] for name in names if name in run.data.metrics}
    gradients = [value for _, value in reader.history(run, FIRST_LAYER) if math.isfinite(value)]
    if gradients:  # what the original study compares by
        numbers[f"{FIRST_LAYER} mean over the run"] = statistics.fmean(gradients)
    if (step_s := reader.median(run, STEP_S)) is not None:
        numbers[f"{STEP_S} median"] = step_s
    tags = run.data.tags
    return {
        "numbers": {name: number(value) for name, value in numbers.items()},
        "verdict": tags.get("gradient_verdict_text", ""),
        "started": run.info.start_time,
        "commit": tags.get(COMMIT),
        "hardware": _json(tags.get("hardware")),
        "versions": _json(tags.get("versions")),
        "settings": {name: value for name, value in run.data.params.items() if name not in LOCAL and not os.path.isabs(value)},
        "curves": {name: points(thinned(reader.history(run, name))) for name in dict.fromkeys((*CURVES, *curves))},
    }


def points(curve: Sequence[Sequence[Any]]) -> list[list[float | int | None]]:
    """(x, value) pairs as JSON holds them: whole places as integers, six digits."""
    return [[int(x) if float(x).is_integer() else number(x), number(value)] for x, value in curve]


def write_file(path: Path, content: dict[str, Any]) -> bool:
    """Writes a file, complete or not at all; False where it is there already as it is now. Raises UsageError."""
    text = lines(content)
    if path.is_file() and path.read_text() == text:
        return False
    with atomic(path, "type another folder") as temporary:
        temporary.write_text(text)
    return True


def lines(content: dict[str, Any]) -> str:
    """JSON with a line per key, and per curve: differences between two versions stay readable."""
    curves = [name for name in ("profiles", "curves") if name in content]
    rest = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items() if name not in curves]
    rest += [
        f' "{name}": {{\n' + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content[name].items()) + "\n }"
        for name in curves
    ]
    return "{\n" + ",\n".join(rest) + "\n}\n"


def number(value: float | None) -> float | None:
    """Six digits; JSON has no NaN and no infinity, and None, which stands for them, stays."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
