"""Training runs as processes that can be hurt: forked from one that has imported everything (warm.py), so that a start costs little.

Not a test: test_faults.py and soak.py use it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from conftest import FOREIGN, FOREIGN_PREFIXES, REPOSITORY, free_port

TINY = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "16", "--eval-images", "40",
    "--threads", "1", "--device", "cpu", "--kernel", "torch",
]  # fmt: skip


def clean_environment() -> dict[str, str]:
    """Of a run on the CPU with one thread, without what a job or a user may have set."""
    clean = {name: value for name, value in os.environ.items() if name not in FOREIGN and not name.startswith(FOREIGN_PREFIXES)}
    return clean | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Server:
    """A process that forks trainings (warm.py)."""

    def __init__(self) -> None:
        script = str(REPOSITORY / "tests" / "warm.py")
        self.process = subprocess.Popen(
            [sys.executable, script], env=clean_environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.codes: dict[int, int] = {}
        self.started: list[int] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line) if line.startswith("{") else {}
            if "ended" in said:
                self.codes[said["ended"]] = said["code"]
            elif "started" in said:
                self.started.append(said["started"])

    def fork(self, job: dict[str, Any]) -> int:
        """Starts a training; its process."""
        assert self.process.stdin is not None
        before = len(self.started)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        while len(self.started) == before:
            assert self.process.poll() is None, "warm.py has ended"
            time.sleep(0.001)
        return self.started[-1]

    def close(self) -> None:
        """Ends the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Started:
    """One start of a run: its ranks, whose sessions tell their descendants."""

    def __init__(
        self, server: Server, folder: Path, arguments: Sequence[str], ranks: int = 1, environment: dict[str, str] | None = None, script: str = ""
    ) -> None:
        self.server, self.folder, self.begin = server, folder, time.monotonic()
        self.log = folder / f"log-{time.time_ns()}"
        self.log.touch()
        self.phases = [folder / f"phase-{rank}" for rank in range(ranks)]
        for phase in self.phases:
            phase.unlink(missing_ok=True)
        place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = []
        for rank, phase in enumerate(self.phases):
            variables = clean_environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {})
            job = {
                "arguments": list(arguments),
                "environment": variables,
                "script": script,
                "folder": str(folder),
                "log": str(self.log),
                "phase": str(phase),
            }
            self.ranks.append(server.fork(job))

    def at(self) -> tuple[int, str]:
        """(step, phase) of rank 0; (0, "start") before there is one."""
        try:
            step, phase = self.phases[0].read_text().strip().split(" ", 1)
        except (OSError, ValueError):
            return 0, "start"
        return int(step), {"checkpoint": "checkpoint", "evaluation": "evaluation"}.get(phase, "step")

    def ended(self) -> bool:
        """Whether every rank has."""
        return all(rank in self.server.codes for rank in self.ranks)

    def wait(self, timeout_s: float) -> bool:
        """Whether every rank ends within this time."""
        deadline = time.monotonic() + timeout_s
        while not self.ended():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def as_launcher(self, patience_s: float) -> None:
        """Ends the other ranks when one has ended, as DeepSpeed's launcher and srun do: SIGTERM, and after some patience SIGKILL."""
        while not any(self.codes()) and not self.ended():
            time.sleep(0.005)
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.send(number)
            if self.wait(patience_s):
                return

    def codes(self) -> list[int | None]:
        """Exit codes, below 0 for a signal."""
        return [self.server.codes.get(rank) for rank in self.ranks]

    def alive(self) -> list[int]:
        """Living processes of the ranks' sessions: themselves, and whatever they started."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                except OSError:
                    continue
                if int(session) in self.ranks and state != "Z":
                    found.append(int(entry.name))
        return found

    def text(self) -> str:
        """What the run has printed so far."""
        return self.log.read_text(errors="replace")

    def said(self, start: str) -> list[str]:
        """The lines that begin so."""
        return [line for line in self.text().splitlines() if line.startswith(start)]

    def until_said(self, words: str, times: int = 1, timeout_s: float = 120.0) -> None:
        """Waits until the run has printed something so often."""
        deadline = time.monotonic() + timeout_s
        while self.text().count(words) < times:
            assert not self.ended(), f"the run ended:\n{self.text()}"
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s:\n{self.text()}"
            time.sleep(0.01)

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """A signal to these ranks, or to all."""
        for rank, process in enumerate(self.ranks):
            if (ranks is None or rank in ranks) and process not in self.server.codes:
                os.kill(process, number)

    def end(self, timeout_s: float = 120.0) -> list[int | None]:
        """Waits for the end; the exit codes. Nothing may be left."""
        assert self.wait(timeout_s), f"the run did not end within {timeout_s:.0f} s:\n{self.text()}"
        assert self.alive() == [], "processes are left"
        return self.codes()

    def kill(self) -> None:
        """Ends everything that is left."""
        for process in self.alive():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
