"""The background thread that sends a run's operations to its store, and keeps what cannot be sent.

Training only puts an operation in a bounded queue. The thread wakes once a second, sends what has come in few large requests (a batch of
an SQLite store costs 5 ms of CPU whether it holds 10 values or 100), and on a failure writes the operations to
`runs/<run>/unsent_metrics.jsonl`, warns once, and leaves the store alone for 30 s. At the end everything in that file is tried once
more; a file that remains can be sent later by `resend`. The file's first line names the run (tracking_store.Store.header).
"""

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from queue import Empty, Full, Queue

from deepscale.tracking_store import Op, Store, cause, grouped, is_refusal, shown

QUEUE_OPS = 10_000
LINGER_S = 1.0
RETRY_S = 30.0
FINISH_WAIT_S = 30.0
UNSENT_NAME = "unsent_metrics.jsonl"


class UnsentFile:
    """Operations kept as JSON lines in the run's folder; safe to use from several threads.

    `path` is None until the first write, but where the run goes on and its earlier process left a file.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._named_run: str | None = None
        self._lock = threading.RLock()
        self.path: Path | None = folder / UNSENT_NAME if (folder / UNSENT_NAME).is_file() else None

    def keep(self, ops: Sequence[Op]) -> None:
        """Appends operations. Raises OSError where the folder cannot be written."""
        with self._lock:
            lines = []
            self.path = self._folder / UNSENT_NAME
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Named again once the run exists: the last header counts.
            if not self.path.exists() or self._named_run != self._store.run_id:
                lines.append(self._store.header())
            self._named_run = self._store.run_id
            with self.path.open("a") as file:
                file.writelines(to_line(op) for op in [*lines, *ops])

    def send(self) -> bool:
        """Sends everything and removes the file; True when nothing is left. Raises the store's error, the rest stays kept."""
        if self.path is None or not self.path.exists():
            return True
        return send_file(self.path, self._store, self._lock) == 0


def to_line(op: Op) -> str:
    """An operation as one line of strict JSON: NaN becomes null."""
    if op["op"] == "metrics":
        op = {**op, "values": {key: None if math.isnan(value) else value for key, value in op["values"].items()}}
    return json.dumps(op, allow_nan=False) + "\n"


def read_file(path: Path) -> list[Op]:
    """The operations of a file, its headers among them; a last line cut by a crash is left out."""
    lines = path.read_text().splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    return [json.loads(line) for line in lines]


def send_file(path: Path, store: Store, lock: AbstractContextManager[object]) -> int:
    """Sends the operations of a file to the store; the number that was refused and stays in the file.

    The lock guards the file, not the sending: what is appended meanwhile stays. The file is removed when nothing stays.
    Raises the store's error when the store itself fails; what was not sent stays in the file.
    """
    with lock:
        sent_to = path.stat().st_size
        groups = list(grouped([op for op in read_file(path) if op["op"] != "run"]))
    left: list[Op] = []
    try:
        store.open()
        while groups:
            try:
                store.send(groups[0])
            except Exception as error:
                if not is_refusal(error):
                    raise
                left += groups[0]
            groups.pop(0)
    finally:
        left += [op for group in groups for op in group]
        with lock:
            appended = path.read_bytes()[sent_to:]
            if left or appended:
                temporary = path.with_suffix(".part")
                temporary.write_bytes("".join(to_line(op) for op in [store.header(), *left]).encode() + appended)
                temporary.replace(path)
            else:
                path.unlink()
                # The run's folder goes with it where nothing else lies there.
                with suppress(OSError):
                    path.parent.rmdir()
    return len(left)


def resend(path: Path, tracking_uri: str | None = None) -> tuple[str, int]:
    """Sends a file that a run left behind: (run id, number of operations the store refused and that stay in the file).

    tracking_uri defaults to the one in the file, which holds no password. The run is created where it never was.
    Raises ValueError for a file without a run, and the store's own error when the store fails again.
    """
    headers = [op for op in read_file(path) if op["op"] == "run"]
    if not headers:
        raise ValueError(f"{path} names no run")
    header = headers[-1]
    store = Store(tracking_uri or header["tracking_uri"], header["experiment"], header["run_name"], header["start_ms"], header["run_id"])
    left = send_file(path, store, threading.Lock())
    return str(store.run_id), left


