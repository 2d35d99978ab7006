"""One trial of a sweep inside Ray: its ranks as processes, what they validate told to Tune, and its end.

Ranks are programs of their own, `python -m deepscale.train ...`, as from any launcher: a training has its own signals, exit codes and
memory. Rank 0 is started by the worker that Ray gives the trial, every other one by an actor in the bundle of its cores and GPU.

    SWEEP/trials/007-activation=gelu_seed=1/
        trial.json       its number and settings
        output.txt       what rank 0 has said; output-1.txt of rank 1, and so on
        metrics.jsonl    its validations, which are told to Tune
        checkpoints/     it goes on from here
        ended.json       how it ended, once there is nothing left to train
"""

import dataclasses
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepscale import errors
from deepscale.files import atomic
from deepscale.sweeps import values
from deepscale.sweeps.programs import ENDS, INTERRUPTED, PATIENCE_S, REFUSED, WORLD, how, last_words, wait_for_predecessor
from deepscale.sweeps.search import BEGUN, ENDED
from deepscale.sweeps.space import Space, Trial, training_arguments
from deepscale.sweeps.tags import FINISHED, NON_FINITE, OUT_OF_MEMORY, STOPPED_EARLY, tags

TOLD = ("step", "val/accuracy", "val/loss", "test/accuracy")
STOP = "stop"  # in the sweep's folder
STOPPED = "stopped"  # in a trial's: the scheduler has stopped it
# Whatever ends Ray's worker asks the training to stop, which then keeps a checkpoint.
END_WITH_PARENT = ["setpriv", "--pdeathsig", "TERM"]
POLL_S = 0.2
OTHERS_S = 10.0  # for the other ranks to see by themselves that one has gone, and for rank 0 to close the record
PORTS = (20_000, 30_000)  # below those that the system gives away by itself


class Unwritten(dict[str, str]):
    """Variables of the environment, passwords among them: what pickles it, as Tune does with all that it is given, writes down an empty one."""

    def __reduce__(self) -> Any:
        return Unwritten, ()


@dataclass(frozen=True)
class Sweep:
    """What all trials of a sweep have in common. `ranks` of `threads` cores each; `start` tells one start of the sweep from another."""

    space: Space
    name: str
    experiment: str
    folder: str
    working_folder: str
    environment: Unwritten
    trials: int
    start: str
    ranks: int = 1
    threads: int = 1
    own_stores: bool = False

    def place(self, trial: Trial) -> Path:
        """The trial's folder, which all nodes see."""
        return Path(self.folder) / "trials" / trial.folder

    @property
    def stop_file(self) -> Path:
        """Exists from when somebody asks the sweep to end."""
        return Path(self.folder) / STOP

    def store(self, trial: Trial) -> str | None:
        """The address of a store of the trial's own; None where all have the one of the environment."""
        return f"sqlite:///{self.place(trial) / 'mlflow.db'}" if self.own_stores else None

    def command(self, trial: Trial) -> list[str]:
        """What is typed for the trial."""
        named = {
            "experiment": self.experiment,
            "run-name": f"{self.name} {trial.label}",
            "tags": ",".join(f"{name}={value}" for name, value in tags(self.name, self.space, trial.number, self.trials).items()),
            "checkpoint-dir": str(self.place(trial) / "checkpoints"),
            "resume": "auto",
        }
        before = ["--threads", str(self.threads), "--checkpoint-every", "10m", "--keep", "1"]  # what the space says comes later and wins
        typed = training_arguments(self.space, trial.settings)
        return ["-m", "deepscale.train", *before, *typed, *(word for name, value in named.items() for word in (f"--{name}", value))]


