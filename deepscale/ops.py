"""DeepSpeed's CPU ops: built once, before any clock starts, and loaded from a folder that other machines can share.

What is decided here, and why (DeepSpeed 0.19):

- Training needs one op, `cpu_adam` (`DeepSpeedCPUAdam`, the optimiser of ZeRO-Offload).
- DeepSpeed also builds `shm_comm` at the first gloo initialisation, which takes half a minute and stops a machine without a
  compiler. Only tensor-parallel inference calls it, so it is switched off (`skip_shm_comm`).
- The build runs in a process of its own, which also takes one optimiser step with the fresh op: compiler messages stay out
  of the way, and an op that crashes does not take the training with it.
- A finished op is loaded straight from its file. torch's own loader asks for a compiler, ninja and a writable folder even when
  there is nothing to build. Beside the file a note says what it was built for; it is only loaded where all of that fits, since
  `-march=native` code from another processor ends in an illegal instruction.

Folders, in this order: DEEPSCALE_OPS_DIR, TORCH_EXTENSIONS_DIR, the user's cache. The first with a fitting op is read, the
first that can be written is built in.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deepscale.errors import MissingPackageError, UsageError, unknown_choice

Say = Callable[[str], None]

BUILD_LIMIT_S = 1800.0
# What -march=native may use; the other words of /proc/cpuinfo (hypervisor, topology ...) do not matter to an op.
INSTRUCTIONS = re.compile(r"^(v?aes|abm|adx|amx|asimd|avx|bmi|f16c|fma|fp|gfni|lzcnt|movbe|v?pclmul|popcnt|sha|s?sse|sve|xop|3dnow)")


def ensure_ops(which: Iterable[str], say: Say, verbose: bool = False, folder: Path | None = None) -> dict[str, str | None]:
    """Makes DeepSpeed's ops ready for this process; what is missing is built, once, however many ranks ask.

    Call it on every rank before `deepspeed.init_distributed`. `say` gets one line from the rank that builds, so give each rank
    one that prints. With `folder`, no other is looked at. Returns, per op, None when it is loaded, or a sentence on why it
    cannot be had.
    """
    skip_shm_comm()
    folders = ops_folders() if folder is None else [folder.absolute()]
    return {name: _ensure(name, folders, say, verbose) for name in which}


def cpu_adam_available() -> bool:
    """Whether this process can make a `DeepSpeedCPUAdam`, that is `ensure_ops(["cpu_adam"], ...)` succeeded."""
    return "cpu_adam" in _deepspeed_loaded()


def skip_shm_comm() -> None:
    """Keeps DeepSpeed from building `shm_comm` at its first gloo initialisation; collectives go through gloo as they would anyway."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# --------------------------------------------------------------------------------------------------------------- checks


def _check_cpu_adam() -> None:
    """One AdamW step of the op equals torch's. Raises RuntimeError."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (torch.linspace(-2.0, 2.0, 1003).requires_grad_() for _ in range(2))
    for parameter, optimizer in ((ours, DeepSpeedCPUAdam([ours], **settings)), (theirs, torch.optim.AdamW([theirs], foreach=False, **settings))):
        parameter.grad = torch.cos(3.0 * parameter.detach())
        optimizer.step()
    difference = (ours - theirs).abs().max().item()
    if not difference < 1e-5:
        raise RuntimeError(f"one step differs from torch's AdamW by {difference:.2g}")


# Name in DeepSpeed -> (its builder, the check of a loaded op).
OPS: dict[str, tuple[str, Callable[[], None]]] = {"cpu_adam": ("CPUAdamBuilder", _check_cpu_adam)}


def check_op(name: str) -> None:
    """One tiny operation with an op that is loaded. Raises RuntimeError where its result is wrong."""
    OPS[name][1]()


# -------------------------------------------------------------------------------------------------------------- folders


def ops_folders() -> list[Path]:
    """Folders that are searched for ops, in order."""
    named = [os.environ.get("DEEPSCALE_OPS_DIR"), os.environ.get("TORCH_EXTENSIONS_DIR")]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [Path(folder).absolute() for folder in named if folder] + [Path(cache, "deepscale", "ops")]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _note_of_this_machine() -> dict[str, Any]:
    """What a finished op must fit: versions, and the processor's instructions."""
    import deepspeed
    import torch

    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}",
        "machine": platform.machine(),
        "instructions": _instructions(),
    }


def _instructions() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return []
    words = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted(word for word in (words[1].split() if words else []) if INSTRUCTIONS.match(word))


def _misfit(library: Path, here: dict[str, Any]) -> str | None:
    """Why this file cannot be loaded here, or None."""
    try:
        note = json.loads(library.with_suffix(".json").read_text())
        for key in ("torch", "deepspeed", "python", "machine"):
            if note[key] != here[key]:
                return f"{library} was built for {key} {note[key]}, and here is {here[key]}"
        lacking = set(note["instructions"]) - set(here["instructions"])
        if lacking:
            return f"{library} was built for another processor ({', '.join(sorted(lacking)[:3])} are missing here)"
        if hashlib.sha256(library.read_bytes()).hexdigest() != note["sha256"]:
            return f"{library} is damaged"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{library} or the note beside it cannot be read"
    return None


