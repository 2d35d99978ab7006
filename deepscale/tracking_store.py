"""One run in an MLflow store, written as a stream of operations.

An operation ("op") is a small dict that JSON can hold, so that what cannot be sent now can lie in a file and be sent later:

    {"op": "metrics", "step": 7, "time_ms": ..., "values": {"train/loss": 2.3}}      null stands for NaN
    {"op": "parameters" | "tags", "values": {name: text}}
    {"op": "dataset", "name": ..., "digest": ..., "source": ..., "profile": text}
    {"op": "text", "name": "summary.json", "content": ...}
    {"op": "file", "path": ...}
    {"op": "finish", "status": "FINISHED" | "FAILED" | "KILLED", "time_ms": ...}

Only MlflowClient is used, no global "active run". Nothing here runs on the training thread (tracking_writer.py), so it may take its
time, but every call is bounded: the HTTP limits below, a short look at the lock of an SQLite file before MLflow's own 20 s wait on it.
"""

import logging
import os
import re
import socket
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Op = dict[str, Any]

DEFAULT_STORE = "mlflow.db"
SQLITE_WAIT_S = 5.0
LOCK_WAIT_S = 60.0
METRICS_PER_REQUEST = 1000
ITEMS_PER_REQUEST = 100
# Of an address: scheme://user:PASSWORD@host, and ?name=VALUE.
PASSWORD = re.compile(r"^([\w+.-]+://[^/?#:]*):[^/?#]*@")
SECRET_OF_QUERY = re.compile(r"([?&][\w.-]*(?:passw|pwd|token|secret|key)[\w.-]*=)[^&#]*", re.IGNORECASE)

# MLflow's page opens an experiment of this kind as training runs with charts, not as traces of language models.
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}

# Set only where the user has not. MLflow's own limits, 7 retries of 120 s, keep a dead server unnoticed for a quarter of an hour.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A training run reports to the store its user named, and to nobody else.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def import_mlflow() -> None:
    """Imports MLflow, quiet and with short limits. About 1 to 5 s the first time."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)(\.|$)")
    # Each failed request is told once, by the writer, not by every layer on the way.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow  # noqa: F401

    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in the working folder, as an absolute address."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    path = sqlite_path(given or f"sqlite:///{DEFAULT_STORE}")
    # Absolute, so that a later change of the working folder changes nothing.
    return given if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of an SQLite store's file, None for any other store."""
    if not uri.startswith("sqlite:///") or uri.endswith(":memory:"):
        return None
    return Path(uri.removeprefix("sqlite:///")).absolute()


def shown(uri: str) -> str:
    """The address without passwords and tokens, for messages and files."""
    return SECRET_OF_QUERY.sub(r"\1***", PASSWORD.sub(r"\1:***@", uri))


def clean_key(name: str) -> str:
    """A name MLflow accepts: other characters than letters, digits and ` _ - . : /` become `_`, at most 250 characters.

    >>> clean_key("stages.2[0]#w")
    'stages.2_0__w'
    """
    parts = (part.strip() for part in re.sub(r"[^\w.\-/ :]", "_", name).split("/"))
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:250] or "_"


def grouped(ops: Sequence[Op]) -> Iterator[list[Op]]:
    """What is sent in one request: runs of metrics of up to 1,000 values, any other operation alone."""
    group: list[Op] = []
    size = 0
    for op in ops:
        values = len(op["values"]) if op["op"] == "metrics" else METRICS_PER_REQUEST
        if group and (size + values > METRICS_PER_REQUEST or op["op"] != group[0]["op"]):
            yield group
            group, size = [], 0
        group.append(op)
        size += values
    if group:
        yield group


