"""The sweep as Ray sees it: a cluster, what a trial takes of it, which trial comes next, and how it is asked to end.

What is done lies in the trials' folders (trial.py), not in Ray's own state: a sweep that goes on gives Ray what is left, and what
schedulers and searches must know of what is done, they are told again from there.
"""

import math
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deepscale import errors
from deepscale.errors import UsageError
from deepscale.sweeps import search
from deepscale.sweeps.space import Trial, trials
from deepscale.sweeps.tags import ENDED as ENDS
from deepscale.sweeps.tags import FINISHED, STOPPED_EARLY, SWEEP, TRIAL
from deepscale.sweeps.trial import STOPPED, Sweep, ended, free_port, trainable
from deepscale.tracking_read import Reader

Search = search.Listed | search.Optuna

NODES_WAIT_S = 180.0
REACH_S = 10.0
STARTS = 3  # of a cluster of this machine's own, which may find a port taken
RECORDED = "recorded"  # in a trial's folder: MLflow knows how it has ended
# Nothing is sent to anybody, no worker is ended for the memory of others, and a worker that ends leaves its training to write a checkpoint.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_kill_child_processes_on_worker_exit": "0",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files per trial that nobody reads: the trainings record in MLflow
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
}
ASKED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Resources:
    """What a trial takes: ranks, and the cores and GPUs of each."""

    ranks: int
    cpus: int
    gpus: float


@dataclass(frozen=True)
class Asked:
    """Of a sweep, what the command line says of Ray. None: as much as there is, or what follows from the rest."""

    address: str | None = None
    nodes: int | None = None
    gpus_per_trial: float | None = None
    cpus_per_trial: int | None = None
    ranks_per_trial: int | None = None
    concurrent: int | None = None
    max_failures: int = 2


@contextmanager
def cluster(asked: Asked) -> Iterator[Any]:
    """Ray, connected to the cluster that is asked for, or one of this machine's own, which ends with the block. Raises UsageError."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = asked.address or os.environ.get("RAY_ADDRESS")
    if address is None and "RAY_AUTH_MODE" not in os.environ:  # Ray's ports are open to the network: who has no token cannot use them
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise errors.MissingPackageError("ray", "sweep", "a sweep") from None
    if address is not None:
        _check_reachable(address, NODES_WAIT_S if asked.nodes else 0.0)
    _init(ray, address)
    try:
        _wait_for_nodes(ray, asked.nodes or 1)
        yield ray
    finally:
        ray.shutdown()


def _init(ray: Any, address: str | None) -> None:
    # A bare init would join whatever cluster it finds.
    own = {} if address else {"include_dashboard": False, "object_store_memory": 100_000_000}
    for left in reversed(range(1 if address else STARTS)):
        if address is None:  # by itself Ray takes a port that others may be given before it listens there
            os.environ["RAY_GCS_SERVER_PORT"] = str(free_port())
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
            return
        except (ConnectionError, RuntimeError, ValueError) as error:
            ray.shutdown()
            if not left:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UsageError(f"no Ray cluster at {address or 'this machine'}: {reason}; start one: ray start --head") from None


def nodes_of(ray: Any) -> list[dict[str, float]]:
    """What the nodes of the cluster have: "CPU", "GPU"."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(nodes: list[dict[str, float]], taken: Resources) -> int:
    """How many ranks fit."""
    return sum(_bundles(node, taken) for node in nodes)


def resources(nodes: list[dict[str, float]], asked: Asked) -> Resources:
    """What each trial takes. Raises UsageError for what the nodes do not have."""
    cores, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    each_gpu = asked.gpus_per_trial if asked.gpus_per_trial is not None else min(1, gpus)
    ranks = asked.ranks_per_trial or max(1, math.ceil(each_gpu))
    if each_gpu < 0 or (each_gpu and (each_gpu / ranks > 1 or (ranks > 1 and each_gpu != ranks))):
        raise UsageError(
            f"--gpus-per-trial {each_gpu:g} with --ranks-per-trial {ranks}: each rank takes one GPU, and one rank alone may take a part of one; "
            f"type --gpus-per-trial {ranks}, or leave --ranks-per-trial out"
        )
    if asked.cpus_per_trial is not None and asked.cpus_per_trial < ranks:
        raise UsageError(f"--cpus-per-trial {asked.cpus_per_trial} is less than a core for each of {ranks} ranks; type {ranks} or more")
    share = cores // max(1, gpus) if each_gpu else 1  # a GPU's share of its node's cores
    cpus = (asked.cpus_per_trial or max(1, int(share * each_gpu)) * (1 if each_gpu else ranks)) // ranks
    taken = Resources(ranks, max(1, cpus), each_gpu / ranks)
    if room(nodes, taken) < ranks:
        there = f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} with {cores:.0f} cores and {gpus:.0f} GPUs in all"
        raise UsageError(
            f"a trial of {ranks} {'rank' if ranks == 1 else 'ranks'}, each with {taken.cpus} cores and {taken.gpus:g} GPUs, does not fit: "
            f"there are {there}; type smaller --gpus-per-trial, --cpus-per-trial or --ranks-per-trial"
        )
    return taken