class Writer:
    """Sends operations in the background. `put` never waits; `close` waits at most `FINISH_WAIT_S`."""

    def __init__(self, store: Store, folder: Path, warn: Callable[[str], None]) -> None:
        self.store = store
        self.unsent = UnsentFile(store, folder)
        self.first_attempt = threading.Event()
        self._warn = warn
        self._warned = False
        self._queue: Queue[Op] = Queue(QUEUE_OPS)
        self._closing = threading.Event()
        self._retry_at = 0.0
        self._in_flight: list[Op] = []
        self._moving = threading.Lock()  # from the queue into flight
        self._thread = threading.Thread(target=self._work, daemon=True, name="deepscale-tracking")

    def start(self) -> None:
        """Starts the thread, which opens the run first."""
        self._thread.start()

    def put(self, op: Op) -> None:
        """Queues an operation; where the queue is full it goes to the file at once. After `close` it is dropped."""
        if self._closing.is_set():
            return
        try:
            self._queue.put_nowait(op)
        except Full:
            self._keep([op])

    def pending(self) -> list[Op]:
        """The metrics that were put and are neither sent nor kept in the file yet, as JSON: what a killed process would lose."""
        with self._moving, self._queue.mutex:
            ops = [op for op in (*self._in_flight, *self._queue.queue) if op["op"] == "metrics"]
        return [json.loads(to_line(op)) for op in ops]

    def close(self) -> None:
        """Sends what is queued and ends the thread; what is not sent within `FINISH_WAIT_S` is kept in the file."""
        self._closing.set()
        try:
            self._thread.join(FINISH_WAIT_S)
        finally:
            # Also after Ctrl-C in the wait: nothing is lost then either.
            if self._thread.is_alive():
                self._keep([*self._in_flight, *self._drain()])
                slow = f"took more than {FINISH_WAIT_S:.0f} s to end the run"
                self._warn(f"tracking: {shown(self.store.uri)} {slow}; the rest is kept in {self.unsent.path}")

    def _work(self) -> None:
        self._try(lambda: None)
        self.first_attempt.set()
        while not self._closing.wait(LINGER_S):
            self._send()
        # One last attempt, however recent the failure.
        self._retry_at = 0.0
        was_kept = self.unsent.path is not None
        self._take()
        self._try(lambda: self._recover() if was_kept else None)
        self._send_taken()

    def _recover(self) -> None:
        path = self.unsent.path
        if self.unsent.send():
            self._warn(f"tracking: {shown(self.store.uri)} works again; everything kept in {path} was sent")

    def _take(self) -> None:
        with self._moving:
            self._in_flight = self._drain()

    def _send(self) -> None:
        self._take()
        self._send_taken()

    def _send_taken(self) -> None:
        for group in grouped(self._in_flight):
            if not self._try(lambda group=group: self.store.send(group)):  # type: ignore[misc]
                self._keep(group)
            self._in_flight = self._in_flight[len(group) :]

    def _try(self, action: Callable[[], None]) -> bool:
        """Whether the action succeeded; not tried while the store rests after a failure."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            self.store.open()
            action()
        except Exception as error:
            if not is_refusal(error):
                self._retry_at = time.monotonic() + RETRY_S
            self._failed(error)
            return False
        return True

    def _failed(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        self._keep([])
        where = f"what could not be sent is kept in {self.unsent.path}"
        self._warn(f"tracking: {shown(self.store.uri)} {cause(error)}; training goes on, and {where}")

    def _keep(self, ops: Sequence[Op]) -> None:
        try:
            self.unsent.keep(ops)
        except OSError as error:
            self._warn(f"tracking: {len(ops)} records are lost: {error}")

    def _drain(self) -> list[Op]:
        ops: list[Op] = []
        while len(ops) < QUEUE_OPS:
            try:
                ops.append(self._queue.get_nowait())
            except Empty:
                break
        return ops