class Store:
    """A run of an experiment at a tracking address; the run is created by `open`, or taken to be there where run_id is given.

    With `lost` the run `run_id` is of an earlier process that this one goes on for: it is running again, keeps its parameters, what differs
    becomes a tag `resumed.NAME`, and where the store does not know it any more, `lost` gets a sentence and a new run is made.
    """

    def __init__(
        self, uri: str, experiment: str, run_name: str, start_ms: int, run_id: str | None = None, lost: Callable[[str], None] | None = None
    ) -> None:
        self.uri = uri
        self.experiment = experiment
        self.run_name = run_name
        self.start_ms = start_ms
        self.run_id = run_id
        self.experiment_id: str | None = None
        self._client: Any = None
        self._lost = lost
        self._stored: dict[str, str] = {}  # parameters of the run that goes on

    def header(self) -> Op:
        """The operation that names this run in a file of unsent operations."""
        own = {"experiment": self.experiment, "run_name": self.run_name, "start_ms": self.start_ms, "run_id": self.run_id}
        return {"op": "run", "tracking_uri": shown(self.uri), **own}

    def open(self) -> None:
        """Connects and creates experiment and run where they are missing; does nothing when open.

        Raises whatever MLflow, SQLite or the network raises; `cause` makes a sentence of it.
        """
        path = sqlite_path(self.uri)
        if path is not None:
            _check_sqlite(path)
        if self._client is not None and self.run_id is not None:
            return
        import_mlflow()
        if path is None:
            self._create(None)
            return
        from filelock import FileLock

        # MLflow 3.17 creates the tables of a new file without a lock: of four processes that start at once, three die.
        with FileLock(f"{path}.lock", timeout=LOCK_WAIT_S):
            self._create(path.parent / "mlruns" / re.sub(r"[^\w.\-]", "_", self.experiment))

    def _create(self, artifacts: Path | None) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags

        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                # Beside an SQLite file, wherever the command runs; a server knows its own place.
                place = None if artifacts is None else artifacts.as_uri()
                client.create_experiment(self.experiment, artifact_location=place, tags=MODEL_TRAINING)
            except MlflowException as error:
                # Another process was quicker.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(self.experiment)
        self.experiment_id = found.experiment_id
        if self.run_id is not None and self._lost is not None:
            self._reopen(client)
        if self.run_id is None:
            tags = {**resolve_tags(), "host": socket.gethostname()}
            run = client.create_run(self.experiment_id, start_time=self.start_ms, tags=tags, run_name=self.run_name)
            self.run_id = run.info.run_id
        self._client = client

    def _reopen(self, client: Any) -> None:
        from mlflow.exceptions import MlflowException

        assert self._lost is not None
        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            self._lost(f"tracking: {shown(self.uri)} does not know the run {self.run_id} that this one goes on with; a new run is made")
            self.run_id = None
            return
        self.experiment_id, self._stored = run.info.experiment_id, dict(run.data.params)
        client.update_run(self.run_id, status="RUNNING")

    def send(self, group: Sequence[Op]) -> None:
        """Sends one group (`grouped`). Sending the same group twice changes nothing. Raises as `open` does."""
        kind = group[0]["op"]
        if kind == "metrics":
            self._metrics(group)
            return
        for op in group:
            getattr(self, f"_{kind}")(op)

    def _metrics(self, ops: Sequence[Op]) -> None:
        from mlflow.entities import Metric

        values = [
            Metric(key, float("nan") if value is None else value, op["time_ms"], op["step"]) for op in ops for key, value in op["values"].items()
        ]
        for start in range(0, len(values), METRICS_PER_REQUEST):
            self._client.log_batch(self.run_id, metrics=values[start : start + METRICS_PER_REQUEST])

    def _parameters(self, op: Op) -> None:
        from mlflow.entities import Param

        changed = {key: value for key, value in op["values"].items() if self._stored.get(key, value) != value}
        if changed:
            self._tags({"values": {f"resumed.{key}": value for key, value in changed.items()}})
        for part in _parts({key: value for key, value in op["values"].items() if key not in self._stored}):
            self._client.log_batch(self.run_id, params=[Param(key, value) for key, value in part])

    def _tags(self, op: Op) -> None:
        from mlflow.entities import RunTag

        for part in _parts(op["values"]):
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in part])

    def _dataset(self, op: Op) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(op["name"], op["digest"], source_type="local", source=op["source"], profile=op["profile"])
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _text(self, op: Op) -> None:
        self._client.log_text(self.run_id, op["content"], op["name"])

    def _file(self, op: Op) -> None:
        self._client.log_artifact(self.run_id, op["path"])

    def _finish(self, op: Op) -> None:
        self._client.set_terminated(self.run_id, op["status"], op["time_ms"])


def _parts(values: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    items = list(values.items())
    for start in range(0, len(items), ITEMS_PER_REQUEST):
        yield items[start : start + ITEMS_PER_REQUEST]


def _check_sqlite(path: Path) -> None:
    """Takes and gives back the write lock. Raises sqlite3.Error when the file is locked, not writable or no database."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=SQLITE_WAIT_S, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


# -------------------------------------------------------------------------------------------------- what went wrong, in words

_CAUSES = (
    (r"database is locked", "is locked by another process"),
    (r"readonly database|unable to open database|Permission denied", "cannot be written"),
    (r"not a database", "is not an SQLite database"),
    (r"Name or service not known|Temporary failure in name resolution|NameResolutionError", "has a host name that is not known"),
    (r"Connection refused", "refused the connection"),
    (r"Read timed out|ConnectTimeout|timed out", "did not answer in time"),
    (r"too many (\d+) error responses", "answers with server errors"),
    (r"Connection aborted|RemoteDisconnected|Connection reset", "broke the connection"),
    (r"Network is unreachable|No route to host", "cannot be reached over the network"),
    (r"file lock .* could not be acquired", "is being set up by another process that does not end"),
)


def cause(error: BaseException) -> str:
    """What went wrong, as the rest of a sentence that begins with the store's address."""
    text = f"{error}"
    for pattern, sentence in _CAUSES:
        if re.search(pattern, text):
            return sentence
    return f"failed with {type(error).__name__}: {' '.join(text.split())[:300]}"


def is_refusal(error: BaseException) -> bool:
    """Whether the store works and refused only this operation, so that trying the next one is sensible."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")
