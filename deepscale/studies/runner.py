"""Runs the rows of a study that are missing: several at a time, each in fresh processes that are forked from one that has imported everything.

What is half done goes on from its checkpoint (train.py's --resume auto). A row's file is written as soon as it ends; a loss that is not finite
and memory that runs out are results. Ctrl-C and SIGTERM let every training keep a checkpoint.
"""

import json
import math
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from deepscale import config, errors
from deepscale.errors import UsageError
from deepscale.studies import row, stored
from deepscale.studies.row import Job
from deepscale.studies.stored import Key
from deepscale.studies.study import Case, Phase, Results, Study
from deepscale.sweeps import values
from deepscale.sweeps.programs import ENDS, INTERRUPTED, PATIENCE_S, REFUSED, WORLD, how, last_words, wait_for_predecessor
from deepscale.sweeps.tags import FINISHED
from deepscale.tracking_store import store_uri

FAILED, ELSEWHERE = "failed", "elsewhere"
POLL_S = 0.1


@dataclass(frozen=True)
class End:
    """How a row of this start has ended: an outcome (tags.ENDED), or one of the words above; text: why, where it has no result."""

    job: Job
    outcome: str
    text: str = ""


def missing(
    study: Study, scale: str, found: Results, folder: Path, files: Path, seeds: Sequence[int] = (), only: str | None = None,
    free: dict[str, str] | None = None,
) -> list[Job]:  # fmt: skip
    """The rows that are to be run, all cases with the first seed first. Raises UsageError for settings that train.py would refuse."""
    own = study.scale(scale)
    cases = [study.case(only)] if only else list(study.of_scale(scale))
    if own.sweep is not None:
        return []
    done = {(name, one.seed) for name, group in found.groups.items() for one in group.rows}
    wanted = [(case, seed) for i, seed in enumerate(seeds or own.seeds) for case in cases if only or not (i and case.name in own.once)]
    jobs = [_job(study, scale, case, seed, folder, files, free or {}) for case, seed in wanted if (case.name, seed) not in done]
    for job in jobs:
        for i, phase in enumerate(job.phases):
            try:
                for name in phase.settings:
                    values.setting(name)
                config.parse(job.arguments(i))
            except UsageError as error:
                raise UsageError(f"study {study.name}, {' '.join(f'{job.key} {phase.name}'.split())}: {error}") from None
    return jobs


def _job(study: Study, scale: str, case: Case, seed: int, folder: Path, files: Path, free: dict[str, str]) -> Job:
    key = Key(study.name, scale, case.name, seed)
    phases: tuple[Phase, ...] = ()
    if case.compute is None:
        phases = tuple(Phase(phase.name, study.settings(scale, case, phase)) for phase in case.phases or (Phase("", {}),))
    return Job(
        key, case, study.settings(scale, case), phases, stored.typed(study, scale, case), free, (folder / study.name / key.name).absolute(),
        stored.path_of(files, key).absolute(), study.converged, tuple(study.columns), study.curves, study.profiles,
    )  # fmt: skip


