"""Training runs as processes that a test can hurt: started rank by rank or by DeepSpeed's launcher, found again by a mark in their environment.

Not a test: test_faults.py and soak.py use it.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from conftest import FOREIGN, FOREIGN_PREFIXES, REPOSITORY, free_port

MARK = "DEEPSCALE_TEST_JOB"
TRAIN = str(REPOSITORY / "deepscale" / "train.py")
TINY = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "16", "--eval-images", "40",
    "--threads", "1", "--device", "cpu", "--kernel", "torch",
]  # fmt: skip


def clean_environment() -> dict[str, str]:
    """Of a run on the CPU with one thread, without what a job or a user may have set."""
    clean = {name: value for name, value in os.environ.items() if name not in FOREIGN and not name.startswith(FOREIGN_PREFIXES)}
    return clean | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Job:
    """One run: `ranks` processes of `deepscale/train.py`, or with `launcher` what `deepspeed --num_gpus ranks` makes of it."""

    def __init__(
        self, folder: Path, *arguments: str, ranks: int = 1, launcher: bool = False, script: str = TRAIN, environment: dict[str, str] | None = None
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.log = folder / f"log-{self.mark[:8]}"
        port = str(free_port())
        clean = clean_environment() | {MARK: self.mark}
        clean |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}", **(environment or {})}
        if launcher:
            commands = [["deepspeed", "--num_gpus", str(ranks), "--master_port", port, script, *arguments]]
            own: list[dict[str, str]] = [{}]
        else:
            commands = [[sys.executable, script, *arguments]] * ranks
            place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        with self.log.open("w") as output:
            self.processes = [
                subprocess.Popen(
                    command, cwd=folder, env=clean | more, start_new_session=True, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
                for command, more in zip(commands, own, strict=True)
            ]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def text(self) -> str:
        """What the run has printed so far."""
        return self.log.read_text(errors="replace")

    def said(self, start: str) -> list[str]:
        """The lines that begin so."""
        return [line for line in self.text().splitlines() if line.startswith(start)]

    def alive(self) -> dict[int, str]:
        """The living processes of the run, whoever started them: number -> RANK, "" for what is no rank. Zombies are not alive."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # ended meanwhile, or another user's
                    variables = dict(part.partition("=")[::2] for part in (entry / "environ").read_text(errors="replace").split("\0"))
                    if variables.get(MARK) == self.mark and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                        found[int(entry.name)] = variables.get("RANK", "")
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        return next(process for process, rank in self.alive().items() if rank == str(number))

    def until(self, reached: Callable[[], Any], timeout_s: float = 120.0) -> None:
        """Waits until something is so."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert any(process.poll() is None for process in self.processes), f"the run ended:\n{self.text()}"
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s:\n{self.text()}"
            time.sleep(0.02)

    def until_said(self, words: str, timeout_s: float = 120.0) -> None:
        """Waits until the run has printed something."""
        self.until(lambda: words in self.text(), timeout_s)

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """A signal to these ranks, or to all processes of the run."""
        for process, rank in self.alive().items():
            if ranks is None or rank in map(str, ranks):
                with suppress(ProcessLookupError):
                    os.kill(process, number)

    def end(self, timeout_s: float = 120.0) -> list[int]:
        """Waits for the end; the exit codes of what was started, below 0 for a signal."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"the run did not end within {timeout_s:.0f} s:\n{self.text()}") from None
        return [process.returncode for process in self.processes]

    def orphans(self, patience_s: float = 5.0) -> dict[int, str]:
        """What is alive though the run has ended, after some patience."""
        deadline = time.monotonic() + patience_s
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def kill(self) -> None:
        """Ends everything that is left."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
