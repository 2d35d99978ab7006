"""Measuring in fresh processes: a program of this package is started, and prints its result as JSON in its last line."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deepscale.errors import DeepscaleError, UsageError
from deepscale.sweeps.programs import WORLD
from deepscale.world import free_port

TAIL_LINES = 15
SENTENCE = "deepscale: "  # errors.py's mark of a known error


class BenchError(DeepscaleError):
    """A measuring process failed; the message says how, and shows the end of its output."""


def run_worker(module: str, options: Mapping[str, object], *, threads: int, limit_s: float, accelerator: str = "cpu") -> dict[str, Any]:
    """The result of `python -m module --name value ...` in a process of its own with `threads` threads of computation, on `accelerator`
    ("cpu" or "cuda").

    Raises BenchError where it fails or takes longer than `limit_s` seconds; a UsageError of the process stays one.
    """
    return _finished(*start_of(module, options, threads, accelerator), limit_s)


def _finished(command: list[str], environment: Mapping[str, str], shown: str, limit_s: float) -> dict[str, Any]:
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=limit_s)
    except subprocess.TimeoutExpired as expired:
        output = "".join(part.decode(errors="replace") if isinstance(part, bytes) else part or "" for part in (expired.stdout, expired.stderr))
        raise BenchError(f"{shown} did not end within {limit_s:.0f} s; type a longer --time-limit or smaller sizes{tail(output)}") from None
    return result_of(shown, done)


def run_ranks(module: str, options: Mapping[str, object], *, ranks: int, threads: int, limit_s: float) -> dict[str, Any]:
    """The same with several processes that are the ranks of one world; the result is rank 0's.

    The first rank that fails ends the others, which would wait for it.
    """
    command, environment, shown = start_of(module, options, threads, "cpu")
    environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(2 * ranks)]
        processes = [
            subprocess.Popen(
                command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, text=True,
                stdin=subprocess.DEVNULL, stdout=outputs[2 * r], stderr=outputs[2 * r + 1],
            )
            for r in range(ranks)
        ]  # fmt: skip
        begin = time.monotonic()
        try:
            while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
                if time.monotonic() - begin > limit_s:
                    raise BenchError(f"{shown} did not end within {limit_s:.0f} s; type a longer --time-limit or smaller sizes")
                time.sleep(0.05)
            failed = next((r for r, process in enumerate(processes) if process.poll()), None)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = []
        for output in outputs:
            output.seek(0)
            texts.append(output.read())
    chosen = failed or 0
    done = subprocess.CompletedProcess(command, processes[chosen].returncode, texts[2 * chosen], texts[2 * chosen + 1])
    return result_of(shown if failed is None else f"rank {failed} of {shown}", done)


def run_here(module: str, options: Mapping[str, object], *, number: int, threads: int, limit_s: float) -> dict[str, Any]:
    """The same as one rank of the world that the environment describes (torchrun, srun): every rank must call it, with the same `number`, a
    new one for each call, which moves the rendezvous to a port of its own. The result is this rank's.
    """
    command, environment, shown = start_of(module, options, threads, "")
    environment |= {name: os.environ[name] for name in WORLD if name in os.environ}
    environment |= {"MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + number)}
    # torchrun's own agent keeps the store at its port; at another one rank 0 must do so.
    environment = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")}
    return _finished(command, environment, shown, limit_s)


def start_of(module: str, options: Mapping[str, object], threads: int, accelerator: str) -> tuple[list[str], dict[str, str], str]:
    """(command, environment, how to show it) of a measuring process; without an `accelerator` DeepSpeed finds its own."""
    # -P: the working folder is no place of packages. The package's own is, where it is used without being installed.
    command = [sys.executable, "-P", "-m", module]
    command += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name not in WORLD}
    paths = [environment.get("PYTHONPATH", ""), str(Path(__file__).resolve().parents[2])]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(threads)}
    environment |= {"DS_ACCELERATOR": accelerator} if accelerator else {}
    return command, environment, shlex.join(["python", *command[2:]])


def result_of(shown: str, done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """What a process that has ended printed in its last line. Raises BenchError, or its own UsageError."""
    if done.returncode:
        raise _failure(shown, done)
    try:
        result = json.loads((done.stdout.strip().splitlines() or [""])[-1])
    except json.JSONDecodeError:
        result = None
    if not isinstance(result, dict):
        raise BenchError(f"{shown} printed no result in its last line{tail(done.stdout + done.stderr)}")
    return result


def _failure(shown: str, done: "subprocess.CompletedProcess[str]") -> DeepscaleError:
    """The error of a process that ended badly: its own sentence where it has one."""
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == UsageError.exit_code and last.startswith(SENTENCE):
        return UsageError(last.removeprefix(SENTENCE))
    how = f"ended with exit code {done.returncode}"
    if done.returncode < 0:
        how = f"was killed by {signal.Signals(-done.returncode).name}"
        how += " (the memory may not suffice: type smaller sizes)" if done.returncode == -signal.SIGKILL else ""
    return BenchError(f"{shown} {how}{tail(done.stdout + done.stderr)}")


def tail(output: str) -> str:
    """The last lines of what a process has printed, to follow the sentence that it failed."""
    lines = output.strip().splitlines()[-TAIL_LINES:]
    return "; the end of its output:\n" + "\n".join(f"  {line}" for line in lines) if lines else "; it printed nothing"