class Runner:
    """Runs jobs. say: what is told of each as it starts and ends."""

    def __init__(self, jobs: Sequence[Job], concurrent: int, say: Callable[[str], None]) -> None:
        self.jobs, self.say, self.count = jobs, say, 0
        self.code, self.hopeless = 0, False
        self.limit = math.inf  # when a row that was asked to end is ended
        self.processes: set[Any] = set()
        self.lock = threading.Lock()
        gpus = _gpus()
        # A process that has asked for a GPU cannot be forked.
        self.context: Any = multiprocessing.get_context("spawn" if gpus else "forkserver")
        if not gpus:
            self.context.set_forkserver_preload(
                ["deepscale.studies.row", "deepscale.studies.warm_training" if any(job.phases for job in jobs) else "deepscale.studies.warm"]
            )
        self.concurrent = max(1, min(concurrent, len(jobs)))
        self.slots: queue.SimpleQueue[str] = queue.SimpleQueue()
        for i in range(self.concurrent):
            self.slots.put(gpus[i % len(gpus)] if gpus else "")
        self.environment = {name: value for name, value in os.environ.items() if name not in WORLD}
        self.environment |= {"MLFLOW_TRACKING_URI": store_uri(), "PYTHONUNBUFFERED": "1"}

    def __call__(self) -> list[End]:
        """Runs all; how each has ended, in their order. After a wish to end the rest is INTERRUPTED."""
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            with ThreadPoolExecutor(self.concurrent) as pool:
                ends: list[Future[End]] = [pool.submit(self._row, job) for job in self.jobs]
                while not all(end.done() for end in ends):  # Python answers signals between two looks
                    time.sleep(POLL_S)
                return [end.result() for end in ends]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:  # the second Ctrl-C
            for process in list(self.processes):
                process.kill()
            return
        self.limit = time.monotonic() + PATIENCE_S
        self.code = 130 if number == signal.SIGINT else errors.AGAIN
        self.say("stopping; every training keeps a checkpoint first (Ctrl-C again: at once)")
        for process in list(self.processes):
            process.terminate()

    def _row(self, job: Job) -> End:
        """One row from its start to its file."""
        from filelock import FileLock, Timeout

        if self.code or self.hopeless:
            return End(job, INTERRUPTED)
        job.folder.mkdir(parents=True, exist_ok=True)
        lock, slot, begin = FileLock(job.folder / "lock"), self.slots.get(), time.monotonic()
        try:
            with lock.acquire(timeout=0):
                end = self._run(job, slot)
        except Timeout:
            end = End(job, ELSEWHERE, f"another process trains it, in {job.folder}")
        finally:
            self.slots.put(slot)
        with self.lock:
            self.count += 1
            told = f"{end.outcome.replace('_', ' ')}{f': {end.text}' if end.text else ''}"
            self.say(f"{self.count} of {len(self.jobs)}: {job.key}: {told} ({time.monotonic() - begin:.0f} s)")
            # What the first row of all is refused for, the others will be too: a data set that is not there.
            self.hopeless = self.hopeless or (end.outcome == REFUSED and self.count == 1)
        return end

    def _run(self, job: Job, slot: str) -> End:
        ended = FINISHED
        for i, phase in enumerate(job.phases):
            wait_for_predecessor(job.place(phase))
            code = self._process(job, slot, row.train, job.arguments(i))
            if code not in ENDS:
                return self._without_result(job, code)
            ended = ENDS[code]
            if ended != FINISHED:
                break
        if code := self._process(job, slot, row.complete, (job, ended)):
            return self._without_result(job, code)
        for phase in job.phases:
            for checkpoint in job.place(phase).glob("step-*"):  # the trained weights stay beside them
                shutil.rmtree(checkpoint, ignore_errors=True)
        return End(job, str(json.loads(job.file.read_text())["outcome"]))

    def _without_result(self, job: Job, code: int) -> End:
        if self.code or code in (errors.AGAIN, 130):
            return End(job, INTERRUPTED)
        text = last_words(job.output)
        if code == UsageError.exit_code:
            return End(job, REFUSED, text)
        return End(job, FAILED, f"it ended {how(code)}: {text} (all of it: {job.output})")

    def _process(self, job: Job, slot: str, main: Callable[..., None], given: Any) -> int:
        """Runs a process to its end; its exit code."""
        environment = self.environment | ({"CUDA_VISIBLE_DEVICES": slot} if slot else {})
        process = self.context.Process(target=row.become, args=(job.output, environment, main, given))
        with self.lock:
            if self.code:
                return errors.AGAIN
            process.start()
            self.processes.add(process)
        while process.exitcode is None:
            process.join(POLL_S)
            if time.monotonic() > self.limit:
                process.kill()
        self.processes.discard(process)
        return int(process.exitcode)


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(i) for i in range(count)])[:count]
