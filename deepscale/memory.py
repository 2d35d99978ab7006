"""Peak memory of this process: resident on a CPU, allocated on a GPU, in bytes."""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import torch


def resident_bytes() -> int:
    """Resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def give_back() -> None:
    """What malloc holds of freed memory goes back to the system; on a C library that cannot, nothing happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> int:
    """Starts a new measurement; returns what is in use now, over which the peak is counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back()
    with suppress(OSError):  # without this right the peak is the process's whole life's
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """The largest use since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text().splitlines()
    high = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")]
    return high[0] if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
