"""Reading recorded runs back from MLflow: an experiment, its runs, a run by name or id, the history of a metric, an artifact.

Reading creates nothing: where there is no database yet, a sentence says so instead of MLflow making an empty one. Every error of
the store becomes a `UsageError` that names the address without its password.

Measured (SQLite, 100 runs of 55 parameters, 4 metrics and 250 steps): `search_runs` 0.25 s for all runs with parameters, tags and
last metrics; `get_metric_history` 5 ms a call; MLflow's private bulk call for 100 runs 0.67 s, slower than 100 calls.
"""

import atexit
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from deepscale.errors import DeepscaleError, MissingPackageError, UsageError
from deepscale.tracking_store import cause, import_mlflow, shown, sqlite_path, store_uri

NAMES_LISTED = 20
PAGE = 1000  # runs per request

MlflowRun = Any  # mlflow.entities.Run; MLflow is imported late


class Reader:
    """The runs of an MLflow store. Its methods raise UsageError for what is not there and for a store that fails."""

    def __init__(self, uri: str | None = None) -> None:
        """Opens the store: `uri`, else MLFLOW_TRACKING_URI, else mlflow.db in the working folder."""
        self.uri = uri or store_uri()
        _check_exists(self.uri)
        try:
            import_mlflow()
            from mlflow import MlflowClient
        except ImportError:
            raise MissingPackageError("mlflow", None, "reading recorded runs") from None
        with self._errors():
            self._client = MlflowClient(tracking_uri=self.uri)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DeepscaleError:
            raise
        except Exception as error:
            raise UsageError(f"the runs cannot be read: {shown(self.uri)} {cause(error)}; set MLFLOW_TRACKING_URI to a store that works") from None

    @cached_property
    def experiments(self) -> dict[str, str]:
        """Name -> id of all experiments."""
        with self._errors():
            return {found.name: found.experiment_id for found in self._client.search_experiments()}

    def runs(self, experiment: str | None = None, where: str = "") -> list[MlflowRun]:
        """The runs of an experiment (None: of all), newest first, that an MLflow filter selects."""
        known = self.experiments
        if experiment is not None and experiment not in known:
            raise UsageError(f"the experiment {experiment!r} is not in {shown(self.uri)}; possible: {listed(known)}")
        ids = list(known.values()) if experiment is None else [known[experiment]]
        runs: list[MlflowRun] = []
        token: str | None = None
        with self._errors():
            while True:
                page = self._client.search_runs(ids, where, order_by=["attributes.start_time DESC"], max_results=PAGE, page_token=token)
                runs += page
                token = page.token
                if not token:
                    return runs

    def run(self, given: str, experiment: str | None = None) -> MlflowRun:
        """The run of this id, else the newest of this name. Raises UsageError, listing the newest names."""
        if re.fullmatch(r"[0-9a-f]{32}", given):
            found = self.runs(experiment, f"attributes.run_id = '{given}'")
            if found:
                return found[0]
        # MLflow's filters know no escaped quote.
        quote = next((mark for mark in "'\"`" if mark not in given), None)
        named = self.runs(experiment, f"attributes.run_name = {quote}{given}{quote}") if quote in ("'", '"') else self.runs(experiment)
        for run in named:
            if run.info.run_name == given:
                return run
        names = dict.fromkeys(run.info.run_name for run in self.runs(experiment))
        inside = f"the experiment {experiment!r}" if experiment else shown(self.uri)
        if not names:
            raise UsageError(f"no run is named {given!r}: there is no run in {inside}; train one: deepspeed deepscale/train.py --depth 26")
        raise UsageError(f"no run is named {given!r}; possible: {listed(names)}")

    def history(self, run: MlflowRun, metric: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of a metric in order of the steps; of a step logged twice the later value."""
        points = self.points(run, metric)
        return sorted({point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}.items())

    def points(self, run: MlflowRun, metric: str) -> list[Any]:
        """All that was logged of a metric: MLflow's entities, with step, timestamp (ms since 1970) and value."""
        if metric not in run.data.metrics:
            return []
        with self._errors():
            return list(self._client.get_metric_history(run.info.run_id, metric))

    def median(self, run: MlflowRun, metric: str) -> float | None:
        """The median of a metric over the steps."""
        points = self.history(run, metric)
        return statistics.median(value for _, value in points) if points else None

    def tag(self, run: MlflowRun, name: str, value: str) -> None:
        """Sets a tag of a run that has ended."""
        with self._errors():
            self._client.set_tag(run.info.run_id, name, value)

    def artifact(self, run: MlflowRun, name: str) -> Path | None:
        """The path of an artifact, None where the run has none of this name; from a server it is fetched, and removed at exit."""
        place = urlsplit(run.info.artifact_uri or "")
        if place.scheme in ("", "file"):
            path = Path(unquote(place.path)) / name
            return path if path.is_file() else None
        with self._errors():
            if all(found.path != name for found in self._client.list_artifacts(run.info.run_id)):
                return None
            folder = tempfile.mkdtemp(prefix="deepscale-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return Path(self._client.download_artifacts(run.info.run_id, name, folder))


def artifact_of(run: str, name: str) -> Path:
    """The path of an artifact of a run, given by id or name (the newest of that name), in whatever experiment it is.

    Raises UsageError where there is no such run, listing the names there are, or where the run has no such artifact.
    """
    reader = Reader()
    found = reader.run(run)
    path = reader.artifact(found, name)
    if path is None:
        raise UsageError(f"run {run!r} has no {name}: {why_no_record(found)}")
    return path


def why_no_record(run: MlflowRun) -> str:
    """Why a run may have no record of its gradient flow, and what to type."""
    if run.info.status == "RUNNING":
        return "it is still running and its record comes at the end; type the same again later"
    if run.data.params.get("record_every") == "0":
        return "it was recorded without gradient flow (--record-every 0); train again without this option"
    return "it ended before its record was written, or deepscale was older; train again"


def listed(names: Sequence[str] | dict[str, Any], most: int = NAMES_LISTED) -> str:
    """The first names as a list in a sentence, and how many more there are."""
    first = list(names)[:most]
    return ", ".join(first) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _check_exists(uri: str) -> None:
    """Raises UsageError where MLflow would make an empty store: a file or folder that is not there."""
    path = sqlite_path(uri)
    if path is None and urlsplit(uri).scheme in ("", "file"):
        path = Path(unquote(urlsplit(uri).path)).absolute()
    if path is None or (path.exists() and (path.is_dir() or path.stat().st_size)):
        return
    raise UsageError(
        f"no run is recorded here: there is no {path.name} in this folder; go to the folder where the runs were trained, "
        "or set MLFLOW_TRACKING_URI to their store"
        if path.parent == Path.cwd()
        else f"no run is recorded here: {shown(uri)} does not exist; set MLFLOW_TRACKING_URI to the store of the runs"
    )
