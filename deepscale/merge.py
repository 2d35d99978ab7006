"""`deepscale merge`: runs from many small MLflow stores into one.

Jobs of a cluster write a store each, beside their run, since one SQLite file must not be shared over a network file system. This
copies their runs into the store of MLFLOW_TRACKING_URI, else mlflow.db of the working folder: metrics with steps and times, settings,
tags, data set, artifacts, status. A copy carries the id of its original in the tag `merged_from`, by which it is found again: merging
twice adds nothing, and a run that has grown since is brought up to date. The stores that are read stay as they are.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from deepscale import config
from deepscale.errors import MissingPackageError, UsageError
from deepscale.files import sha256_of
from deepscale.tracking_read import MlflowRun, Reader
from deepscale.tracking_store import DEFAULT_STORE, Op, Store, cause, grouped, import_mlflow, shown, sqlite_path, store_uri

ORIGINAL = "merged_from"
FILES = "merged_files"  # a digest of the artifacts that were copied
SKIPPED = (".venv", ".git", "mlruns", "checkpoints")  # folders that hold many files and no store
LOCK_WAIT_S = 600.0


def main(arguments: list[str]) -> None:
    """Merges all stores below the folders. Raises UsageError where one cannot be read, after the others are merged."""
    parser = config.parser("deepscale merge", f"Copy the runs of all {DEFAULT_STORE} below folders into one store; again, to bring them up to date.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=f"a job's folder, a folder of such, or a {DEFAULT_STORE} itself")
    given = parser.parse_args(arguments)
    target = store_uri()
    stores = [path for path in found(given.folders) if path != sqlite_path(target)]
    if not stores:
        places = ", ".join(map(str, given.folders))
        raise UsageError(
            f"there is no {DEFAULT_STORE} below {places} other than the target; give the folder of the jobs: deepscale merge SHARED/jobs"
        )
    totals = {"new": 0, "brought up to date": 0, "unchanged": 0, "deleted in the target, left alone": 0}
    failed: list[str] = []
    with _alone(target):
        for path in stores:
            try:
                for name, what in merge(path, target):
                    totals[what] += 1
                    if what != "unchanged":
                        print(f"{what}: {name} from {path}", flush=True)
            except Exception as error:
                failed.append(f"{path}: {error}" if isinstance(error, UsageError) else f"{path} into {shown(target)}, which {cause(error)}")
    counts = ", ".join(f"{count:,} {what}" for what, count in totals.items() if count) or "no run"
    print(f"{shown(target)}: {counts}; {len(stores):,} {'store' if len(stores) == 1 else 'stores'} read")
    if failed:
        raise UsageError(f"not merged: {'; '.join(failed)}; what is merged is complete, type the same again")


def found(folders: Iterable[Path]) -> list[Path]:
    """All stores below folders, each once, in order. Raises UsageError for a folder that is not there."""
    stores: dict[Path, None] = {}
    for folder in folders:
        if folder.is_file():
            stores[folder.absolute()] = None
        elif not folder.is_dir():
            raise UsageError(f"the folder {folder} is not there; give the folder of the jobs: deepscale merge SHARED/jobs")
        for place, inner, files in os.walk(folder.absolute()):
            inner[:] = sorted(name for name in inner if name not in SKIPPED)
            if DEFAULT_STORE in files and Path(place, DEFAULT_STORE).stat().st_size:
                stores[Path(place, DEFAULT_STORE)] = None
    return list(stores)


def merge(source: Path, target: str) -> Iterator[tuple[str, str]]:
    """Copies the runs of an SQLite store, oldest first: (run's name, what was done) for each. Raises what the stores raise."""
    reader = Reader(f"sqlite:///{source}")
    experiments = {number: name for name, number in reader.experiments.items()}
    for run in reversed(reader.runs()):
        yield run.info.run_name, _merge_run(reader, source, run, experiments[run.info.experiment_id], target)


def _merge_run(reader: Reader, source: Path, run: MlflowRun, experiment: str, target: str) -> str:
    """Creates or finds the run's copy and sends what it lacks; the status last, so that a copy that has ended is complete."""
    from mlflow import MlflowClient

    store = Store(target, experiment, run.info.run_name, run.info.start_time)
    client = MlflowClient(target)
    found = _copy_of(run.info.run_id, client)
    if found is not None and found.info.lifecycle_stage == "deleted":
        return "deleted in the target, left alone"
    store.run_id = None if found is None else found.info.run_id
    store.open()
    if found is None:
        store.send([{"op": "tags", "values": {ORIGINAL: run.info.run_id}}])  # first: by it an interrupted copy is found again
    there = client.get_run(store.run_id)
    ops = [*_metrics(reader, run, client, there), *_described(run, there)]
    for group in grouped(ops):
        store.send(group)
    files = _send_files(_artifacts(source, run), client, there)
    ended = (run.info.status, run.info.end_time) != (there.info.status, there.info.end_time)
    if ended and run.info.status == "RUNNING":  # it goes on since the last merge
        client.update_run(store.run_id, status="RUNNING")
        ended = there.info.status != "RUNNING"
    elif ended:
        client.set_terminated(store.run_id, run.info.status, run.info.end_time)
    return "new" if found is None else "brought up to date" if ops or files or ended else "unchanged"


def _copy_of(original: str, client: Any) -> MlflowRun | None:
    """The copy of a run in the target, a deleted one too."""
    from mlflow.entities import ViewType

    experiments = [experiment.experiment_id for experiment in client.search_experiments(ViewType.ALL)]
    copies = client.search_runs(experiments, f"tags.{ORIGINAL} = '{original}'", run_view_type=ViewType.ALL, max_results=1)
    return copies[0] if copies else None


def _metrics(reader: Reader, run: MlflowRun, client: Any, there: MlflowRun) -> Iterator[Op]:
    """The points that the copy lacks."""
    for key in run.data.metrics:
        # repr: NaN is not equal to itself.
        known = (
            {(point.step, point.timestamp, repr(point.value)) for point in client.get_metric_history(there.info.run_id, key)}
            if key in there.data.metrics
            else ()
        )
        for point in reader.points(run, key):
            if (point.step, point.timestamp, repr(point.value)) not in known:
                yield {"op": "metrics", "step": point.step, "time_ms": point.timestamp, "values": {key: point.value}}


def _described(run: MlflowRun, there: MlflowRun) -> Iterator[Op]:
    """Settings, tags and data sets that the copy lacks or has otherwise."""
    settings = {name: value for name, value in run.data.params.items() if name not in there.data.params}
    if settings:
        yield {"op": "parameters", "values": settings}
    tags = {name: value for name, value in run.data.tags.items() if there.data.tags.get(name) != value}
    if tags:
        yield {"op": "tags", "values": tags}
    known = {(entry.dataset.name, entry.dataset.digest) for entry in there.inputs.dataset_inputs}
    for entry in run.inputs.dataset_inputs:
        data = entry.dataset
        if (data.name, data.digest) not in known:
            yield {"op": "dataset", "name": data.name, "digest": data.digest, "source": data.source, "profile": data.profile}


def _artifacts(source: Path, run: MlflowRun) -> Path:
    """The folder of a run's artifacts: where the store says, else, for a folder that was moved or copied, beside the store."""
    folder = Path(unquote(urlsplit(run.info.artifact_uri).path))
    if folder.is_dir():
        return folder
    return next(iter(source.parent.glob(f"mlruns/*/{run.info.run_id}/artifacts")), folder)


def _send_files(folder: Path, client: Any, there: MlflowRun) -> bool:
    """Copies all artifacts unless the copy has exactly these; whether it did."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return False
    sums = "".join(f"{path.relative_to(folder)} {sha256_of(path)}\n" for path in files)
    digest = hashlib.sha256(sums.encode()).hexdigest()
    if there.data.tags.get(FILES) == digest:
        return False
    client.log_artifacts(there.info.run_id, str(folder))
    client.set_tag(there.info.run_id, FILES, digest)
    return True


@contextmanager
def _alone(target: str) -> Iterator[None]:
    """The target, ready to be written; one merge at a time into an SQLite store, so that no run is copied twice."""
    from filelock import FileLock, Timeout

    try:
        import_mlflow()
        from mlflow import MlflowClient
    except ImportError:
        raise MissingPackageError("mlflow", None, "merging stores") from None

    def make_ready() -> None:
        try:
            MlflowClient(target).search_experiments(max_results=1)
        except Exception as error:
            raise UsageError(f"{shown(target)} {cause(error)}; nothing was merged; set MLFLOW_TRACKING_URI to a store that works") from None

    path = sqlite_path(target)
    if path is None:
        make_ready()
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.merge.lock", timeout=LOCK_WAIT_S):
            with FileLock(f"{path}.lock", timeout=LOCK_WAIT_S):  # the same as a run's: MLflow makes the tables of a new file without one
                make_ready()
            yield
    except Timeout:
        raise UsageError(f"another merge into {path} has been running for {LOCK_WAIT_S / 60:.0f} minutes; try again when it has ended") from None
