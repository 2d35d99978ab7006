"""`deepscale bench memory`: what training 10,001 layers adds to the process, and the activations that recomputation leaves."""

import argparse

from deepscale.bench.networks import CHANNELS, CLASSES, IMAGE_SIZE, configuration
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import GB, Goal, Row, ratio
from deepscale.bench.worker import run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.plan_choices import FAST_SEGMENT
from deepscale.plan_memory import Memory, memory_of

GOAL_PEAK_GB = Goal(1.3)
GOAL_KEPT = Goal(1 / 20)
STEPS = 3  # the optimiser's state comes with the first


def main(arguments: list[str]) -> None:
    """Measures memory in fresh processes, and puts the planner's numbers beside it. Raises BenchError where one fails."""
    options = Options("memory", "Resident memory over the process with everything imported, and bytes of activations kept for backward.")
    options.depth("depth", 10_001, "layers")
    options.size("width", 8, "channels of stage 1")
    options.size("batch-size", 8, "images per step")
    options.size("segment", FAST_SEGMENT, "blocks recomputed together")
    options.size("zero", 2, "ZeRO stage", low=0)
    options.size("rounds", 1, "processes whose peak is measured")
    options.size("kept-batch-size", 2, "images of the pass whose kept activations are counted; the ratio does not depend on it")
    options.size("threads", 1, "threads per process")
    options.time_limit()
    values, report = options.parse(arguments)
    sizes = settings_of(values, "depth", "width", "batch_size", "segment", "zero", "threads")
    results = []
    for number in range(values.rounds):
        say(f"peak memory of {values.depth:,} layers, {number + 1} of {values.rounds}")
        results.append(run_worker("deepscale.bench.deep", {**sizes, "steps": STEPS}, threads=values.threads, limit_s=values.time_limit))
    say(f"activations of {values.depth:,} layers")
    counted = settings_of(values, "depth", "width", "segment", "threads") | {"batch_size": values.kept_batch_size}
    kept = run_worker("deepscale.bench.kept", counted, threads=values.threads, limit_s=values.time_limit)
    kept_gb = {name: count / GB for name, count in kept.items()}
    planned_gb = _planned(values, values.batch_size, values.segment).total / GB
    planned_kept = {
        name: _planned(values, values.kept_batch_size, segment).kept / GB for name, segment in (("recomputed", values.segment), ("all", 0))
    }
    layers = f"{depth_of_blocks(blocks_for_depth(values.depth)):,} layers"
    peaks = tuple((result["peak_bytes"] - result["base_bytes"]) / GB for result in results)
    inner = tuple((result["peak_bytes"] - result["imported_bytes"]) / GB for result in results)
    report.rows = [
        Row(f"peak over the start, {layers}, batch {values.batch_size}, ZeRO {values.zero}", "GB", peaks, GOAL_PEAK_GB),
        Row("the same without what initialize imports", "GB", inner),
        Row("the same, planned", "GB", (planned_gb,)),
        ratio("measured / planned", inner, [planned_gb] * len(inner)),
        Row(f"kept by the forward pass, recomputed, batch {values.kept_batch_size}", "GB", (kept_gb["recomputed"],)),
        Row("the same, planned", "GB", (planned_kept["recomputed"],)),
        Row(f"kept by the forward pass, nothing recomputed, batch {values.kept_batch_size}", "GB", (kept_gb["all"],)),
        Row("the same, planned", "GB", (planned_kept["all"],)),
        ratio("kept recomputed / kept without", [kept_gb["recomputed"]], [kept_gb["all"]], GOAL_KEPT),
    ]
    base, peak = (max(result[name] for result in results) for name in ("base_bytes", "peak_bytes"))
    report.notes.append(f"a process with everything imported has {_both(base)}, at the peak {_both(peak)}; GB are 1e9 bytes, GiB 2**30")
    report.publish(values.json)


def _both(count: int) -> str:
    return f"{count / GB:.2f} GB ({count / 2**30:.2f} GiB)"


def _planned(values: argparse.Namespace, batch_size: int, segment: int) -> Memory:
    """The planner's bytes of a step."""
    settings = configuration(**settings_of(values, "depth", "width", "zero"), batch_size=batch_size, segment=segment)
    return memory_of(settings, 1, CHANNELS, IMAGE_SIZE, CLASSES)
