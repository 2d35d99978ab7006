"""Where numbers come from: the machine and the packages, for a bench's file and a run's record."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "ffcv")


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, GPU, and how busy the machine is now: its load of the last minute."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    memory = _first("/proc/meminfo", "MemTotal")
    gib = f"{int(memory.split()[0]) / 2**20:.0f} GiB" if memory else "unknown"
    cpu = _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return {"CPU": cpu, "cores": len(os.sched_getaffinity(0)), "memory": gib, "GPU": gpu, "load before": round(os.getloadavg()[0], 1)}


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _first(file: str, name: str) -> str:
    """The value of the first line `name: value`, or nothing."""
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def commit() -> str | None:
    """The commit of the clone that this package lies in; None for an installed one, or where there is no git."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
