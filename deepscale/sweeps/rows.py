"""Each ended trial of a sweep as one small JSON file: what was trained, how it ended, its numbers and curves, and where it was measured.

Small enough to lie in a repository, and complete enough that tables and figures can be made of the files without MLflow. Nothing in
them names a folder of the machine.
"""

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from deepscale.curves import CURVES, LOCAL, thinned
from deepscale.files import atomic
from deepscale.paths import as_folder
from deepscale.sweeps.results import Row, Sweep
from deepscale.sweeps.tags import ENDED

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
        path, content = folder / f"{name_of(sweep, row)}.json", _lines(record(sweep, row))
        if path.is_file() and path.read_text() == content:
            continue
        with atomic(path, "type another folder") as temporary:
            temporary.write_text(content)
        written.append(path)
    return written


def name_of(sweep: Sweep, row: Row) -> str:
    """A trial's name as a file: "007-activation=gelu_norm=none_seed=1"."""
    label = " ".join(f"{name}={value}" for name, value in (sweep.of(row) | {"seed": str(row.seed)}).items())
    return f"{row.number:03}-{as_folder(label)}"


def record(sweep: Sweep, row: Row) -> dict[str, Any]:
    """What the file holds. Reads the trial's curves."""
    run = row.run
    numbers = {name: run.data.metrics[name] for name in (*LAST, *COST) if name in run.data.metrics}
    gradients = [value for _, value in row.reader.history(run, FIRST_LAYER) if math.isfinite(value)]
    if gradients:  # what the original study compares by
        numbers[f"{FIRST_LAYER} mean over the run"] = statistics.fmean(gradients)
    if (step_s := row.reader.median(run, STEP_S)) is not None:
        numbers[f"{STEP_S} median"] = step_s
    tags = run.data.tags
    return {
        "sweep": sweep.name,
        "space": sweep.space,
        "trial": row.number,
        "varied": sweep.of(row),
        "seed": row.seed,
        "outcome": row.outcome,
        "converged": row.converged(sweep.above),
        "steps": row.steps,
        "numbers": {name: _number(value) for name, value in numbers.items()},
        "verdict": tags.get("gradient_verdict_text", ""),
        "started": run.info.start_time,
        "commit": tags.get(COMMIT),
        "hardware": _json(tags.get("hardware")),
        "versions": _json(tags.get("versions")),
        "settings": {name: value for name, value in row.settings.items() if name not in LOCAL and not os.path.isabs(value)},
        "curves": {name: [[int(step), _number(value)] for step, value in thinned(row.reader.history(run, name))] for name in CURVES},
    }


def _lines(content: dict[str, Any]) -> str:
    """JSON with a line per key, and per curve: differences between two versions stay readable."""
    curves = ",\n".join(f"  {json.dumps(name)}: {json.dumps(points)}" for name, points in content["curves"].items())
    rest = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in content.items() if name != "curves")
    return f'{{\n{rest} "curves": {{\n{curves}\n }}\n}}\n'


def _number(value: float) -> float | None:
    """Six digits; JSON has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
