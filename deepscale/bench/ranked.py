"""A program, one process per rank: training steps of one network on some ranks; what they take and send, of every rank, as JSON.

A rank is pinned to cores of its own, as many as it has threads, by its place on its machine; where ranks are more than cores, they share
them. First come steps that are timed, and whose bytes the kernel counts; then steps whose collectives are noted (traffic.py).
"""

import argparse
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepscale import config, errors, kernel, memory, ops, world
from deepscale.bench import networks
from deepscale.bench.options import KERNELS, say, settings_of, whole
from deepscale.bench.traffic import Collectives, bytes_sent
from deepscale.engine import build_engine, hush, preload

NOTED_STEPS = 2
SIZES = ("depth", "width", "batch-size", "steps", "warm-up", "threads")


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say; every rank prints the results of all in its last line."""
    command = config.parser("python -m deepscale.bench.ranked", "Train one network for some steps on the ranks that the environment names.")
    for name in SIZES:
        command.add_argument(f"--{name}", type=whole(), required=True, help="images over all ranks" if name == "batch-size" else None)
    command.add_argument("--zero", type=whole(0), required=True)
    command.add_argument("--kernel", choices=KERNELS, default="auto")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    values = command.parse_args(arguments)
    hush(verbose=False)
    # A machine of one rank names no local rank, and pinning comes before the threads that a process group starts.
    cores = pin(int(os.environ.get("LOCAL_RANK", "0")), values.threads)
    ops.skip_shm_comm()
    settings = networks.configuration(**settings_of(values, "depth", "width", "batch_size", "zero", "threads"))
    device = world.choose_device(settings.replace(device=values.device).engine)
    collectives = Collectives(torch.device(device))
    settings = settings.replace(device=device, precision="bf16" if device == "cuda" else "fp32")
    place = world.join(settings.engine)
    try:
        chosen = kernel.choose(settings.replace(kernel=values.kernel), place, say, say)
        found = _measure(values, chosen, place, collectives) | {"host": socket.gethostname(), "cores": cores, "local_rank": place.local_rank}
        print(json.dumps({"device": device, "ranks": _of_all_ranks(found, place)}), flush=True)
    finally:
        world.leave()


def pin(local_rank: int, threads: int) -> list[int]:
    """Keeps this process on `threads` of the cores that it may use, the next ones for each rank of a machine; which ones."""
    allowed = sorted(os.sched_getaffinity(0))
    own = sorted({allowed[(local_rank * threads + i) % len(allowed)] for i in range(threads)})
    os.sched_setaffinity(0, own)
    return own


def _measure(values: argparse.Namespace, settings: config.Config, place: world.World, collectives: Collectives) -> dict[str, Any]:
    images, labels = networks.random_batch(values.batch_size)
    own = slice(place.rank * values.batch_size // place.size, (place.rank + 1) * values.batch_size // place.size)
    preload(settings)
    base = memory.reset_peak(place.device)
    engine = build_engine(networks.build(settings).to(place.device), settings, place)
    training = networks.Training(engine, place, (images[own].to(place.device), labels[own].to(place.device)))
    _steps(training, values.warm_up, place)
    before = _counted(place)
    step_s = _steps(training, values.steps, place)
    after = _counted(place)
    collectives.on = True
    noted_s = sum(_steps(training, NOTED_STEPS, place))
    collectives.on = False
    tcp = before is not None and after is not None and place.device.type == "cpu"
    calls, sizes = Counter(call.kind for call in collectives.calls), Counter[str]()
    for call in collectives.calls:
        sizes[call.kind] += call.bytes
    return {
        "step_s": step_s,
        "sent_bytes": (after - before) / values.steps if tcp else None,  # type: ignore[operator]
        "noted_step_s": noted_s / NOTED_STEPS,
        "communication_s": collectives.seconds / NOTED_STEPS,
        "collectives": {kind: {"calls": calls[kind] / NOTED_STEPS, "bytes": sizes[kind] / NOTED_STEPS} for kind in sorted(calls)},
        "base_bytes": base,
        "peak_bytes": memory.peak_bytes(place.device),
        "losses": training.losses,
    }


def _counted(place: world.World) -> int | None:
    """Bytes sent by now, when every rank has what it was sent."""
    if place.size > 1:
        dist.barrier()
    return bytes_sent()


def _steps(training: networks.Training, steps: int, place: world.World) -> list[float]:
    """Seconds of each step."""
    taken = []
    for _ in range(steps):
        begin = time.perf_counter()
        training.step()  # ends with reading the loss on the host, but for the optimiser
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
        taken.append(time.perf_counter() - begin)
    return taken


def _of_all_ranks(found: dict[str, Any], place: world.World) -> list[dict[str, Any]]:
    results: list[Any] = [found] * place.size
    if place.size > 1:
        dist.all_gather_object(results, found)
    return results


if __name__ == "__main__":
    main()
