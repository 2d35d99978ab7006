"""A sweep summed up: table, figures and report page in its folder, and the same in MLflow as a run of its own beside the trials.

The summary run has the tags `sweep` and `kind=summary`, the table as its description, and is written again when a sweep goes on, never
twice. What was trained is read from the trials' runs, so that this can be made at any time.
"""

import base64
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepscale import merge
from deepscale.errors import UsageError
from deepscale.files import atomic
from deepscale.paths import relative_to_here
from deepscale.report import collect
from deepscale.report.collect import KIND, SUMMARY
from deepscale.report.page import write_report
from deepscale.sweeps import figures, importance, results, table
from deepscale.sweeps.importance import Importance
from deepscale.sweeps.results import RUNNING, Sweep
from deepscale.sweeps.tags import SPACE, SWEEP
from deepscale.tracking import view_command
from deepscale.tracking_read import Reader
from deepscale.tracking_store import DEFAULT_STORE, Op, Store, cause, shown, sqlite_path, store_uri

QUESTION, NOTE = "question", "mlflow.note.content"
LONGEST_NOTE = 7000  # characters of the description: MLflow's limit for a tag is 8,000
MOST_BYTES = 50_000_000  # of a report that is kept in MLflow with all its files


@dataclass(frozen=True)
class Summary:
    """What was written. page: the report, None where it could not be made. notes: sentences on what is missing, and why."""

    folder: Path
    page: Path | None
    notes: tuple[str, ...]

    def text(self) -> str:
        """What to look at, and what is missing."""
        where = f"report  {relative_to_here(self.page)}" if self.page else f"files   {relative_to_here(self.folder)}"
        return "\n".join([where, *(f"note    {note}" for note in self.notes)])


def show(name: str, folder: Path, question: str, own_stores: bool) -> None:
    """What a sweep ends with: prints its table, writes the summary into `folder`, and prints where it is and how to open MLflow.

    own_stores: the trials' runs lie in stores below `folder`, and the summary run gets one of its own there. Never raises for a store.
    """
    uri = f"sqlite:///{folder / DEFAULT_STORE}" if own_stores else store_uri()
    try:
        places = [f"sqlite:///{path}" for path in merge.found([folder])] if own_stores else [uri]
        sweep = results.read(name, [Reader(place) for place in places])
        print(table.text(sweep), end="\n\n")
        print(write(sweep, folder, question=question, uri=uri).text())
    except UsageError as error:
        print(f"note    the results are not summed up: {error}")
    print(f"mlflow  deepscale merge {relative_to_here(folder)}, then {view_command(store_uri())}" if own_stores else f"mlflow  {view_command(uri)}")


def write(sweep: Sweep, folder: Path, *, question: str = "", uri: str | None = None) -> Summary:
    """Writes results.md, two CSV files, the figures and report/index.html into `folder`, and the summary run into the store at `uri`.

    Raises UsageError where the folder cannot be written. A store that fails is a note: the files are there.
    """
    notes: list[str] = []
    question = question or _asked_before(sweep)
    _text(folder / "results.md", table.text(sweep) + "\n")
    _text(folder / "results.csv", table.as_csv(sweep))
    _text(folder / "trials.csv", table.as_csv(sweep, each=True))
    found = importance.importance(sweep)
    pictures = _figures(sweep, found, folder)
    if isinstance(found, str):
        notes.append(found)
    page = _page(sweep, folder, question, pictures, notes)
    files = [folder / name for name in ("results.md", "results.csv", "trials.csv")] + list(pictures)
    try:
        _record(sweep, question, found, files, page, uri or store_uri())
    except Exception as error:  # whatever MLflow raises
        notes.append(f"the summary is not in MLflow: {shown(uri or store_uri())} {cause(error)}")
    return Summary(folder.absolute(), page and page.absolute(), tuple(notes))


