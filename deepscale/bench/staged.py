"""A program, one process per stage of a pipeline: training steps of one network cut by its depth; what every stage takes, as JSON.

A rank is pinned to cores of its own (ranked.py). Of a step's time, what a stage is in forward and backward passes is counted apart: the rest of
the passes it waits for others, or sends. One stage is the plain engine with as many micro batches.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepscale import config, errors, kernel, memory, ops, world
from deepscale.bench import networks
from deepscale.bench.options import KERNELS, say, settings_of, whole
from deepscale.bench.ranked import pin
from deepscale.engine import build_engine, hush, preload
from deepscale.engine_pipeline import PipelineEngine, materialise
from deepscale.plan_memory import memories_of
from deepscale.plan_network import images_of
from deepscale.plan_pipeline import edges_of, shares

SIZES = ("depth", "width", "batch-size", "steps", "warm-up", "threads", "micro-batches")
SHAPE = {"channels": networks.CHANNELS, "image_size": networks.IMAGE_SIZE, "classes": networks.CLASSES}


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say; every rank prints the results of all in its last line."""
    command = config.parser("python -m deepscale.bench.staged", "Train one network, cut into as many stages as there are ranks, for some steps.")
    for name in SIZES:
        command.add_argument(f"--{name}", type=whole(), required=True)
    command.add_argument("--kernel", choices=KERNELS, default="auto")
    values = command.parse_args(arguments)
    hush(verbose=False)
    cores = pin(int(os.environ.get("LOCAL_RANK", "0")), values.threads)
    ops.skip_shm_comm()
    stages = int(os.environ.get("WORLD_SIZE", "1"))
    settings = networks.configuration(**settings_of(values, "depth", "width", "batch_size", "threads"))
    settings = settings.replace(pipeline_stages=stages, accumulation=values.micro_batches)
    place = world.join(settings.engine)
    try:
        found = _measure(values, kernel.choose(settings.replace(kernel=values.kernel), place, say, say), place) | {"cores": cores}
        print(json.dumps({"device": "cpu", "stages": place.gather(found)}), flush=True)
    finally:
        world.leave()


def _measure(values: argparse.Namespace, settings: config.Config, place: world.World) -> dict[str, Any]:
    preload(settings)
    base = memory.reset_peak(place.device)
    with torch.device("cpu" if place.stages == 1 else "meta"):
        model = networks.bare(settings)
    if place.stages > 1:
        edges = edges_of(settings, place.size, **SHAPE)
        materialise(model, edges[place.stage], edges[place.stage + 1], place.device)
    engine = build_engine(model.initialise(networks.SEED), settings, place)
    training = networks.Training(engine, place, networks.random_batch(values.batch_size // values.micro_batches), values.micro_batches)
    busy, step_s, passes_s = Stopwatch(), list[float](), Stopwatch()
    if isinstance(engine, PipelineEngine):
        from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass

        instructions = engine.engine._INSTRUCTION_MAP
        engine.engine._INSTRUCTION_MAP = instructions | {kind: busy.around(instructions[kind]) for kind in (ForwardPass, BackwardPass)}
        engine.passes = passes_s.around(engine.passes)  # type: ignore[method-assign]
    for step in range(values.warm_up + values.steps):
        if step == values.warm_up:
            busy.seconds = passes_s.seconds = 0.0
        place.gather(None)
        begin = time.perf_counter()
        training.step()
        if step >= values.warm_up:
            step_s.append(time.perf_counter() - begin)
    own = memories_of(settings, place.size, **SHAPE)[place.stage]
    return {
        "step_s": step_s,
        "passes_s": passes_s.seconds / values.steps,
        "busy_s": busy.seconds / values.steps,
        "base_bytes": base,
        "peak_bytes": memory.peak_bytes(place.device),
        "planned_bytes": own.total,
        "planned_share": shares(settings, images_of(settings, place.size, **SHAPE))[place.stage],
        "parameters": own.parameters,
        "losses": training.losses,
    }


class Stopwatch:
    """Seconds inside of functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is counted."""

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


if __name__ == "__main__":
    main()
