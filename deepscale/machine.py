"""What is free on this machine, for the planner."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from deepscale.world import World


@dataclass(frozen=True)
class Machine:
    """What is free here, per rank: device memory and host memory in bytes, and what the device can do."""

    device: str
    device_bytes: int
    host_bytes: int
    bf16: bool
    ranks: int


def measure_machine(world: World) -> Machine:
    """Free memory now, shared out over the ranks of this machine."""
    host = _host_bytes() // world.local_size
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        return Machine("cuda", free, host, torch.cuda.is_bf16_supported(including_emulation=False), world.size)
    return Machine("cpu", host, host, False, world.size)


def _host_bytes() -> int:
    """Host memory that is free: the system's, or what the control group still allows."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with_cache = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
    if with_cache:
        available = int(with_cache[0].split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available
