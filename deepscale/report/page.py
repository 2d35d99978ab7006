"""Writes the page: the runs' thinned data as JSON between page.css and the scripts, and the files beside it.

Nothing of a run ever becomes markup: names travel as JSON whose `<`, `>` and `&` are escaped, and the scripts set text only. What a
reader asks for by a click (a run at all its records, the CSV files) lies in `runs/<id>/`; with `single_file` it is inside the page.
"""

import base64
import gzip
import html
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from deepscale.errors import UsageError
from deepscale.gradflow.flow import FILE, Flow
from deepscale.report.quantities import QUANTITIES, first_layer, quantities
from deepscale.report.run import NUMBERS, ReportRun
from deepscale.report.tables import FILES, FIRST_LAYER, curve_csv, quantity_csv, records_kept, runs_csv
from deepscale.report.thin import chosen

INDEX = "index.html"
SCRIPTS = ("plot", "chart", "runs", "table", "sweep", "one", "page")  # one script in this order: the last starts it
MOST_POINTS = 1000  # of a curve
FEWEST_POINTS = 250
ALL_POINTS = 120_000  # of all runs' curves of one quantity at one record
RUN_POINTS, RUN_RECORDS = 500, 100  # of one run's heatmap
SINGLE_FILE_RUNS = 20


def write_report(
    runs: Sequence[ReportRun],
    folder: Path,
    *,
    title: str = "",
    warnings: Sequence[str] = (),
    single_file: bool = False,
    sweep: dict[str, Any] | None = None,
) -> Path:
    """Writes `folder`/index.html with its files, or all in that one file; returns its path. sweep: what sweep.js shows above the runs.

    Raises UsageError for no runs, for none with a record, for more than 20 in a single file, and for a folder that cannot be written.
    """
    return write_page(runs, folder / INDEX, title=title, warnings=warnings, single_file=single_file, tables=True, sweep=sweep)


def write_page(
    runs: Sequence[ReportRun],
    path: Path,
    *,
    single_file: bool,
    title: str = "",
    warnings: Sequence[str] = (),
    tables: bool = False,
    sweep: dict[str, Any] | None = None,
) -> Path:
    """Writes one page of runs, and with `tables` the CSV files behind its figures.

    The page of one run, without tables, stays below 1 MB at any depth. Raises UsageError as `write_report` does.
    """
    _check(runs, single_file)
    page = _Page(len(runs), path.parent, single_file, tables, list(warnings))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [page.run(run, own) for run, own in zip(runs, _unique_ids(runs), strict=True)]
        if not any(row["records"] for row in rows):
            raise UsageError(page.warnings[-1])
        data: dict[str, Any] = {"title": title, "warnings": page.warnings, "runs": rows, "places": page.places}
        data |= {"quantities": {key: text for key, (_, text) in QUANTITIES.items()}, "numbers": NUMBERS, "settings": differing(runs)}
        if sweep is not None:
            data["sweep"] = sweep
        if tables:
            data["table"] = page.keep("runs.csv", lambda: runs_csv(runs))
        data |= {"details": page.details, "files": page.files}
        _write(path, render(data))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error}); type another folder with --out") from None
    return path


