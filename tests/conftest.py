"""What every test starts from, and how a test starts DeepSpeed's launcher."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# Ops that tests need are built once per clone; those of the user's cache are taken where they fit.
os.environ.setdefault("DEEPSCALE_OPS_DIR", str(REPOSITORY / ".cache" / "ops"))

# What a job or a user may have set, and what would make a test depend on it.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GIT_DIR", "GIT_WORK_TREE")
FOREIGN_PREFIXES = ("MLFLOW_", "SLURM_")


# Of minutes each: begun first, so that no worker of `make test` is left with one when the others have nothing to do.
LONG = (
    "test_slurm",
    "test_sweep",
    "test_resume_ranks",
    "test_faults",
    "test_train",
    "test_nvme",
    "test_pipeline",
    "test_checkpoint_engines",
    "test_engine",
    "test_scaling",
    "test_bench",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of `LONG` before the others."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fixed seeds; torch's threads, default dtype and process group as before; no settings of a tracker or a job."""
    for name in list(os.environ):
        if name in FOREIGN or name.startswith(FOREIGN_PREFIXES):
            monkeypatch.delenv(name)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, dtype, deterministic = torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    """For tests that run the command in this process, which answers Ctrl-C and SIGTERM in its own way."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and no experiment of ours: creating the tables takes 2 s, copying them nothing."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def in_tmp_path(tmp_path: Path) -> Iterator[Path]:
    """The test works in its own folder, so that a tracking database or data lands there."""
    with chdir(tmp_path):  # left before pytest removes it: what is imported later may ask where it is
        yield tmp_path


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def end_group(process: "subprocess.Popen[str]") -> None:
    """Kills a process with everything it started, whatever groups these are in."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()


class Finished(NamedTuple):
    """A command that ended: its exit code, and standard output and error as one text."""

    returncode: int
    output: str


Launch = Callable[..., Finished]


def run(command: list[str], *, cwd: Path, timeout_s: float, environment: dict[str, str] | None = None) -> Finished:
    """Runs a command without terminal and input; on a time-out all its processes are killed and the test fails with its output."""
    settings = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(environment or {})}
    process = subprocess.Popen(
        command, cwd=cwd, env=settings, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end_group(process)
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(command)} did not end within {timeout_s:.0f} s; its output:\n{output}")
    finally:
        end_group(process)
    return Finished(process.returncode, output)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """`launch("--depth", "26", ranks=2)` runs `deepspeed --num_gpus 2 deepscale/train.py --depth 26` on the CPU, in tmp_path.

    Further keywords: `script` (another file than train.py), `timeout_s`, `cwd`, `environment` (added to the test's own).
    """

    def start(
        *arguments: str,
        ranks: int = 1,
        script: Path | None = None,
        timeout_s: float = 240.0,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Finished:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(free_port())]
        command = [*launcher, str(script or REPOSITORY / "deepscale" / "train.py"), *arguments]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return run(command, cwd=cwd or tmp_path, timeout_s=timeout_s, environment={"PATH": path, **(environment or {})})

    return start


def run_ranks(worker: str, cases: list[Any], folder: Path, ranks: int, timeout_s: float) -> tuple[list[Any], list[str]]:
    """Runs `tests/worker cases.json results` on some ranks, without the launcher: what each rank saved to results.RANK, and printed."""
    file, target = folder / "cases.json", folder / "results"
    file.write_text(json.dumps(cases))
    clean = {name: value for name, value in os.environ.items() if name not in FOREIGN and not name.startswith(FOREIGN_PREFIXES)}
    clean |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(REPOSITORY / "tests" / worker), str(file), str(target)]
    processes = [
        subprocess.Popen(
            command, env={**clean, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            end_group(process)
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    return [torch.load(f"{target}.{rank}", weights_only=False) for rank in range(ranks)], outputs
