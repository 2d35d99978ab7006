"""A program: one network in a fresh process, through DeepSpeed or plain torch; start, steps and peak memory as JSON.

CPU seconds are of all threads of the process. The start is that of AdamW and deepspeed.initialize, the network being built
before. Both import modules of their own at their first call, which take longer than a small network's start: they are imported
ahead of it (engine.preload) and counted apart. Memory counts from before and from after those imports.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from deepscale import config, errors, kernel, memory, ops, tracking, world
from deepscale.bench import networks
from deepscale.bench.options import KERNELS, say, settings_of, whole
from deepscale.engine import Engine, build_engine, hush, preload
from deepscale.models import reversible, stack
from deepscale.plan_choices import FAST_SEGMENT


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say, and prints the result in the last line."""
    run_program("python -m deepscale.bench.deep", arguments, {"warm-up": 0, "steps": 0}, _measure)


def run_program(
    prog: str,
    arguments: Sequence[str] | None,
    numbers: Mapping[str, int],
    measure: Callable[[argparse.Namespace, config.Config, world.World], dict[str, Any]],
) -> None:
    """A measuring program of one network: its sizes and `numbers` (name -> default) as options, and its result in the last line."""
    command = config.parser(prog, "Measure one network in this process.")
    command.add_argument("--network", choices=("stacked", "plain"), default="stacked")
    command.add_argument("--engine", choices=("deepspeed", "torch"), default="deepspeed")
    command.add_argument("--offload", choices=("none", "cpu", "nvme"), default="none")
    command.add_argument("--nvme-path")
    command.add_argument("--kernel", choices=KERNELS, default="auto")
    for name in ("depth", "width", "batch-size", "threads"):
        command.add_argument(f"--{name}", type=whole(), required=True)
    for name, default in {"segment": FAST_SEGMENT, "zero": 0, **numbers}.items():
        command.add_argument(f"--{name}", type=whole(0), default=default)
    values = command.parse_args(arguments)
    hush(verbose=False)
    names = ("depth", "width", "batch_size", "segment", "engine", "zero", "offload", "nvme_path", "threads", "kernel")
    settings = networks.configuration(**settings_of(values, *names))
    try:
        place = _joined(settings)
        result = measure(values, kernel.choose(settings, place, say, say), place)
    finally:
        world.leave()
    print(json.dumps(result), flush=True)


def _joined(settings: config.Config) -> world.World:
    """The process with everything imported that training imports, and with its process group."""
    loading = tracking.preload()
    if loading is not None:
        loading.join()
    try:
        ops.skip_shm_comm()
    except ImportError:
        raise errors.MissingPackageError("deepspeed", None, "this bench") from None
    return world.join(settings.engine)


def _measure(values: argparse.Namespace, settings: config.Config, place: world.World) -> dict[str, Any]:
    base = memory.reset_peak(place.device)
    late, _ = timed(lambda: preload(settings))
    imported = memory.resident_bytes()
    models: list[nn.Module] = []
    built, _ = timed(lambda: models.append(networks.build(settings, plain=values.network == "plain")))
    engines: list[Engine] = []
    start, _ = timed(lambda: engines.append(build_engine(models[0], settings, place)))
    training = networks.Training(engines[0], place, networks.random_batch(values.batch_size, channels_last=values.network == "stacked"))
    for _ in range(values.warm_up):
        training.step()
    blocks = BlocksTime()
    steps, in_blocks = [], []
    for _ in range(values.steps):
        blocks.cpu_s = 0.0
        steps.append(timed(training.step))
        in_blocks.append(blocks.cpu_s)
    return {
        "tensors": len(list(models[0].parameters())),
        "build_cpu_s": built,
        "start_cpu_s": start,
        "late_cpu_s": late,
        "step_cpu_s": [cpu for cpu, _ in steps],
        "step_wall_s": [wall for _, wall in steps],
        "blocks_cpu_s": in_blocks,
        "losses": training.losses,
        "base_bytes": base,
        "imported_bytes": imported,
        "peak_bytes": memory.peak_bytes(place.device),
    }


class BlocksTime:
    """CPU seconds that all stacks' forward and backward passes take from now on; what a step takes beside them is the engine's."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        for function, name in itertools.product((stack._StackFunction, reversible._ReversibleFunction), ("forward", "backward")):
            setattr(function, name, staticmethod(self._counted(getattr(function, name))))

    def _counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            begin = time.process_time()
            result = work(*arguments)
            self.cpu_s += time.process_time() - begin
            return result

        return counted


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of all threads, and seconds on the clock, that the work takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