def ended(place: Path) -> str | None:
    """How a trial ended, None while there is something left to train."""
    try:
        return str(json.loads((place / ENDED).read_text())["outcome"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Rank:
    """The process of one rank, on the node of whoever holds this object. An actor where that is another bundle of the trial."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def where(self) -> tuple[str, str, list[str]]:
        """(node, its address, its GPUs that Ray has given this bundle)."""
        import ray

        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] if ray.get_gpu_ids() else []
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), gpus

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: str, output: str) -> None:
        """Starts the training, which ends when this process does."""
        own = {name: value for name, value in os.environ.items() if name not in WORLD} | dict(environment)
        with open(output, "ab") as file:
            self.process = subprocess.Popen(
                [*END_WITH_PARENT, sys.executable, *command], cwd=folder, env=own, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return None if self.process is None else self.process.poll()

    def send(self, number: int) -> None:
        """Sends a signal."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


class Training:
    """The ranks of a trial from their start to their end; `validated` waits for what is to be told to Tune."""

    def __init__(self, sweep: Sweep, trial: Trial) -> None:
        self.sweep, self.trial, self.place = sweep, trial, sweep.place(trial)
        self.metrics, self.told = self.place / "metrics.jsonl", self.place / "told"
        self.last: dict[str, Any] = {}
        self.read_bytes, self.outcome = 0, ended(self.place)
        self.told_step = self._told_step()
        self.steps = _steps(sweep.space)
        self.ranks: list[Any] = []
        if self.outcome is None and not sweep.stop_file.exists():
            self._write(BEGUN)
            (self.place / STOPPED).unlink(missing_ok=True)
            wait_for_predecessor(self.place / "checkpoints")
            self._start()

    def _start(self) -> None:
        self.ranks = [Rank(), *(_remote_rank(bundle) for bundle in range(1, self.sweep.ranks))]
        places = [_call(rank, "where") for rank in self.ranks]
        nodes = [node for node, _, _ in places]
        address = "127.0.0.1" if len(set(nodes)) == 1 else places[0][1]
        port, store = free_port(), self.sweep.store(self.trial)
        for number, (rank, (node, _, _)) in enumerate(zip(self.ranks, places, strict=True)):
            gpus = [gpu for other, _, own in places if other == node for gpu in own]
            variables = {
                **self.sweep.environment, **({"MLFLOW_TRACKING_URI": store} if store else {}),
                "RANK": str(number), "WORLD_SIZE": str(len(nodes)), "LOCAL_RANK": str(nodes[:number].count(node)),
                "LOCAL_WORLD_SIZE": str(nodes.count(node)), "MASTER_ADDR": address, "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(self.sweep.threads), "DEEPSCALE_METRICS": str(self.metrics), "PYTHONUNBUFFERED": "1",
            }  # fmt: skip
            # NCCL and torch count a node's GPUs alike on all of its ranks.
            variables |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
            output = self.place / ("output.txt" if number == 0 else f"output-{number}.txt")
            _call(rank, "start", self.sweep.command(self.trial), variables, self.sweep.working_folder, str(output))

    def validated(self) -> dict[str, Any]:
        """Waits for the next validation, or for the end: what Tune is told, with "done" and "outcome" at the end.

        Raises RuntimeError for a training that failed and may be tried again.
        """
        failed_at: float | None = None
        while True:
            if self.sweep.stop_file.exists() and self.outcome is None:
                self.end()
                return self._result(INTERRUPTED)
            codes = self._codes()  # before the file is read: what was written until then is in it
            if self._next_line():
                return dict(self.last)
            if None not in codes:
                return self._ended([code or 0 for code in codes])
            if any(codes):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > OTHERS_S:
                    self.end()
            time.sleep(POLL_S)

    def end(self) -> None:
        """Asks every rank to stop, and waits for it."""
        limit = time.monotonic() + PATIENCE_S
        self._send(signal.SIGTERM)
        while None in self._codes():
            if time.monotonic() > limit:
                self._send(signal.SIGKILL)
            time.sleep(POLL_S)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            with suppress(Exception):  # its node is gone
                _call(rank, "send", number)

    def _codes(self) -> list[int | None]:
        """Exit codes of the ranks so far; of one whose node is gone as if it were killed."""
        codes: list[int | None] = []
        for rank in self.ranks:
            try:
                codes.append(_call(rank, "code"))
            except Exception:
                codes.append(-signal.SIGKILL)
        return codes

    def close(self) -> None:
        """The end of the trial, whether its training has ended, the scheduler has stopped it, or Ray has failed."""
        try:
            if None in self._codes():
                self.end()
            if self.outcome is None and (self.place / STOPPED).exists():
                self._keep(FINISHED if set(self._codes()) == {0} else STOPPED_EARLY)
        finally:
            for rank in self.ranks[1:]:
                _kill_actor(rank)

    def _ended(self, codes: list[int]) -> dict[str, Any]:
        """The last that Tune is told."""
        if self.outcome is not None:  # of a trial that ended before this start of the sweep
            return self._result(self.outcome)
        code = next((code for code in codes if ENDS.get(code, FINISHED) != FINISHED), None) or next((code for code in codes if code), 0)
        if code in ENDS:
            self._keep(ENDS[code])
            return self._result(ENDS[code])
        if code == errors.AGAIN and self.sweep.stop_file.exists():
            return self._result(INTERRUPTED)
        text = f"the training ended {how(code)}: {last_words(self.place / 'output.txt')} (all of it: {self.place / 'output.txt'})"
        if code == errors.UsageError.exit_code:  # would be refused again
            return self._result(REFUSED) | {"error": text}
        raise RuntimeError(text)

    def _result(self, outcome: str) -> dict[str, Any]:
        metric = self.sweep.space.metric
        told = {"step": 0, metric: math.nan} | self.last
        if outcome in (NON_FINITE, OUT_OF_MEMORY, REFUSED):
            told[metric] = math.nan
        return told | {"done": True, "outcome": outcome}

    def _keep(self, outcome: str) -> None:
        self.outcome = outcome
        self._write(ENDED, outcome=outcome, last=self.last)

    def _write(self, name: str, **more: Any) -> None:
        with atomic(self.place / name) as path:
            path.write_text(json.dumps({"number": self.trial.number, "settings": self.trial.settings, **more}))

    def _next_line(self) -> bool:
        """Takes the next line that holds the metric and that Tune does not know; whether there was one."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(self.read_bytes)
                lines = file.readlines()
        except OSError:
            return False
        for line in lines:
            if not line.endswith(b"\n"):  # is being written
                break
            self.read_bytes += len(line)
            with suppress(ValueError):  # the writer was killed within it
                said = json.loads(line)
                self.last |= {name: said[name] for name in TOLD if name in said}
                if self.sweep.space.metric in said and self.told_step < said["step"] < self.steps:
                    self.told_step = said["step"]
                    self.told.write_text(f"{self.sweep.start} {self.told_step}")
                    return True
        return False

    def _told_step(self) -> int:
        """Up to where Tune knows the validations: a try that failed has told it, another start of the sweep has not."""
        try:
            start, step = self.told.read_text().split()
        except (OSError, ValueError):
            return 0
        return int(step) if start == self.sweep.start else 0


def trainable(sweep: Sweep) -> type:
    """The class that Tune makes an actor of for each trial, in a worker that imports neither torch nor DeepSpeed.

    Tune keeps the class in a file; the environment goes through Ray's memory instead.
    """
    import ray
    from ray import tune

    environment = ray.put(dict(sweep.environment))

    class SweepTrial(tune.Trainable):  # type: ignore[misc]
        """A trial: one step of it is one validation."""

        def setup(self, config: dict[str, Any]) -> None:
            settings = {name: value for name, value in config.items() if name != "number"}
            whole = dataclasses.replace(sweep, environment=Unwritten(ray.get(environment)))
            self.training = Training(whole, Trial(config["number"], settings))

        def step(self) -> dict[str, Any]:
            return self.training.validated()

        def cleanup(self) -> None:
            self.training.close()

    return SweepTrial


def _steps(space: Space) -> float:
    """The step whose validation is told with the end, so that no scheduler stops a training that is complete; inf where it is not known."""
    given = values.value("max_steps", space.fixed["max_steps"]) if "max_steps" in space.fixed else None
    return math.inf if given is None else int(given)


def free_port() -> int:
    """A TCP port that nobody listens on now, out of a range that no outgoing connection takes meanwhile."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def _remote_rank(bundle: int) -> Any:
    """A `Rank` in this bundle of the trial's placement group."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    resources = group.bundle_specs[bundle]
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    options = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "max_restarts": 0, "scheduling_strategy": strategy}
    return ray.remote(Rank).options(**options).remote()


def _call(rank: Any, method: str, *arguments: Any) -> Any:
    if isinstance(rank, Rank):
        return getattr(rank, method)(*arguments)
    import ray

    return ray.get(getattr(rank, method).remote(*arguments), timeout=PATIENCE_S)


def _kill_actor(rank: Any) -> None:
    import ray

    with suppress(Exception):
        ray.kill(rank)
