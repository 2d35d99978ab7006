"""`deepscale bench zero3`: starting and training 10,001 layers under ZeRO-3, what ZeRO adds to a step, and what ZeRO-3 gathers at once."""

import argparse
import statistics
from typing import Any

from deepscale.bench.gathered import AHEAD
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import GB, Goal, Report, Row
from deepscale.bench.worker import run_ranks, run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks

GOAL_START_CPU_S = Goal(30.0)
GOAL_STACKS = Goal(3.0)
RANKS = 2
# The engines of a step, by what they are called: --engine, --zero, --offload of deep.py.
ENGINES: dict[str, dict[str, Any]] = {"plain torch": {"engine": "torch"}, **{f"ZeRO {stage}": {"zero": stage} for stage in range(4)}}
ENGINES["ZeRO 3, all offloaded"] = {"zero": 3, "offload": "cpu"}
STARTED = ("ZeRO 2", "ZeRO 3", "ZeRO 3, all offloaded")
# What is gathered ahead, and how the forward pass keeps: names of gathered.py and activations.py.
CASES = [("recompute", "auto"), ("keep", "auto"), ("selective", "auto"), ("recompute", "none"), ("recompute", "deepspeed")]
AHEAD_SAYS = {"auto": "as ds_configs/", "none": "nothing ahead", "deepspeed": "DeepSpeed's own sizes"}
assert set(AHEAD_SAYS) == set(AHEAD)


def main(arguments: list[str]) -> None:
    """Measures in fresh processes. Raises BenchError where one fails."""
    options = Options("zero3", "ZeRO-3 at depth: start, step and memory on one rank, and the parameters gathered at once on two.")
    options.parser.add_argument("--part", choices=("all", "start", "gathered"), default="all", help="what to measure (default: all)")
    options.depth("depth", 10_001, "layers that are started and trained on one rank")
    options.size("width", 8, "their channels of stage 1")
    options.size("batch-size", 8, "their images per step")
    options.size("steps", 3, "steps of each; the first is not among those that are timed", low=2)
    options.depth("gathered-depth", 1004, "layers of the network that two ranks share")
    options.size("gathered-width", 16, "its channels of stage 1")
    options.size("gathered-batch-size", 8, "its images per step, over both ranks")
    options.size("rounds", 1, "processes of each kind, in turn")
    options.time_limit()
    values, report = options.parse(arguments)
    if values.part != "gathered":
        _start(values, report)
    if values.part != "start":
        _gathered(values, report)
    report.publish(values.json)


def _start(values: argparse.Namespace, report: Report) -> None:
    """CPU seconds of start and step, and peak memory, of the same network under every engine."""
    layers = _layers(values.depth)
    sizes = settings_of(values, "depth", "width", "batch_size") | {"threads": 1, "warm_up": 1, "steps": values.steps - 1}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    for number in range(values.rounds):
        for name, engine in ENGINES.items():
            say(f"{layers}, {name}, {number + 1} of {values.rounds}")
            results[name].append(run_worker("deepscale.bench.deep", {**sizes, **engine}, threads=1, limit_s=values.time_limit))
    for name in STARTED:
        taken = tuple(result["start_cpu_s"] + result["late_cpu_s"] for result in results[name])
        report.rows.append(Row(f"start, {layers}, {name}", "CPU s", taken, GOAL_START_CPU_S))
    for name, runs in results.items():
        report.rows.append(Row(f"step, {layers}, {name}", "CPU s", tuple(cpu for run in runs for cpu in run["step_cpu_s"])))
        beside = tuple(cpu - blocks for run in runs for cpu, blocks in zip(run["step_cpu_s"], run["blocks_cpu_s"], strict=True))
        report.rows.append(Row(f"of it beside the blocks' passes, {name}", "CPU s", beside))
        report.rows.append(Row(f"peak over the start, {name}", "GB", tuple((run["peak_bytes"] - run["base_bytes"]) / GB for run in runs)))
    plain = results["plain torch"][0]["losses"]
    furthest = max(_apart(run["losses"], plain) for runs in results.values() for run in runs)
    report.notes.append(f"losses of {len(plain)} steps, largest relative difference from plain torch: {furthest:.1e}")


def _gathered(values: argparse.Namespace, report: Report) -> None:
    """Elements gathered at once on two ranks, in the largest stack's, and seconds of a step."""
    layers = _layers(values.gathered_depth)
    sizes = {name: getattr(values, f"gathered_{name}") for name in ("depth", "width", "batch_size")} | {"steps": values.steps}
    results: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in CASES}
    for number in range(values.rounds):
        for activations, ahead in CASES:
            say(f"{RANKS} ranks, {layers}, {activations}, {AHEAD_SAYS[ahead]}, {number + 1} of {values.rounds}")
            options = {**sizes, "activations": activations, "ahead": ahead}
            found = run_ranks("deepscale.bench.gathered", options, ranks=RANKS, threads=1, limit_s=values.time_limit)
            results[activations, ahead].append(found)
    for (activations, ahead), runs in results.items():
        what = f"{activations}, {AHEAD_SAYS[ahead]}"
        goal = GOAL_STACKS if ahead == "auto" else None
        report.rows += [
            Row(f"gathered at once on {RANKS} ranks, {layers}: {what}", "stacks", _in_stacks(runs, "gathered"), goal),
            Row(f"alive of gathered memory: {what}", "stacks", _in_stacks(runs, "alive"), goal),
            Row(f"a step: {what}", "s", tuple(statistics.median(run["step_s"][1:]) for run in runs)),
            Row(f"peak over the start: {what}", "GB", tuple((run["peak_bytes"] - run["base_bytes"]) / GB for run in runs)),
        ]
    every = [run for runs in results.values() for run in runs]
    first = every[0]
    together = [f"{max(run['together'] for run in runs)} ({name}, {AHEAD_SAYS[ahead]})" for (name, ahead), runs in results.items()]
    report.notes += [
        f"a stack is the largest of {first['stacks']}, {first['largest'] * 4 / 1e6:.1f} MB; all parameters are "
        f"{first['total'] / first['largest']:.1f} of it; stacks of any size gathered at once, whole or in part: {', '.join(together)}",
        f"losses of {len(first['losses'])} steps on {RANKS} ranks, largest relative difference from plain torch on one: "
        f"{max(_apart(run['losses'], run['plain_losses']) for run in every):.1e}",
    ]


def _in_stacks(runs: list[dict[str, Any]], name: str) -> tuple[float, ...]:
    return tuple(run[name] / run["largest"] for run in runs)


def _layers(depth: int) -> str:
    return f"{depth_of_blocks(blocks_for_depth(depth)):,} layers"


def _apart(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