def _figures(sweep: Sweep, found: Importance | str, folder: Path) -> dict[Path, str]:
    """File -> caption."""
    several = "mean over seeds" if sweep.seeds > 1 else "one training each"
    drawn = {figures.parallel(sweep, folder / "parallel.png"): f"Every choice of settings and its {sweep.metric} ({several})"}
    if not isinstance(found, str):
        drawn[figures.bars(sweep, found, folder / "importance.png")] = "Which setting the result hangs on"
    return {path: caption for path, caption in drawn.items() if path is not None}


def _page(sweep: Sweep, folder: Path, question: str, pictures: dict[Path, str], notes: list[str]) -> Path | None:
    head, *rows = table.cells(sweep)
    shown_first: dict[str, Any] = {
        "question": question, "progress": table.title(sweep), "head": head, "rows": rows, "left": len(sweep.axes), "note": table.note(sweep),
        "figures": [{"caption": caption, "src": f"data:image/png;base64,{_base64(path)}"} for path, caption in pictures.items()],
    }  # fmt: skip
    runs = [collect.from_mlflow(row.reader, row.run) for row in table.ordered(sweep)]
    try:
        return write_report(runs, folder / "report", title=f"Sweep {sweep.name}", sweep=shown_first)
    except UsageError as error:
        notes.append(f"there is no report page: {error}")
        return None


def _record(sweep: Sweep, question: str, found: Importance | str, files: list[Path], page: Path | None, uri: str) -> None:
    """The summary run: made, or written again."""
    from mlflow import MlflowClient

    first = sweep.rows[0]
    experiment = next(name for name, number in first.reader.experiments.items() if number == first.run.info.experiment_id)
    store = Store(uri, experiment, f"{sweep.name} summary", _now_ms(), _earlier(sweep, uri))
    store.open()
    try:
        for op in _described(sweep, question, found):
            store.send([op])
        for path in files:
            store.send([{"op": "file", "path": str(path.absolute())}])
        if page is not None:
            whole = sum(path.stat().st_size for path in page.parent.rglob("*")) <= MOST_BYTES
            client = MlflowClient(uri)
            if whole:
                client.log_artifacts(store.run_id, str(page.parent), "report")
            else:
                client.log_artifact(store.run_id, str(page), "report")
    finally:
        store.send([{"op": "finish", "status": "FINISHED", "time_ms": _now_ms()}])


def _described(sweep: Sweep, question: str, found: Importance | str) -> list[Op]:
    """Tags, with the table as description, and metrics: the best mean, and each axis' importance."""
    text = table.text(sweep)
    if len(text) > LONGEST_NOTE:  # whole lines of it
        text = text[:LONGEST_NOTE].rsplit("\n", 1)[0] + "\n\n(more in results.md)"
    values: dict[str, float] = {"sweep/trials": len(sweep.rows), "sweep/running": sweep.ends.get(RUNNING, 0)}
    best = sweep.points[0].mean(sweep.metric)
    if best is not None:
        values[f"sweep/best {sweep.metric.replace('/', ' ')}"] = best
    if not isinstance(found, str):
        values |= {f"importance/{share.name.replace('×', 'x')}": share.share for share in found.shares}
    tags = {SWEEP: sweep.name, SPACE: sweep.space, KIND: SUMMARY, QUESTION: question, NOTE: text}
    return [{"op": "tags", "values": tags}, {"op": "metrics", "step": 0, "time_ms": _now_ms(), "values": values}]


def _earlier(sweep: Sweep, uri: str) -> str | None:
    """The id of the sweep's summary run in this store."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return None
    runs = [run for run in Reader(uri).runs(where=f"tags.{KIND} = '{SUMMARY}'") if run.data.tags.get(SWEEP) == sweep.name]
    return runs[0].info.run_id if runs else None


def _asked_before(sweep: Sweep) -> str:
    """The question, out of a summary that was written before."""
    for reader in dict.fromkeys(row.reader for row in sweep.rows):
        for run in reader.runs(where=f"tags.{KIND} = '{SUMMARY}'"):
            if run.data.tags.get(SWEEP) == sweep.name:
                return str(run.data.tags.get(QUESTION, ""))
    return ""


def _text(path: Path, content: str) -> None:
    with atomic(path, "type another folder") as temporary:
        temporary.write_text(content)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
