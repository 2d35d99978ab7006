"""What a run leaves open, and what it writes down: no port but on loopback, no shell, no secret."""

import ast
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from conftest import REPOSITORY, end_group, free_port
from torch.distributed import DistNetworkError

from deepscale import rendezvous, tracking, world
from deepscale.config import EngineConfig
from deepscale.errors import UsageError
from deepscale.tracking_store import shown

SMALL = ("--dataset", "synthetic", "--depth", "26", "--width", "4", "--patch-size", "4", "--batch-size", "16", "--max-steps", "3")
QUICK = ("--precision", "fp32", "--activations", "keep", "--kernel", "torch", "--zero", "1", "--feed", "tensors", "--eval-images", "16")
# A name that a shell would obey, and that is no good for a folder either.
RUN_NAME = "; touch sprung $(touch sprung2) `touch sprung3` ../../out 'x\" && exit 7"
SECRETS = {
    name: f"secret-{index}-of-this-test"
    for index, name in enumerate(("MY_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "DATABASE_URL"))
}


class Ended(NamedTuple):
    """A real run of two ranks: its folder, exit code and output, and the addresses that its processes listened at."""

    folder: Path
    code: int
    output: str
    listened: set[str]


def listening(process: "subprocess.Popen[bytes]") -> Iterator[str]:
    """The addresses at which a process and what it started listen now, of TCP and UDP."""
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        for connection in member.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or (connection.laddr and not connection.raddr):
                yield connection.laddr.ip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Ended:
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(empty_store, folder / "mlflow.db")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, str(REPOSITORY / "deepscale" / "train.py"), *SMALL, *QUICK, "--run-name", RUN_NAME, "--checkpoint-dir", "weights"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SECRETS, "PATH": path, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    listened: set[str] = set()
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 200
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(psutil.Error):  # one of them has just ended
                    listened.update(listening(process))
                time.sleep(0.2)
        finally:
            end_group(process)  # type: ignore[arg-type]
    return Ended(folder, process.wait(), (folder / "output").read_text(errors="replace"), listened)


# --------------------------------------------------------------------------------------------------------------- network


def test_a_run_listens_at_the_loopback_address_alone(ended: Ended) -> None:
    assert ended.code == 0, ended.output
    assert ended.listened == {"127.0.0.1"}  # rank 0's store, and gloo


def test_one_rank_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "none")
    store, rank, size = next(iter(rendezvous.meet("")))
    store.set("name", "value")
    assert (rank, size, store.get("name")) == (0, 1, b"value")


def test_a_store_for_other_machines_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by an address that others reach, or kept by torchrun; an interface that the user names stays."""
    for name in rendezvous.INTERFACES:
        monkeypatch.delenv(name, raising=False)
    for address in ("10.0.0.1", "node-1", "localhost.example.org", "::", "0.0.0.0"):
        monkeypatch.setenv("MASTER_ADDR", address)
        assert rendezvous.init_method() is None and not rendezvous.is_loopback(address)
    assert not os.environ.keys() & set(rendezvous.INTERFACES)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    for address in ("127.0.0.1", "127.0.1.1", "::1", "localhost"):
        monkeypatch.setenv("MASTER_ADDR", address)
        assert rendezvous.init_method() == "deepscale-loopback://"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous.init_method() is None


def test_a_taken_port_is_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = rendezvous._listen("127.0.0.1", 0)
    with os.fdopen(listener, "rb", closefd=False):
        port = psutil.Process().net_connections("inet")[-1].laddr.port
        with pytest.raises(DistNetworkError, match="EADDRINUSE"):
            rendezvous._listen("127.0.0.1", port)
    os.close(listener)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_have_ended_waits_for_minutes_not_for_the_run(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "TOGETHER", timedelta(seconds=1))
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"the ranks do not find each other at 127\.0\.0\.1"):
        world.join(EngineConfig(engine="torch"))


def test_every_mlflow_server_that_is_shown_is_for_this_machine_alone(ended: Ended) -> None:
    """In what is printed, and in every page: `mlflow ui` and `mlflow server` with --host 127.0.0.1."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.sh", "*.sbatch", "Makefile"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    texts = {name: (REPOSITORY / name).read_text() for name in tracked.stdout.splitlines() if not name.startswith("tests/")}
    lines = [line for text in texts.values() for line in text.splitlines() if re.search(r"mlflow (ui|server)\b.*--", line)]
    lines += [line for line in ended.output.splitlines() if "mlflow ui" in line]
    assert len(lines) >= 3
    assert not [line for line in lines if "--host 127.0.0.1" not in line]
    assert tracking.view_command("sqlite:///somewhere.db").endswith("--host 127.0.0.1")


# ----------------------------------------------------------------------------------------------------------------- shell


def test_no_code_of_the_package_uses_a_shell_or_runs_text() -> None:
    """Every call of the package: no shell, no os.system, no eval, no unpickling, and no archive unpacked by its own names."""
    forbidden = {"os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads", "torch.load", "subprocess.getoutput", "compile"}
    found = []
    for path in sorted((REPOSITORY / "deepscale").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            switched_on = {keyword.arg for keyword in node.keywords if ast.unparse(keyword.value) == "True"}
            if name in forbidden or name.endswith((".extractall", "extract_archive")) or switched_on & {"shell", "allow_pickle"}:
                found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: {name}")
    assert not found


def test_a_run_name_is_text_and_no_command(ended: Ended) -> None:
    """Through the launcher, into folders, database and the shown command; nothing it says is done, and nothing lies outside the run's folder."""
    assert ended.code == 0, ended.output
    assert not list(ended.folder.rglob("sprung*"))
    assert {path.name for path in ended.folder.iterdir()} <= {"mlflow.db", "mlflow.db.lock", "mlruns", "runs", "weights", "output"}
    assert len(list((ended.folder / "runs").iterdir())) == 1
    with sqlite3.connect(ended.folder / "mlflow.db") as database:
        assert database.execute("SELECT name FROM runs").fetchall() == [(RUN_NAME,)]
    (shown_command,) = [line.split("show", 1)[1] for line in ended.output.splitlines() if "mlflow ui" in line]
    assert shlex.split(shown_command)[:2] == ["mlflow", "ui"]


# --------------------------------------------------------------------------------------------------------------- secrets


def test_no_secret_of_the_environment_is_in_any_file(ended: Ended) -> None:
    """Database, artifacts, record, weights, output: every file of the run; files of these kinds are really there."""
    files = [path for path in ended.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"mlflow.db", "output", "gradflow.npz", "summary.json", "model.safetensors"}
    found = {path.name for path in files for value in SECRETS.values() if value.encode() in path.read_bytes()}
    assert not found


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://me:secret@host:5000/x", "http://me:***@host:5000/x"),
        ("postgresql://host/db?user=me&password=secret&sslmode=require", "postgresql://host/db?user=me&password=***&sslmode=require"),
        ("https://host/?api_key=secret&Access-Token=secret", "https://host/?api_key=***&Access-Token=***"),
        ("http://:secret@host", "http://:***@host"),
    ],
)
def test_an_address_is_shown_without_its_password(uri: str, expected: str) -> None:
    assert shown(uri) == expected
