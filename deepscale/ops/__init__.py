"""Compiled libraries ("ops"): built once, before any clock starts, and loaded from a folder that other machines can share.

There are two (`OPS`): the kernel of the network's block (block.py), and DeepSpeed's CPU optimiser (cpu_adam.py). What is decided
here, and why:

- The build runs in a process of its own, which also tries the fresh op: compiler messages stay out of the way, and an op that
  crashes does not take the training with it.
- A finished op is loaded straight from its file. torch's own loader asks for a compiler, ninja and a writable folder even when
  there is nothing to build. Beside the file a note says what it was built for; it is only loaded where all of that fits, since
  `-march=native` code from another processor ends in an illegal instruction.

Folders, in this order: DEEPSCALE_OPS_DIR, TORCH_EXTENSIONS_DIR, the user's cache. The first with a fitting op is read, the
first that can be written is built in.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deepscale.errors import unknown_choice
from deepscale.ops import block, cpu_adam
from deepscale.ops.cpu_adam import skip_shm_comm as skip_shm_comm
from deepscale.ops.op import Op, Say, compiler, path_with_ninja

OPS: dict[str, Op] = {"block": block.OP, "cpu_adam": cpu_adam.OP}

BUILD_LIMIT_S = 1800.0
# What -march=native may use; the other words of /proc/cpuinfo (hypervisor, topology ...) do not matter to an op.
INSTRUCTIONS = re.compile(r"^(v?aes|abm|adx|amx|asimd|avx|bmi|f16c|fma|fp|gfni|lzcnt|movbe|v?pclmul|popcnt|sha|s?sse|sve|xop|3dnow)")


def ensure_ops(which: Iterable[str], say: Say, verbose: bool = False, folder: Path | None = None) -> dict[str, str | None]:
    """Makes ops ready for this process; what is missing is built, once, however many ranks ask.

    `say` gets one line from the rank that builds, so give each rank one that prints. A build that failed is tried again when
    something has changed. With `folder`, no other is looked at, and a failed build is tried again.
    Returns, per op, None when it is loaded, or a sentence on why it cannot be had.
    """
    folders = ops_folders() if folder is None else [folder.absolute()]
    return {name: _ensure(name, folders, say, verbose, folder is not None) for name in which}


def check_op(name: str) -> None:
    """One tiny operation with an op that is loaded. Raises RuntimeError where its result is wrong."""
    OPS[name].check()


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


def note_of_this_machine(name: str) -> dict[str, Any]:
    """What a finished op must fit: versions, and the processor's instructions."""
    return {**OPS[name].versions(), "machine": platform.machine(), "instructions": _instructions()}


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
        for key in here.keys() - {"instructions"}:
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


def _ensure(name: str, folders: list[Path], say: Say, verbose: bool, again: bool) -> str | None:
    if name not in OPS:
        raise unknown_choice("the op", name, OPS)
    if OPS[name].loaded():
        return None
    here = note_of_this_machine(name)
    library, misfit = _find(name, folders, here)
    if library is None:
        reason = _build_locked(name, folders, here, say, verbose, again)
        library, _ = _find(name, folders, here)
        if library is None:
            return "; ".join(text for text in (reason, misfit) if text)
    try:
        OPS[name].load(library)
    except (ImportError, OSError) as error:
        return f"{library} does not load ({error})"
    return None


def _build_locked(name: str, folders: list[Path], here: dict[str, Any], say: Say, verbose: bool, again: bool = False) -> str | None:
    """Builds an op in the first writable folder unless another process does so meanwhile; a sentence when it cannot."""
    folder = next((folder for folder in folders if _writable(folder)), None)
    if folder is None:
        return f"none of the folders for ops can be written: {', '.join(map(str, folders))}; name another: DEEPSCALE_OPS_DIR"
    tag = hashlib.sha256(json.dumps(here).encode()).hexdigest()[:8]
    place = folder / f"{name}-{tag}" / name
    try:
        with FileLock(folder / f"{name}.lock", timeout=BUILD_LIMIT_S):
            if _find(name, folders, here)[0] is not None:
                return None
            before = None if again else _failed_before(place, here)
            return before or _build(name, place, here, say, verbose)
    except Timeout:
        return f"another process has been building {name} in {folder} for {BUILD_LIMIT_S / 60:.0f} minutes"
    except OSError as error:
        return f"{name} cannot be built in {folder} ({error})"


def _build(name: str, place: Path, here: dict[str, Any], say: Say, verbose: bool) -> str | None:
    op = OPS[name]
    missing = op.missing()
    if missing:
        return missing
    say(f"building {op.title}, {op.takes}, once (kept in {place.parent})")
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
        reason = f"building {name} failed: {_essence(output) or f'exit code {code}'} (all messages: {log})"
        if code > 0:  # a signal, such as that of a machine without memory, says nothing of the next time
            _failure_note(place).write_text(json.dumps({**here, "compiler": _compiler(), "reason": reason}, indent=1) + "\n")
        return reason
    note = {**here, "sha256": hashlib.sha256(library.read_bytes()).hexdigest(), "build_s": round(time.monotonic() - started, 1)}
    fresh = place / "note.new"
    fresh.write_text(json.dumps(note, indent=1) + "\n")
    # The note comes last: an op without one is not looked at.
    fresh.rename(library.with_suffix(".json"))
    return None


def _failure_note(place: Path) -> Path:
    return place / "failed.json"


def _failed_before(place: Path, here: dict[str, Any]) -> str | None:
    """Why a build with these versions and this compiler failed before, or None."""
    try:
        note = json.loads(_failure_note(place).read_text())
        if note != {**here, "compiler": _compiler(), "reason": note["reason"]}:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"{note['reason']}; nothing has changed since: to try again, delete {_failure_note(place)}"


def _compiler() -> str:
    """The compiler's command and the first line in which it names its version."""
    command = [*compiler(), "--version"]
    try:
        said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return shlex.join([*command[:-1], *said.splitlines()[:1]])


def _run_build(name: str, place: Path, log: Path) -> int:
    """Runs `build_and_check` in a process of its own; its exit code, negative for a signal."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(place.parent), "PATH": path_with_ninja(), "DS_ACCELERATOR": "cpu"}
    program = "import sys; sys.path.append(sys.argv[1]); from deepscale.ops import build_and_check; build_and_check(sys.argv[2])"
    command = [sys.executable, "-c", program, str(Path(__file__).parents[2]), name]
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
    """What the building process does, in the op's folder: build, load, try."""
    OPS[name].build()
    OPS[name].load(Path(f"{name}.so").absolute())
    check_op(name)
