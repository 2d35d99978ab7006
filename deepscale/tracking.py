"""What a run tells MLflow, and how little of the training's time that takes.

`open_tracker` gives the one object the training loop talks to. `log` and its sisters put a small dict in a queue (some microseconds); a
thread sends it (tracking_writer.py) to MLflow (tracking_store.py). A store that is slow, locked, dead or missing never stops or slows
training: one warning, and what could not be sent lies in `runs/<run>/unsent_metrics.jsonl`.

Store: MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in the working folder with the files beside it in `mlruns/`. Only rank 0 writes.
NaN metrics are logged as NaN, which MLflow keeps. Infinite ones are not: MLflow would store 1.8e308, which ruins the chart's axis; they
are left out and counted in the tag `skipped_infinite_metrics`.
"""

import atexit
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from deepscale.config import TrackingConfig
from deepscale.errors import MissingPackageError
from deepscale.paths import run_folder
from deepscale.tracking_store import DEFAULT_STORE, Op, Store, clean_key, import_mlflow, shown, sqlite_path, store_uri
from deepscale.tracking_system import SystemSampler
from deepscale.tracking_writer import Writer

# A dead server shows itself within 5 to 11 s; the rest is for creating the tables of a new file on a busy machine.
OPEN_WAIT_S = 30.0
# MLflow's limits, in characters.
LONGEST_PARAMETER = 6000
LONGEST_TAG = 8000
LONGEST_DATASET_NAME = 500
LONGEST_DIGEST = 36
# What the first run of a process loads on top of `import mlflow`.
_FIRST_USED = ("mlflow.tracking.client", "mlflow.store.tracking.sqlalchemy_store", "mlflow.tracking.context.registry")


class DatasetLike(Protocol):
    """The data set of a run: its name and a digest (SHA-256 or shorter) of what it holds. Further simple fields become its profile."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...


class Tracker(Protocol):
    """Where a run is recorded. No method raises for a store that fails, and only `finish` may wait."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None where there is none (yet)."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics at an optimiser step (0-based or 1-based as the caller counts)."""

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Records settings by name, once each: a second, different value of a name is warned of and left out."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Records tags; a later value replaces an earlier one."""

    def text(self, name: str, content: str) -> None:
        """Stores a text as the artifact `name`, for example "summary.json"."""

    def file(self, path: Path) -> None:
        """Stores a file as an artifact; it must stay in place until `finish`."""

    def pending(self) -> list[Op]:
        """Metrics that are recorded and not yet safe in the store or on a disk, as JSON: a killed process loses them."""

    def again(self, ops: Sequence[Op]) -> None:
        """Records what was `pending` in another process; what reached the store before is there as it was."""

    def finish(self, status: str) -> None:
        """Sends what is left, at most 30 s, and closes the run as FINISHED, FAILED or KILLED. A second call does nothing."""

    def view_command(self) -> str:
        """The line to type that shows the run; for a server its address, for a run MLflow never saw its file, "" for no record."""


class NullTracker:
    """Records nothing."""

    run_id: str | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Does nothing."""

    def text(self, name: str, content: str) -> None:
        """Does nothing."""

    def file(self, path: Path) -> None:
        """Does nothing."""

    def pending(self) -> list[Op]:
        """Nothing."""
        return []

    def again(self, ops: Sequence[Op]) -> None:
        """Does nothing."""

    def finish(self, status: str) -> None:
        """Does nothing."""

    def view_command(self) -> str:
        """The empty string: there is nothing to show."""
        return ""


class MlflowTracker:
    """Records a run in MLflow from a background thread (see `Tracker`)."""

    def __init__(self, writer: Writer, warn: Callable[[str], None]) -> None:
        self._writer = writer
        self._warn = warn
        self._known: dict[str, str] = {}
        self._clean: dict[str, str] = {}
        self._infinite = 0
        self._finished = False
        self._process = os.getpid()
        self._system = SystemSampler(self.log)
        atexit.register(self._at_exit)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the store has answered."""
        return self._writer.store.run_id

    def open(self) -> None:
        """Starts the thread and waits for its first attempt to create the run, at most `OPEN_WAIT_S`."""
        self._writer.start()
        self._writer.first_attempt.wait(OPEN_WAIT_S)
        self._system.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues metrics of a step; infinite ones are counted and left out."""
        values = {}
        for name, given in metrics.items():
            value = float(given)
            if math.isinf(value):
                self._infinite += 1
                continue
            key = self._clean.get(name)
            if key is None:
                key = self._clean[name] = clean_key(name)
            values[key] = value
        if values:
            self._writer.put({"op": "metrics", "step": int(step), "time_ms": _now_ms(), "values": values})

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Queues settings as text."""
        new = {}
        for name, value in values.items():
            key, text = clean_key(name), _capped(as_text(value), LONGEST_PARAMETER)
            known = self._known.setdefault(key, text)
            if known != text:
                self._warn(f"tracking: the parameter {key} is already recorded as {known}; {text} is left out, for MLflow keeps the first")
            elif key not in new:
                new[key] = text
        if new:
            self._writer.put({"op": "parameters", "values": new})

    def tags(self, values: Mapping[str, str]) -> None:
        """Queues tags."""
        if values:
            self._writer.put({"op": "tags", "values": {clean_key(key): _capped(as_text(value), LONGEST_TAG) for key, value in values.items()}})

    def dataset(self, info: DatasetLike) -> None:
        """Queues the data set as an input of the run."""
        self._writer.put(_dataset_op(info))

    def text(self, name: str, content: str) -> None:
        """Queues a text artifact."""
        self._writer.put({"op": "text", "name": clean_key(name), "content": content})

    def file(self, path: Path) -> None:
        """Queues a file artifact."""
        self._writer.put({"op": "file", "path": str(Path(path).absolute())})

    def pending(self) -> list[Op]:
        """What a killed process would lose."""
        return self._writer.pending()

    def again(self, ops: Sequence[Op]) -> None:
        """Queues what was pending in another process; metrics only, since what a file says is not trusted with more."""
        for op in ops:
            if op["op"] == "metrics":
                self._writer.put(op)

    def finish(self, status: str) -> None:
        """Closes the run; see `Tracker.finish`."""
        if self._finished:
            return
        self._finished = True
        self._system.stop()
        if self._infinite:
            self.tags({"skipped_infinite_metrics": str(self._infinite)})
        self._writer.put({"op": "finish", "status": status, "time_ms": _now_ms()})
        self._writer.close()
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        # A child made by fork inherits this hook, not the run.
        if os.getpid() == self._process:
            self.finish("FAILED")

    def view_command(self) -> str:
        """The line to type that shows the run."""
        store, kept = self._writer.store, self._writer.unsent.path
        if store.run_id is None and kept is not None:
            return f"less {shlex.quote(str(kept))}"
        if store.uri.startswith(("http://", "https://")):
            return f"{shown(store.uri).rstrip('/')}/#/experiments/{store.experiment_id}/runs/{store.run_id}"
        return view_command(store.uri)


