"""`deepscale bench step`: whole training steps, stacked against plain, recomputed against kept, bf16 against fp32, and 10,001 layers."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from deepscale import kernel
from deepscale.bench.deep import timed
from deepscale.bench.networks import Training, build, configuration, random_batch
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Goal, Report, Row, ratio
from deepscale.bench.worker import run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.engine import TorchEngine
from deepscale.plan_choices import FAST_SEGMENT
from deepscale.world import World

GOAL_FASTER = Goal(1.5, at_least=True)
GOAL_RECOMPUTED = Goal(1.0, at_least=True)
GOAL_LOW = Goal(1.5, at_least=True)
GOAL_DEEP_S = Goal(4.0)
DEEP_WARM_UP = 2
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def main(arguments: list[str]) -> None:
    """Measures steps. Raises BenchError where the process of the deep network fails."""
    options = Options("step", "Whole training steps (forward, loss, backward, clipping, AdamW).")
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
    options.size("deep-threads", len(os.sched_getaffinity(0)), "its threads; the default is the cores here")
    options.size("low-width", 64, "channels of stage 1 of the network whose bf16 step is compared with its fp32 step")
    options.size("low-rounds", 3, "measured rounds of these")
    options.size("segment", FAST_SEGMENT, "blocks recomputed together")
    options.parser.add_argument("--part", choices=("all", *PARTS), default="all", help="what to measure (default: all)")
    options.time_limit()
    values, report = options.parse(arguments)
    for name, part in PARTS.items():
        if values.part in ("all", name):
            part(values, report)
    report.publish(values.json)


def _compare(values: argparse.Namespace, report: Report) -> None:
    """Plain, stacked and recomputed, and stacked in torch's operators."""
    torch.set_num_threads(values.threads)
    made = {
        "plain": _training(values, plain=True),
        "stacked": _training(values),
        "recomputed": _training(values, segment=values.segment),
        "stacked in torch's operators": _training(values, kernel="torch"),
    }
    seconds = _in_turn(f"{values.depth:,} layers", made, values.warm_up, values.rounds)
    plain, stacked, recomputed, operators = seconds.values()
    report.rows += [
        Row(f"step, {name}: {_shape(values, values.width)}", "ms", tuple(1e3 * value for value in found)) for name, found in seconds.items()
    ]
    report.rows += [
        ratio("plain / stacked: how much faster stacked is", plain, stacked, GOAL_FASTER),
        ratio("plain / recomputed: the same with recomputation", plain, recomputed, GOAL_RECOMPUTED),
        ratio("recomputed / stacked: what recomputation costs", recomputed, stacked),
        ratio("stacked in torch's operators / stacked: what the kernel gains", operators, stacked),
    ]
    fastest = {name: min(found) for name, found in seconds.items()}
    report.notes.append(
        f"of the fastest steps: plain / stacked {fastest['plain'] / fastest['stacked']:.3g}, "
        f"plain / recomputed {fastest['plain'] / fastest['recomputed']:.3g}"
    )
    losses = ", ".join(f"{name} {training.losses[-1]:.6f}" for name, training in made.items())
    report.notes.append(f"loss of the last step, the same network computed four ways: {losses}")


def _low(values: argparse.Namespace, report: Report) -> None:
    """fp32 against bf16 branches at a width where matrix products count."""
    if not has_bf16():
        report.notes.append("bf16 is not measured: this processor has no instructions for it")
        return
    torch.set_num_threads(values.threads)
    made = {precision: _training(values, width=values.low_width, precision=precision) for precision in ("fp32", "bf16")}
    seconds = _in_turn(f"width {values.low_width}", made, 1, values.low_rounds)
    report.rows += [
        Row(f"step, {name}: {_shape(values, values.low_width)}", "ms", tuple(1e3 * value for value in found)) for name, found in seconds.items()
    ]
    report.rows.append(ratio("fp32 / bf16: how much faster bf16 branches are", seconds["fp32"], seconds["bf16"], GOAL_LOW))


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16: AVX-512 or AMX on x86, its own on ARM."""
    try:
        words = Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words))


def _in_turn(what: str, trainings: Mapping[str, Training], warm_up: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of steps taken in turn, in one process; who begins changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    names = list(trainings)
    for number in range(-warm_up, rounds):
        say(f"{what}: " + (f"round {number + 1} of {rounds}" if number >= 0 else "warm-up"))
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            _, wall = timed(trainings[name].step)
            if number >= 0:
                seconds[name].append(wall)
    return seconds


def _shape(values: argparse.Namespace, width: int) -> str:
    return f"{depth_of_blocks(blocks_for_depth(values.depth)):,} layers, width {width}, batch {values.batch_size}"


def _training(values: argparse.Namespace, plain: bool = False, **chosen: Any) -> Training:
    """A network of the comparison, all activations kept unless chosen. The plain one gets its images contiguous, as published."""
    sizes = settings_of(values, "depth", "width", "batch_size", "threads") | {"segment": 0, "kernel": "auto", "engine": "torch"}
    settings = kernel.choose(configuration(**sizes | chosen), ALONE, say, say)
    return Training(TorchEngine(build(settings, plain), settings, ALONE), ALONE, random_batch(values.batch_size, channels_last=not plain))


def _deep(values: argparse.Namespace, report: Report) -> None:
    """The deep network's step as it is trained: recomputed, ZeRO 2."""
    layers = depth_of_blocks(blocks_for_depth(values.deep_depth))
    say(f"{layers:,} layers: {values.deep_steps} steps after {DEEP_WARM_UP} of warm-up")
    wanted = {"depth": values.deep_depth, "width": values.deep_width, "batch_size": values.deep_batch_size, "segment": values.segment, "zero": 2}
    wanted |= {"threads": values.deep_threads, "warm_up": DEEP_WARM_UP, "steps": values.deep_steps}
    result = run_worker("deepscale.bench.deep", wanted, threads=values.deep_threads, limit_s=values.time_limit)
    shape = f"{layers:,} layers, width {values.deep_width}, batch {values.deep_batch_size}, recomputed, ZeRO 2"
    threads = f"{values.deep_threads} thread{'s' if values.deep_threads > 1 else ''}"
    report.rows += [
        Row(f"step, {shape}, {threads}", "s", tuple(result["step_wall_s"]), GOAL_DEEP_S),
        Row("the same, of all threads together", "CPU s", tuple(result["step_cpu_s"])),
    ]


PARTS: dict[str, Callable[[argparse.Namespace, Report], None]] = {"compare": _compare, "low": _low, "deep": _deep}