def _find(name: str, folders: list[Path], here: dict[str, Any]) -> tuple[Path | None, str | None]:
    """The first file of an op that fits this machine; else None and why the last one found does not."""
    reason = None
    for folder in folders:
        # sorted: all ranks take the same one
        for library in sorted(folder.glob(f"*/{name}/{name}.so")):
            misfit = _misfit(library, here)
            if misfit is None:
                return library, None
            reason = misfit
    return None, reason


# ------------------------------------------------------------------------------------------------------ load and build


def _deepspeed_loaded() -> dict[str, Any]:
    """DeepSpeed's record of loaded ops: what is in it, its builders return at once."""
    try:
        from deepspeed.ops.op_builder.builder import OpBuilder
    except ImportError:
        raise MissingPackageError("deepspeed", None, "--engine deepspeed") from None
    loaded: dict[str, Any] = OpBuilder._loaded_ops
    return loaded


def _load(name: str, library: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _deepspeed_loaded()[name] = module


def _ensure(name: str, folders: list[Path], say: Say, verbose: bool) -> str | None:
    if name not in OPS:
        raise unknown_choice("DeepSpeed op", name, OPS)
    if name in _deepspeed_loaded():
        return None
    here = _note_of_this_machine()
    library, misfit = _find(name, folders, here)
    if library is None:
        reason = _build_locked(name, folders, here, say, verbose)
        library, _ = _find(name, folders, here)
        if library is None:
            return "; ".join(text for text in (reason, misfit) if text)
    try:
        _load(name, library)
    except ImportError as error:
        return f"{library} does not load ({error})"
    return None


def _build_locked(name: str, folders: list[Path], here: dict[str, Any], say: Say, verbose: bool) -> str | None:
    """Builds an op in the first writable folder unless another process does so meanwhile; a sentence when it cannot."""
    folder = next((folder for folder in folders if _writable(folder)), None)
    if folder is None:
        return f"none of the folders for ops can be written: {', '.join(map(str, folders))}; name another: DEEPSCALE_OPS_DIR"
    tag = hashlib.sha256(json.dumps(here).encode()).hexdigest()[:8]
    place = folder / f"torch{here['torch']}-deepspeed{here['deepspeed']}-{here['python']}-{tag}" / name
    try:
        with FileLock(folder / f"{name}.lock", timeout=BUILD_LIMIT_S):
            if _find(name, folders, here)[0] is not None:
                return None
            return _build(name, place, here, say, verbose)
    except Timeout:
        return f"another process has been building {name} in {folder} for {BUILD_LIMIT_S / 60:.0f} minutes"
    except OSError as error:
        return f"{name} cannot be built in {folder} ({error})"


def missing_for_build() -> str | None:
    """What a build lacks on this machine, as a sentence, or None."""
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler}) is on the PATH (Debian: apt-get install g++)"
    if shutil.which("ninja", path=_path_with_ninja()) is None:
        return "ninja is missing (pip install ninja)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python are missing (Debian: apt-get install python3-dev)"
    return None


def _path_with_ninja() -> str:
    # pip puts ninja beside python, which is on the PATH only in an activated environment.
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def _build(name: str, place: Path, here: dict[str, Any], say: Say, verbose: bool) -> str | None:
    missing = missing_for_build()
    if missing:
        return missing
    say(f"building DeepSpeed's CPU op {name}, a minute or two, once (kept in {place.parent})")
    # An interrupted build may have left objects or a lock that torch would wait for.
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    log = place / "build.log"
    started = time.monotonic()
    code = _run_build(name, place, log)
    output = log.read_text(errors="replace")
    if verbose:
        say(output)
    library = place / f"{name}.so"
    if code != 0 or not library.is_file():
        return f"building {name} failed: {_essence(output) or f'exit code {code}'} (all messages: {log})"
    note = {**here, "sha256": hashlib.sha256(library.read_bytes()).hexdigest(), "build_s": round(time.monotonic() - started, 1)}
    fresh = place / "note.new"
    fresh.write_text(json.dumps(note, indent=1) + "\n")
    # The note comes last: an op without one is not looked at.
    fresh.rename(library.with_suffix(".json"))
    return None


def _run_build(name: str, place: Path, log: Path) -> int:
    """Runs `build_and_check` in a process of its own; its exit code, negative for a signal."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(place.parent), "PATH": _path_with_ninja(), "DS_ACCELERATOR": "cpu"}
    program = "import sys; sys.path.append(sys.argv[1]); from deepscale.ops import build_and_check; build_and_check(sys.argv[2])"
    command = [sys.executable, "-c", program, str(Path(__file__).parents[1]), name]
    with log.open("w") as output:
        # A session of its own, so that the compilers end with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=place, start_new_session=True
        )
        try:
            return process.wait(BUILD_LIMIT_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _essence(output: str) -> str | None:
    """The line of a compiler's or Python's messages that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(?:error|Error|exception): ", line)]
    return next(iter(errors or lines[-1:]), None)


def build_and_check(name: str) -> None:
    """What the building process does: build into TORCH_EXTENSIONS_DIR, load, try."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(OPS[name][0])
    if builder is None:
        raise UsageError(f"DeepSpeed has no {OPS[name][0]} for this machine's accelerator")
    builder.load(verbose=True)
    check_op(name)