def view_command(uri: str) -> str:
    """The `mlflow ui` line for a store's address, short where the file lies in the working folder."""
    path = sqlite_path(uri)
    if path == Path(DEFAULT_STORE).absolute():
        uri = f"sqlite:///{DEFAULT_STORE}"
    program = Path(sys.executable).parent / "mlflow"
    if not program.exists() or shutil.which("mlflow") == str(program):
        words = ["mlflow"]
    else:
        # The environment is not activated: its own command by its path.
        words = [os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program)]
    return shlex.join([*words, "ui", "--backend-store-uri", shown(uri), "--host", "127.0.0.1"])


def preload() -> threading.Thread | None:
    """Starts `import mlflow` in the background, so that its 1 to 5 s pass while something else waits; None without MLflow.

    Call it after `import torch` (which MLflow does not import), and join the thread before a fork: a child that inherits a half-done
    import waits for it for ever. `open_tracker` needs no join.
    """
    if not _has_mlflow():
        return None
    thread = threading.Thread(target=_preload, daemon=True, name="deepscale-import-mlflow")
    thread.start()
    # An interpreter that ends in the middle of loading a C extension can crash.
    atexit.register(thread.join, 20.0)
    return thread


def open_tracker(
    tracking: TrackingConfig,
    *,
    run_name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    dataset: DatasetLike | None,
    rank: int,
    warn: Callable[[str], None],
    folder: Path | None = None,
    run_id: str | None = None,
) -> Tracker:
    """The tracker of this process: MLflow on rank 0, nothing elsewhere or when switched off.

    What cannot be sent is kept in `folder`, by default one under `runs/` with the run's name. `run_id` is a run to go on with (Store).
    Never raises for the store; `warn` gets
    one sentence for a store that fails, also from the background thread.
    """
    if rank != 0 or not tracking.tracking:
        return NullTracker()
    if not _has_mlflow():
        warn(f"{MissingPackageError('mlflow', None, 'tracking')}; this run is not recorded")
        return NullTracker()
    store = Store(store_uri(), tracking.experiment, run_name, _now_ms(), run_id, lost=warn)
    tracker = MlflowTracker(Writer(store, folder or run_folder(run_name), warn), warn)
    tracker.open()
    tracker.parameters(parameters)
    tracker.tags(tags)
    if dataset is not None:
        tracker.dataset(dataset)
    return tracker


def as_text(value: Any) -> str:
    """A setting as it is typed: none, true, 1,1,5,1, 0.001."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(as_text(part) for part in value)
    if isinstance(value, Mapping):
        return json.dumps(value, default=str)
    return str(value)


def _capped(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _has_mlflow() -> bool:
    try:
        return importlib.util.find_spec("mlflow") is not None
    except (ImportError, ValueError):
        return False


def _preload() -> None:
    # The tracker meets the same error, and says it; here it only means that nothing is loaded ahead. RuntimeError: the command ends
    # already (bad input), and MLflow's modules may no longer register what they do at exit.
    with suppress(ImportError, RuntimeError):
        import_mlflow()
        for name in _FIRST_USED:
            importlib.import_module(name)


def _dataset_op(info: DatasetLike) -> Op:
    fields: dict[str, Any] = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)} if dataclasses.is_dataclass(info) else dict(vars(info))
    source = str(fields.get("source") or fields.get("path") or info.name)
    plain = (bool, int, float, str, list, tuple)
    profile = {key: value for key, value in fields.items() if key not in ("name", "digest", "source") and isinstance(value, plain)}
    own = {"name": info.name[:LONGEST_DATASET_NAME], "digest": info.digest[:LONGEST_DIGEST], "source": source}
    return {"op": "dataset", **own, "profile": json.dumps(profile, default=str)}