def _bundles(node: dict[str, float], taken: Resources) -> int:
    """How many ranks a node has room for."""
    return int(min(node.get("CPU", 0) // taken.cpus, node.get("GPU", 0) / taken.gpus + 1e-9 if taken.gpus else math.inf))


def run(sweep: Sweep, searching: Search, taken: Resources, asked: Asked, stop: "Stop") -> list[Any]:
    """Trains what is left; Ray's results, one for each trial that it knew."""
    from ray import tune

    space = sweep.space
    scheduler = search.scheduler(space)
    bundle = {"CPU": taken.cpus} | ({"GPU": taken.gpus} if taken.gpus else {})
    group = tune.PlacementGroupFactory([bundle] * taken.ranks, strategy="PACK")
    tuner = tune.Tuner(
        tune.with_resources(trainable(sweep), group),
        param_space={name: tune.choice([""]) for name in (*space.axes, "seed")},  # columns of Ray's table
        tune_config=tune.TuneConfig(
            metric=space.metric, mode=space.mode, num_samples=sweep.trials, max_concurrent_trials=asked.concurrent, scheduler=scheduler,
            search_alg=_searcher(sweep, searching, stop), trial_name_creator=lambda trial: f"{trial.config['number']:03}",
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03}",
        ),
        run_config=tune.RunConfig(
            name=sweep.start, storage_path=str(Path(sweep.folder) / "ray"), verbose=1,
            failure_config=tune.FailureConfig(max_failures=asked.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's checkpoints are its training's
        ),
    )  # fmt: skip
    return list(tuner.fit())


def _searcher(sweep: Sweep, searching: Search, stop: "Stop") -> Any:
    """A search as Tune asks one."""
    from ray.tune.search import Searcher

    class Asked(Searcher):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(metric=None, mode=None)
            self.given: dict[str, Trial] = {}

        def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> dict[str, Any] | str:
            record_ends(sweep)
            trial = None if stop.code else searching.next()
            if trial is None:
                return str(Searcher.FINISHED)
            self.given[trial_id] = trial
            return {"number": trial.number, **trial.settings}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            trial, last = self.given[trial_id], result or {}
            outcome = None if error else last.get("outcome", STOPPED_EARLY)
            if result and outcome == STOPPED_EARLY:  # Tune says so before it asks the trial's worker to end
                (sweep.place(trial) / STOPPED).touch()
            searching.tell(trial.number, outcome if outcome in ENDS else None, last)

        def save(self, checkpoint_path: str) -> None:
            """What is left follows from the trials' folders."""

        def restore(self, checkpoint_path: str) -> None:
            """Never called."""

    return Asked()


def searching(sweep: Sweep) -> Search:
    """The sweep's search, which knows what earlier starts of the sweep have trained."""
    space, folder = sweep.space, Path(sweep.folder) / "trials"
    replay = space.scheduler != "none"  # a scheduler is told again what it has known of trials that have ended
    if space.search == "optuna":
        return search.Optuna(space, search.begun(folder), replay)
    return search.Listed([trial for trial in trials(space) if replay or ended(sweep.place(trial)) is None])


def unfinished(sweep: Sweep) -> int:
    """How many of the sweep's trials have not ended."""
    return sweep.trials - sum("outcome" in record for record in search.begun(Path(sweep.folder) / "trials").values())


def record_ends(sweep: Sweep) -> None:
    """Says in MLflow how trials have ended that could not say it themselves: one that a scheduler stops knows only of a signal."""
    for number, record in search.begun(Path(sweep.folder) / "trials").items():
        trial = Trial(number, record["settings"])
        done = sweep.place(trial) / RECORDED
        if record.get("outcome", FINISHED) == FINISHED or done.exists():
            continue
        with suppress(UsageError):  # a store that fails now may work at the next call
            reader = Reader(sweep.store(trial) or sweep.environment["MLFLOW_TRACKING_URI"])
            for run in reader.runs(sweep.experiment, f"tags.{SWEEP} = '{sweep.name}' and tags.{TRIAL} = '{number}'"):
                reader.tag(run, "outcome", record["outcome"])
            done.touch()


class Stop:
    """The wish to end the sweep, as a file that all trials see: each then keeps a checkpoint and ends. `code` is the exit code, 0 without a wish."""

    def __init__(self, file: Path) -> None:
        self.file, self.code = file, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self.file.unlink(missing_ok=True)
        self._before = {number: signal.signal(number, self._heard) for number in ASKED_BY}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:  # the second Ctrl-C
            raise KeyboardInterrupt
        self.code = self.code or (130 if number == signal.SIGINT else errors.AGAIN)
        self.file.touch()
        with suppress(OSError):
            os.write(2, b"\nsweep: stopping; every training keeps a checkpoint first (Ctrl-C again: at once)\n")


def _check_reachable(address: str, patience_s: float) -> None:
    """Raises UsageError for an address where nobody listens: Ray itself would try for minutes. `patience_s`: for a cluster that is being started."""
    if address in ("auto", "local") or "://" in address:
        return
    host, _, port = address.rpartition(":")
    limit = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host, int(port)), REACH_S).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > limit or isinstance(error, ValueError):
                reason = getattr(error, "strerror", None) or str(error) or "no answer"
                raise UsageError(
                    f"no Ray cluster answers at {address} ({reason}); give --address HOST:PORT as `ray start --head` prints it"
                ) from None
        time.sleep(0.5)


def _wait_for_nodes(ray: Any, count: int) -> None:
    limit = time.monotonic() + NODES_WAIT_S
    while (there := sum(node["Alive"] for node in ray.nodes())) < count:
        if time.monotonic() > limit:
            raise UsageError(f"only {there} of {count} nodes have joined the Ray cluster within {NODES_WAIT_S:.0f} s")
        time.sleep(0.5)
    found = ray.cluster_resources()
    print(f"sweep: {there} {'node' if there == 1 else 'nodes'}, {found.get('CPU', 0):.0f} cores, {found.get('GPU', 0):.0f} GPUs", flush=True)