def render(data: dict[str, Any]) -> str:
    """The page of this data."""
    own = resources.files("deepscale.report")
    text = own.joinpath("page.html").read_text(encoding="utf-8")
    runs = data["runs"]
    heading = data["title"] or (runs[0]["name"] if len(runs) == 1 else "Gradient flow")
    newest = max((run["started"] for run in runs if run["started"]), default=None)
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(newest)) if newest else ""
    count = f"{len(runs):,} runs" if len(runs) > 1 else ""
    about = ", ".join(part for part in (count, date and ("newest " if count else "") + date) if part)
    parts = {
        "TITLE": html.escape(f"{heading}: {about}" if about else heading),
        "HEADING": html.escape(heading),
        "ABOUT": html.escape(about),
        "STYLE": own.joinpath("page.css").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join(own.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
        "DATA": script_json(data),
    }
    # In one pass: what is put in is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def script_json(data: Any) -> str:
    """JSON that can stand in a script element. Non-finite numbers become null."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def differing(runs: Sequence[ReportRun]) -> list[str]:
    """The settings that are not the same in all runs that have settings, in the order of the first run."""
    known = [run.shown_settings() for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings if not name.startswith("asked_"))
    return [name for name in names if len({settings.get(name) for settings in known}) > 1]


class _Page:
    """Collects what goes into the page, and writes or embeds the files beside it."""

    def __init__(self, runs: int, folder: Path, single_file: bool, tables: bool, warnings: list[str]) -> None:
        self.runs, self.folder, self.single_file, self.tables, self.warnings = runs, folder, single_file, tables, warnings
        self.points = max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // runs))
        self.places: list[dict[str, Any]] = []  # runs of one architecture share theirs
        self.details: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        self._place_of: dict[str, int] = {}

    def run(self, run: ReportRun, own: str) -> dict[str, Any]:
        """A run as the page knows it; its files are kept on the way, and its record is let go of."""
        flow, problem = self._load(run)
        numbers = ({"depth": flow.depth} if flow is not None else {}) | run.all_numbers()
        row: dict[str, Any] = {"id": own, "name": run.name, "status": run.status, "started": run.started_s, "problem": problem, "records": 0}
        row |= {"verdict": run.verdict, "text": run.verdict_text, "converged": run.converged, "numbers": numbers}
        row["settings"] = run.shown_settings()
        first = run.curves.get("first_layer") or (first_layer(flow) if flow is not None else [])
        row["curves"], row["files"] = {}, []
        if first:
            kept = chosen(len(first), self.points).tolist()
            row["first_layer"] = [[first[i][0], _short(first[i][1])] for i in kept]
            self._table(row, FIRST_LAYER, lambda: curve_csv(first, "mean_abs_gradient"))
        if flow is not None:
            self._record(row, flow)
        return row

    def _load(self, run: ReportRun) -> tuple[Flow | None, str]:
        try:
            flow = run.load()
            if flow is not None and not len(flow.steps):
                raise UsageError("its record is empty: no step was recorded; train it with --record-every auto")
            return flow, run.problem
        except UsageError as error:
            # The page holds no path of this machine.
            problem = str(error).replace(str(run.record), FILE)
            self.warnings.append(f"{run.name}: {problem}")
            return None, problem

    def _record(self, row: dict[str, Any], flow: Flow) -> None:
        detail, records = {}, records_kept(flow, self.runs)
        for quantity in quantities(flow):
            row["curves"][quantity.key] = self._placed(quantity.ends(self.points))
            # A run's own places stay with it: they are loaded with the rest of it.
            detail[quantity.key] = quantity.overview(RUN_POINTS, RUN_RECORDS)
            self._table(row, FILES[quantity.key], lambda quantity=quantity: quantity_csv(quantity, records))  # type: ignore[misc]
        row |= {"records": len(flow.steps), "records_in_files": min(records, len(flow.steps))}
        if self.single_file:
            self.details[row["id"]] = detail
        elif detail:
            _write(self.folder / "runs" / row["id"] / "details.js", f"details({script_json(row['id'])},{script_json(detail)})\n")

    def _placed(self, curves: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps(curves["place"])
        if key not in self._place_of:
            self._place_of[key] = len(self.places)
            self.places.append(curves["place"])
        return curves | {"place": self._place_of[key]}

    def _table(self, row: dict[str, Any], name: str, text: Callable[[], str]) -> None:
        if self.tables:
            row["files"].append(self.keep(f"runs/{row['id']}/{name}", text))

    def keep(self, name: str, text: Callable[[], str]) -> str:
        """Writes a file beside the page, or keeps it, compressed, inside; returns its name."""
        if self.single_file:
            self.files[name] = base64.b64encode(gzip.compress(text().encode(), 6, mtime=0)).decode()
        else:
            _write(self.folder / name, text())
        return name


def _check(runs: Sequence[ReportRun], single_file: bool) -> None:
    if not runs:
        raise UsageError("there is no run to report; train one: deepspeed deepscale/train.py --depth 26")
    if not any(run.has_record for run in runs):
        why = next((run.problem for run in runs if run.problem), "none was recorded")
        raise UsageError(f"none of the {len(runs)} runs has a record of its gradient flow; of {runs[0].name!r}: {why}")
    if single_file and len(runs) > SINGLE_FILE_RUNS:
        raise UsageError(
            f"--single-file embeds up to {SINGLE_FILE_RUNS} runs, and these are {len(runs):,}; choose some with --runs, or leave --single-file out"
        )


def _unique_ids(runs: Sequence[ReportRun]) -> list[str]:
    """Names of the runs' folders: letters, digits, `_` and `-`, each once."""
    ids: dict[str, None] = {}
    for run in runs:
        plain = re.sub(r"[^\w-]", "_", run.id, flags=re.ASCII)[:80] or "run"
        own, n = plain, 2
        while own.lower() in ids:
            own, n = f"{plain}-{n}", n + 1
        ids[own.lower()] = None
    return list(ids)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _short(value: float) -> float | str | None:
    if math.isinf(value):
        return "inf"
    return None if math.isnan(value) else float(f"{value:.4g}")


def _finite(data: Any) -> Any:
    if isinstance(data, np.generic):
        data = data.item()
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
