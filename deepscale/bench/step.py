"""`deepscale bench step`: whole training steps, stacked against plain, recomputed against kept, and 10,001 layers."""

import argparse
import os

import torch

from deepscale.bench.deep import timed
from deepscale.bench.networks import Training, build, configuration, random_batch
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Goal, Report, Row, ratio
from deepscale.bench.worker import run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.engine import TorchEngine
from deepscale.plan import FAST_SEGMENT
from deepscale.world import World

GOAL_FASTER = Goal(1.3, at_least=True)
GOAL_RECOMPUTED = Goal(1.4)
GOAL_DEEP_CPU_S = Goal(5.0)
DEEP_WARM_UP = 2
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def main(arguments: list[str]) -> None:
    """Measures steps. Raises BenchError where the process of the deep network fails."""
    options = Options("step", "Whole training steps (forward, loss, backward, clipping, AdamW) in float32.")
    options.depth("depth", 110, "layers of the networks that are compared, without DeepSpeed")
    options.size("width", 16, "their channels of stage 1")
    options.size("batch-size", 64, "their images per step")
    options.size("warm-up", 2, "steps of each network before its clock starts", low=0)
    options.size("rounds", 7, "measured rounds: one step of each network")
    options.size("threads", len(os.sched_getaffinity(0)), "their threads; the default is the cores here")
    options.depth("deep-depth", 10_001, "layers of the deep network, recomputed, through DeepSpeed with ZeRO 2, in a fresh process")
    options.size("deep-width", 8, "its channels of stage 1")
    options.size("deep-batch-size", 8, "its images per step")
    options.size("deep-steps", 5, "its measured steps")
    options.size("deep-threads", 1, "its threads")
    options.size("segment", FAST_SEGMENT, "blocks recomputed together, in both parts")
    options.parser.add_argument("--part", choices=("both", "compare", "deep"), default="both", help="what to measure (default: both)")
    options.time_limit()
    values, report = options.parse(arguments)
    if values.part != "deep":
        _compare(values, report)
    if values.part != "compare":
        _deep(values, report)
    report.publish(values.json)


def _compare(values: argparse.Namespace, report: Report) -> None:
    """Plain, stacked and recomputed in turn, in one process; who begins changes from round to round."""
    torch.set_num_threads(values.threads)
    trainings = {name: _training(values, name) for name in ("plain", "stacked", "recomputed")}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(-values.warm_up, values.rounds):
        say(f"{values.depth:,} layers: " + (f"round {number + 1} of {values.rounds}" if number >= 0 else "warm-up"))
        names = list(trainings)
        for name in names[number % 3 :] + names[: number % 3]:
            _, wall = timed(trainings[name].step)
            if number >= 0:
                seconds[name].append(wall)
    shape = f"{depth_of_blocks(blocks_for_depth(values.depth)):,} layers, width {values.width}, batch {values.batch_size}"
    report.rows += [Row(f"step, {name}: {shape}", "ms", tuple(1e3 * value for value in seconds[name])) for name in trainings]
    report.rows += [
        ratio("plain / stacked: how much faster stacked is", seconds["plain"], seconds["stacked"], GOAL_FASTER),
        ratio("recomputed / stacked: what recomputation costs", seconds["recomputed"], seconds["stacked"], GOAL_RECOMPUTED),
    ]
    fastest = {name: min(values) for name, values in seconds.items()}
    report.notes.append(
        f"of the fastest steps: plain / stacked {fastest['plain'] / fastest['stacked']:.3g}, "
        f"recomputed / stacked {fastest['recomputed'] / fastest['stacked']:.3g}"
    )
    losses = ", ".join(f"{name} {training.losses[-1]:.6f}" for name, training in trainings.items())
    report.notes.append(f"loss of the last step, the same network computed three ways: {losses}")


def _training(values: argparse.Namespace, name: str) -> Training:
    """A network of the comparison. The plain one gets its images contiguous, as published, the others as the feeds give them."""
    segment = values.segment if name == "recomputed" else 0
    settings = configuration(**settings_of(values, "depth", "width", "batch_size", "threads"), segment=segment, engine="torch")
    plain = name == "plain"
    engine = TorchEngine(build(settings, plain), settings, ALONE)
    return Training(engine, ALONE, random_batch(values.batch_size, channels_last=not plain))


def _deep(values: argparse.Namespace, report: Report) -> None:
    """The deep network's step as it is trained: recomputed, ZeRO 2."""
    layers = depth_of_blocks(blocks_for_depth(values.deep_depth))
    say(f"{layers:,} layers: {values.deep_steps} steps after {DEEP_WARM_UP} of warm-up")
    wanted = {"depth": values.deep_depth, "width": values.deep_width, "batch_size": values.deep_batch_size, "segment": values.segment, "zero": 2}
    wanted |= {"threads": values.deep_threads, "warm_up": DEEP_WARM_UP, "steps": values.deep_steps}
    result = run_worker("deepscale.bench.deep", wanted, threads=values.deep_threads, limit_s=values.time_limit)
    shape = f"{layers:,} layers, width {values.deep_width}, batch {values.deep_batch_size}, recomputed, ZeRO 2"
    report.rows += [
        Row(f"step, {shape}", "CPU s", tuple(result["step_cpu_s"]), GOAL_DEEP_CPU_S),
        Row("the same, on the clock", "s", tuple(result["step_wall_s"])),
    ]
