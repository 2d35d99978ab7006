"""Compiled ops: built once, loaded where they fit, and training goes on without them.

All but the last two tests replace the compiler by a function that writes a file, and the loader by a record of what it was given.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deepscale import ops, prepare
from deepscale.errors import UsageError
from deepscale.ops import cpu_adam

pytest.importorskip("deepspeed")


class Workshop:
    """Stands for compiler and loader."""

    def __init__(self) -> None:
        self.built: list[Path] = []
        self.loaded: dict[str, Any] = {}
        self.said: list[str] = []
        self.output, self.code, self.seconds = "", 0, 0.0

    def run_build(self, name: str, place: Path, log: Path) -> int:
        self.built.append(place)
        time.sleep(self.seconds)
        log.write_text(self.output)
        if self.code == 0:
            (place / f"{name}.so").write_bytes(b"machine code")
        return self.code

    def load(self, library: Path) -> None:
        self.loaded["tiny"] = library

    def op(self) -> ops.Op:
        return ops.Op(
            title="the tiny op", takes="a moment", without="nothing works", versions=lambda: {"torch": "torch2", "python": "cpython-311"},
            missing=lambda: None, build=lambda: None, load=self.load, loaded=lambda: "tiny" in self.loaded, check=lambda: None,
        )  # fmt: skip

    def ensure(self, folder: Path) -> str | None:
        """As a new process: nothing is loaded yet."""
        self.loaded = {}
        return ops.ensure_ops(["tiny"], self.said.append, folder=folder)["tiny"]


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shop = Workshop()
    monkeypatch.setattr(ops, "OPS", {"tiny": shop.op()})
    monkeypatch.setattr(ops, "_run_build", shop.run_build)
    return shop


def note_of(folder: Path) -> Path:
    (note,) = folder.glob("*/tiny/tiny.json")
    return note


def test_an_op_is_built_once_and_announced_with_one_line(workshop: Workshop, tmp_path: Path) -> None:
    assert workshop.ensure(tmp_path) is None
    assert workshop.ensure(tmp_path) is None
    assert len(workshop.built) == 1
    assert len(workshop.said) == 1 and "building" in workshop.said[0] and "\n" not in workshop.said[0]
    assert workshop.loaded == {"tiny": workshop.built[0] / "tiny.so"}


def test_ranks_at_the_same_time_build_once(workshop: Workshop, tmp_path: Path) -> None:
    workshop.seconds = 0.3
    here = ops.note_of_this_machine("tiny")
    with ThreadPoolExecutor(4) as ranks:
        done = list(ranks.map(lambda _: ops._build_locked("tiny", [tmp_path], here, workshop.said.append, False), range(4)))
    assert done == [None] * 4
    assert len(workshop.built) == len(workshop.said) == 1


@pytest.mark.parametrize(("key", "value"), [("torch", "torch1"), ("python", "cpython-27"), ("machine", "vax")])
def test_an_op_built_for_something_else_is_not_loaded(workshop: Workshop, tmp_path: Path, key: str, value: str) -> None:
    workshop.ensure(tmp_path)
    note = note_of(tmp_path)
    note.write_text(json.dumps({**json.loads(note.read_text()), key: value}))
    library, reason = ops._find("tiny", [tmp_path], ops.note_of_this_machine("tiny"))
    assert library is None
    assert reason is not None and key in reason and value in reason


def test_an_op_for_a_processor_with_more_instructions_is_not_loaded(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.ensure(tmp_path)
    own = ops._instructions()
    monkeypatch.setattr(ops, "_instructions", lambda: own[:-1])
    workshop.code = 1  # and it cannot be built here either
    reason = workshop.ensure(tmp_path)
    assert reason is not None and "another processor" in reason and own[-1] in reason
    # The other way round it fits: more instructions than needed do no harm.
    monkeypatch.setattr(ops, "_instructions", lambda: [*own, "avx4096"])
    assert workshop.ensure(tmp_path) is None


def test_a_damaged_op_is_built_again(workshop: Workshop, tmp_path: Path) -> None:
    workshop.ensure(tmp_path)
    note_of(tmp_path).with_name("tiny.so").write_bytes(b"machine co")
    assert workshop.ensure(tmp_path) is None
    assert len(workshop.built) == 2


def test_an_op_whose_build_was_interrupted_is_built_again(workshop: Workshop, tmp_path: Path) -> None:
    workshop.ensure(tmp_path)
    note_of(tmp_path).unlink()
    assert workshop.ensure(tmp_path) is None
    assert len(workshop.built) == 2


def test_a_failed_build_gives_its_error_and_leaves_no_op(workshop: Workshop, tmp_path: Path) -> None:
    workshop.code, workshop.output = 1, "[1/2] c++ -O3\ncpu.cpp:7: error: no such thing\ninterrupted\n"
    reason = workshop.ensure(tmp_path)
    assert reason is not None and "cpu.cpp:7: error: no such thing" in reason and "build.log" in reason
    assert not workshop.loaded
    assert ops._find("tiny", [tmp_path], ops.note_of_this_machine("tiny"))[0] is None


def test_a_failed_build_is_tried_again_when_something_changed(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every start; but with another compiler, after a signal, and where `deepscale prepare` names a folder."""
    monkeypatch.setattr(ops, "ops_folders", lambda: [tmp_path])
    workshop.code, workshop.output = 1, "cpu.cpp:7: error: no such thing\n"
    ensure = lambda: ops.ensure_ops(["tiny"], workshop.said.append)["tiny"]  # noqa: E731
    assert "delete" not in str(ensure())
    for _ in range(2):
        reason = ensure()
        assert reason is not None and "error: no such thing" in reason and "delete" in reason and str(tmp_path) in reason
    assert len(workshop.built) == len(workshop.said) == 1
    monkeypatch.setattr(ops, "_compiler", lambda: "c++ of next year")
    workshop.code = -9
    assert "delete" not in str(ensure()) and "delete" not in str(ensure())
    assert len(workshop.built) == 3
    workshop.code = 1
    assert [ensure() is None, ensure() is None] == [False, False] and len(workshop.built) == 4
    workshop.code = 0
    assert ensure() is not None
    assert workshop.ensure(tmp_path) is None and len(workshop.built) == 5
    assert ensure() is None


