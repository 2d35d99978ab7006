"""Running a measuring process within a limit of memory: trained, out of memory, or too slow.

On a CPU a watch on the process's resident memory keeps the limit: every few milliseconds it reads the high-water mark that the
kernel keeps of it (VmHWM of /proc/PID/status, and what is swapped out), and kills the process once that is over the limit. No
peak between two looks is missed, since the mark stays; what is passed over is at most what the process touches in `LOOK_S`.

Not used, and why: a memory cgroup needs rights that few accounts have, and charges the pages of shared libraries (340 MiB with torch's
CUDA build) to whoever loaded them first, so the same network would fit or not depending on other processes. RLIMIT_AS and RLIMIT_DATA count
what is reserved, not what is used, and RLIMIT_RSS does nothing since Linux 2.4.30. On a GPU torch itself keeps the limit
(torch.cuda.set_per_process_memory_fraction), and the process reports it (trial.py).
"""

import math
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepscale.bench.worker import result_of, start_of

TRAINED, OUT_OF_MEMORY, TOO_SLOW = "trained", "out of memory", "too slow"
LOOK_S = 0.01


@dataclass(frozen=True)
class Ended:
    """How a process ended: its outcome, peak resident bytes as far as seen, seconds, and what it printed where it ended by itself."""

    outcome: str
    peak: int
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)


def run_within(module: str, options: Mapping[str, object], *, threads: int, limit_s: float, limit_bytes: int | None) -> Ended:
    """`python -m module --name value ...` within limits (None: it keeps its own); it prints its own `outcome` and `peak_bytes`.

    Raises BenchError where it fails in another way than by memory or time.
    """
    command, environment, shown = start_of(module, options, threads, str(options.get("device", "cpu")))
    begin, peak, limit = time.perf_counter(), 0, math.inf if limit_bytes is None else limit_bytes
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            while process.poll() is None:
                peak = max(peak, resident_peak(process.pid))
                if peak > limit:
                    return Ended(OUT_OF_MEMORY, peak, time.perf_counter() - begin)
                if time.perf_counter() - begin > limit_s:
                    return Ended(TOO_SLOW, peak, time.perf_counter() - begin)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_S)
        finally:
            process.kill()
            process.wait()
        printed = [file.read().decode(errors="replace") for file in (out, err) if not file.seek(0)]
    result = result_of(shown, subprocess.CompletedProcess(command, process.returncode, *printed))
    peak = int(result["peak_bytes"])
    outcome = OUT_OF_MEMORY if peak > limit else str(result["outcome"])
    return Ended(outcome, peak, time.perf_counter() - begin, result)


def resident_peak(pid: int) -> int:
    """Bytes: the most that this process ever had resident, or has now with what is swapped out; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines) if name in ("VmHWM", "VmRSS", "VmSwap")}
    return max(sizes.get("VmHWM", 0), sizes.get("VmRSS", 0) + sizes.get("VmSwap", 0))
