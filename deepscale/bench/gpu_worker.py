"""A program: one measurement of `deepscale bench gpu` in a fresh process, as JSON in the last line.

A process of its own leaves nothing behind on the device, may run out of memory, and can be ended when its time is over.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepscale import config, errors, memory, ops, world
from deepscale.bench import gpu_check, gpu_device, gpu_trace
from deepscale.bench.gpu_cells import OUT_OF_MEMORY, settings_from
from deepscale.bench.gpu_network import batch_on, build, limit_memory, synchronise
from deepscale.bench.networks import Training
from deepscale.bench.options import whole
from deepscale.config import Config
from deepscale.engine import build_engine, hush
from deepscale.outcome import is_out_of_memory
from deepscale.world import World

MOST_STEPS = 5
WARM_UP = 1  # the optimiser's state comes with the first step
SHAPES = ((64, 64, 32, 32), (64, 256, 8, 8))  # of the residual stream in stages 1 and 3 at width 64


def training_of(settings: Config, place: World) -> Training:
    """Network and engine on the device. An offloaded optimiser is torch's own: DeepSpeed's would have to be compiled first."""
    model = build(settings, place.device)
    return Training(build_engine(model, settings, place), place, batch_on(int(settings.data.batch_size), place.device))


def step(settings: Config, place: World, seconds: float) -> dict[str, Any]:
    """Seconds of training steps, at most `MOST_STEPS` and at least one within about `seconds`; peaks of device and host."""
    base = memory.resident_bytes()
    begin = time.perf_counter()
    training = training_of(settings, place)
    synchronise(place.device)
    start_s = time.perf_counter() - begin
    start_bytes = memory.peak_bytes(place.device)
    for _ in range(WARM_UP):
        training.step()
    synchronise(place.device)
    memory.reset_peak(place.device)
    taken: list[float] = []
    while not taken or (len(taken) < MOST_STEPS and sum(taken) + taken[-1] < seconds):
        begin = time.perf_counter()
        training.step()
        synchronise(place.device)
        taken.append(time.perf_counter() - begin)
    cuda = place.device.type == "cuda"
    return {
        "steps_s": taken,
        "step_s": sorted(taken)[len(taken) // 2],
        "losses": training.losses,
        "start_s": start_s,
        "start_peak_bytes": start_bytes,
        "allocated_bytes": memory.peak_bytes(place.device),
        "reserved_bytes": torch.cuda.max_memory_reserved(place.device) if cuda else None,
        "host_bytes_over_start": memory.peak_bytes(torch.device("cpu")) - base,
    }


def _profile(settings: Config, place: World, seconds: float) -> dict[str, Any]:
    return gpu_trace.profile(training_of(settings, place).step, sum(settings.model.stage_blocks), place.device)


def _graph(settings: Config, place: World, seconds: float) -> dict[str, Any]:
    return gpu_trace.Passes(settings, place).graphed()


def _operators(settings: Config, place: World, seconds: float) -> dict[str, Any]:
    return {"x".join(map(str, shape)): gpu_device.operators(place.device, shape) for shape in SHAPES}


TASKS: dict[str, Callable[[Config, World, float], dict[str, Any]]] = {
    "device": lambda settings, place, seconds: gpu_device.describe(place),
    "network": lambda settings, place, seconds: dict(zip(("checks", "broken"), gpu_check.check_network(place), strict=True)),
    "engines": lambda settings, place, seconds: {"checks": gpu_check.check_engines(place)},
    "operators": _operators,
    "step": step,
    "profile": _profile,
    "graph": _graph,
    "plain": lambda settings, place, seconds: gpu_trace.against_plain(settings, place),
}


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say, and prints the result in the last line. Memory that runs out is a result too."""
    command = config.parser("python -m deepscale.bench.gpu_worker", "Measure one thing on the device in this process.")
    command.add_argument("--task", choices=tuple(TASKS), required=True)
    command.add_argument("--settings", type=json.loads, required=True, help="what differs from the defaults, as JSON")
    command.add_argument("--limit", type=whole(0), default=0, help="bytes of device memory; 0: no limit")
    command.add_argument("--seconds", type=float, default=10.0, help="of measured steps")
    values = command.parse_args(arguments)
    hush(verbose=False)
    print(json.dumps(run(values.task, settings_from(values.settings), values.limit, values.seconds)), flush=True)


def run(task: str, settings: Config, limit: int, seconds: float) -> dict[str, Any]:
    """One task's result."""
    if settings.engine.engine == "deepspeed":
        _need_deepspeed()
    place = world.join(settings.engine)
    try:
        limit_memory(place.device, limit)
        return TASKS[task](settings, place, seconds)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"outcome": OUT_OF_MEMORY, "why": (str(error).strip().splitlines() or ["memory ran out"])[0]}
    finally:
        world.leave()


def _need_deepspeed() -> None:
    try:
        ops.skip_shm_comm()
    except ImportError:
        raise errors.MissingPackageError("deepspeed", None, "this row") from None


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the result is out: taking down NCCL and gigabytes of pinned memory takes time, and may still fail