def test_a_folder_that_cannot_be_made_is_a_reason(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reason = workshop.ensure(tmp_path / "file" / "ops")
    assert reason is not None and "can be written" in reason and "DEEPSCALE_OPS_DIR" in reason


def test_the_folders_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPSCALE_OPS_DIR", str(tmp_path / "a"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "b"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert ops.ops_folders() == [tmp_path / "a", tmp_path / "b", tmp_path / "c" / "deepscale" / "ops"]


def test_without_a_compiler_the_reason_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    reason = cpu_adam.missing_for_build()
    assert reason is not None and "g++" in reason


def test_an_unknown_op_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cpu_adam"):
        ops.ensure_ops(["gpu_adam"], print, folder=tmp_path)


def without_compiler(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": os.devnull, "CXX": os.devnull, "DS_ACCELERATOR": "cpu"}
    return subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=240)


def test_deepspeed_starts_gloo_without_a_compiler(tmp_path: Path) -> None:
    """DeepSpeed would build `shm_comm` here; `skip_shm_comm` keeps it from that; `ensure_ops` returns the reason for the op asked for."""
    program = """if True:
        import os, pathlib, sys
        import deepspeed, torch
        from deepscale import ops
        from deepscale.ops import cpu_adam
        cpu_adam.skip_shm_comm()
        print("REASON", ops.ensure_ops(["cpu_adam"], print, folder=pathlib.Path(sys.argv[1]))["cpu_adam"], cpu_adam.cpu_adam_available())
        store = f"file://{sys.argv[1]}/rendezvous"
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=store, rank=0, world_size=1)
        ones = torch.ones(3)
        deepspeed.comm.all_reduce(ones)
        print("SUM", ones.sum().item())
    """
    done = without_compiler(program, str(tmp_path))
    assert "SUM 3.0" in done.stdout, done.stdout + done.stderr
    assert "REASON no C++ compiler" in done.stdout and "False" in done.stdout


@pytest.mark.timeout(900)  # it compiles for a minute, and for several on a busy machine
def test_cpu_adam_equals_torch_and_loads_without_a_compiler() -> None:
    """The real op, built once per clone; `check_op` compares one step with torch's AdamW, here and in a process without compiler."""
    reason = ops.ensure_ops(["cpu_adam"], print)["cpu_adam"]
    if reason and cpu_adam.missing_for_build():
        pytest.skip(reason)
    assert reason is None
    assert cpu_adam.cpu_adam_available()
    ops.check_op("cpu_adam")
    library, _ = ops._find("cpu_adam", ops.ops_folders(), ops.note_of_this_machine("cpu_adam"))
    assert library is not None
    assert prepare.check_without_compiler("cpu_adam", library.parents[2]) is None
