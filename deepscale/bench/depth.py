"""`deepscale bench depth`: how deep each activation policy trains within a limit of memory, by real runs, against the plain network.

All in plain torch on one rank, where ZeRO would only add its own copy of the parameters. Each trial is a fresh process that takes
`--steps` whole steps (the optimiser's state comes with the first, so that the second reaches the peak); limit.py keeps the limit.
"""

import argparse
import dataclasses
import os

import torch

from deepscale import memory
from deepscale.bench.bracket import Trial, ends, search
from deepscale.bench.limit import run_within
from deepscale.bench.networks import CHANNELS, CLASSES, IMAGE_SIZE
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Goal, Report, Row, number
from deepscale.bench.trial import PLAIN, settings_for
from deepscale.config import ACTIVATION_POLICIES
from deepscale.depth import LAYERS_PER_BLOCK, MAX_DEPTH, MIN_DEPTH, STAGES
from deepscale.errors import UsageError
from deepscale.models.convnext import count_parameters
from deepscale.parsing import parse_bytes, parse_duration
from deepscale.plan_memory import memory_of
from deepscale.plan_network import stage_shapes

GIB = 2**30
GOAL_DEEPER = Goal(12.0, at_least=True)
SEGMENT = 6  # blocks recomputed together: at the depths that 4 GiB hold less memory than 4 (docs/findings.md)
PLAIN_KEPT = 12  # elements per row and channel that autograd keeps of a plain block; a stacked one keeps 10
STATES = 16  # bytes per parameter: weight, gradient, AdamW's two moments


def main(arguments: list[str]) -> None:
    """Searches. Raises UsageError where the limit holds not even the smallest network, BenchError where a process fails otherwise."""
    options = Options("depth", "The deepest network that trains within a limit of memory, for each activation policy and for the plain network.")
    add = options.parser.add_argument
    add("--memory", type=parse_bytes, default=4 * GIB, metavar="SIZE", help="limit of a process: 4GiB, 512MiB (default: 4GiB)")
    known = f"of {', '.join(ACTIVATION_POLICIES)} (default: all)"
    add(
        "--policies",
        nargs="+",
        choices=ACTIVATION_POLICIES,
        default=list(ACTIVATION_POLICIES),
        metavar="NAME",
        help=f"beside the plain network, some {known}",
    )
    options.size("width", 16, "channels of stage 1")
    options.size("batch-size", 64, "images per step")
    options.size("segment", SEGMENT, "blocks recomputed together")
    options.size("steps", 2, "steps of a trial", low=2)
    options.size("tolerance", 5, "percent between the deepest that trains and the shallowest that does not")
    options.size("threads", len(os.sched_getaffinity(0)), "threads; the default is the cores here")
    options.kernel()
    add("--device", choices=("cpu", "cuda"), default="cpu", help="on a GPU the limit is that of torch's allocator (default: cpu)")
    add(
        "--time-limit",
        type=parse_duration,
        default=900.0,
        metavar="T",
        help="longest time of a trial, which counts as too slow beyond (default: 15m)",
    )
    values, report = options.parse(arguments)
    _check(values)
    policies = [PLAIN, *dict.fromkeys(values.policies)]
    if values.device == "cpu" and "offload" in policies:
        policies.remove("offload")
        report.notes.append("offload: not tried, since on a CPU host memory is the same memory: it holds what recompute holds")
    found = {policy: _search(values, policy) for policy in policies}
    _rows(values, found, report)
    report.publish(values.json)


def _check(values: argparse.Namespace) -> None:
    """What can be refused before a process is started."""
    if values.device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no GPU here; leave --device out to measure on the CPU")
        return
    own = memory.resident_bytes()
    if values.memory <= own:
        raise UsageError(
            f"--memory {_mib(values.memory)} is less than a process takes that has only imported torch ({_mib(own)}); type for example --memory 4GiB"
        )


def _search(values: argparse.Namespace, policy: str) -> list[Trial]:
    """The trials of one policy."""
    start = 0

    def run(depth: int) -> Trial:
        nonlocal start
        say(f"{policy}: {depth:,} layers")
        trial = _trial(values, policy, depth, start)
        start = start or int(trial.measured.get("built_bytes", 0))
        say(f"{policy}: {depth:,} layers: {trial.outcome}, peak {trial.peak / GIB:.2f} GiB of {values.memory / GIB:.2f}, {trial.seconds:.0f} s")
        return trial

    first = run(MIN_DEPTH)
    if ends([first])[0] is None:
        raise UsageError(
            f"--memory {_mib(values.memory)} and --time-limit {values.time_limit:.0f}s: the smallest network, {MIN_DEPTH} layers ({policy}), "
            f"ended as {first.outcome}; type a larger --memory, or a smaller --width or --batch-size"
        )
    planned = deepest_planned(values, policy, start)
    say(f"{policy}: planned to train up to {planned:,} layers")
    return search(lambda depth: first if depth == MIN_DEPTH else run(depth), planned, values.memory, values.tolerance / 100)


def _trial(values: argparse.Namespace, policy: str, depth: int, start: int) -> Trial:
    options = {"policy": policy, "depth": depth} | settings_of(
        values, "width", "batch_size", "segment", "steps", "threads", "memory", "device", "kernel"
    )
    limit = values.memory if values.device == "cpu" else None
    ended = run_within("deepscale.bench.trial", options, threads=values.threads, limit_s=values.time_limit, limit_bytes=limit)
    start = start or int(ended.result.get("built_bytes", 0))
    return Trial(policy, depth, ended.outcome, ended.peak, start + planned_bytes(values, policy, depth), ended.seconds, ended.result)


def planned_bytes(values: argparse.Namespace, policy: str, depth: int) -> int:
    """The planner's bytes of a training step; for the plain network those of `keep` and what autograd keeps more."""
    settings = settings_for(values, policy, depth)
    planned = int(memory_of(settings, 1, CHANNELS, IMAGE_SIZE, CLASSES).total)
    if policy == PLAIN:
        planned += (
            (PLAIN_KEPT - 10) * 4 * sum(blocks * rows * width for blocks, rows, width in stage_shapes(settings.model, values.batch_size, IMAGE_SIZE))
        )
    return planned


def deepest_planned(values: argparse.Namespace, policy: str, start: int) -> int:
    """The most layers that fit by plan beside a process of `start` bytes."""
    low, high = STAGES, (MAX_DEPTH - 2) // LAYERS_PER_BLOCK
    while low < high:
        middle = (low + high + 1) // 2
        fits = start + planned_bytes(values, policy, LAYERS_PER_BLOCK * middle + 2) <= values.memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return LAYERS_PER_BLOCK * low + 2


def _rows(values: argparse.Namespace, found: dict[str, list[Trial]], report: Report) -> None:
    """The table of policies, the goal, what fills the memory, and every trial for the file."""
    deepest = {policy: trial for policy, trials in found.items() if (trial := ends(trials)[0]) is not None}
    for policy, trial in deepest.items():
        failed = ends(found[policy])[1]
        report.records.append(
            {
                "policy": policy,
                "deepest that trained, layers": f"{trial.layers:,}",
                "times plain": trial.layers / deepest[PLAIN].layers,
                "peak, GiB": trial.peak / GIB,
                "planned, GiB": trial.planned / GIB,
                "s per step": min(trial.measured["step_s"]),
                "shallowest that did not, layers": f"{failed.layers:,} ({failed.outcome})" if failed else "none up to the deepest there is",
            }
        )
    if len(deepest) > 1:
        policy = max(deepest, key=lambda name: deepest[name].layers)
        times = deepest[policy].layers / deepest[PLAIN].layers
        report.rows.append(Row(f"deepest / deepest plain within {values.memory / GIB:.3g} GiB, {policy}", "x", (times,), GOAL_DEEPER))
    report.notes += [_filled(values, trial) for trial in deepest.values()]
    report.details["trials"] = [dataclasses.asdict(trial) for trials in found.values() for trial in trials]


def _filled(values: argparse.Namespace, trial: Trial) -> str:
    """What the memory at a trial's peak holds."""
    parameters = count_parameters(settings_for(values, trial.policy, trial.layers).model, CLASSES, CHANNELS)
    process = trial.measured["base_bytes"]
    rest = trial.peak - process - STATES * parameters
    shares = {
        "the process with torch imported": process,
        f"weights, gradients and moments of {parameters:,} parameters": STATES * parameters,
        "activations, buffers and what training imports": rest,
    }
    parts = ", ".join(f"{size / GIB:.2f} GiB {name} ({number(100 * size / trial.peak)} %)" for name, size in shares.items())
    return f"{trial.policy}, {trial.layers:,} layers: {parts}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}MiB"
