"""`deepscale bench gradflow`: what recording the gradient of every layer costs, and what the naive way would."""

import statistics

from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Goal, Row, ratio
from deepscale.bench.worker import run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.gradflow.recorder import RECORDS
from deepscale.gradflow.schedule import record_steps
from deepscale.plan_choices import FAST_SEGMENT
from deepscale.records import counts_saturation

GOAL_NORMS = Goal(0.05)
GOAL_FULL = Goal(0.25)
GOAL_RUN = Goal(0.02)
GOAL_BYTES = Goal(100.0)
RUNS = (300, 1000, 10_000)  # steps of the runs whose share is computed
WARM_UP = 1


def main(arguments: list[str]) -> None:
    """Measures records in a fresh process. Raises BenchError where it fails."""
    options = Options("gradflow", "CPU seconds of training steps with and without a record of every layer, in turn, through DeepSpeed.")
    options.depth("depth", 10_001, "layers of the network, recomputed")
    options.size("width", 8, "channels of stage 1")
    options.size("batch-size", 8, "images per step")
    options.size("zero", 2, "ZeRO stage", low=0)
    options.size("segment", FAST_SEGMENT, "blocks recomputed together")
    options.size("rounds", 5, "measured rounds: a step without a record and one of each kind")
    options.size("naive-rounds", 2, "measured steps of the naive way, on the plain network (at 10,001 layers it takes minutes); 0: none", low=0)
    options.size("threads", 1, "threads")
    options.time_limit()
    values, report = options.parse(arguments)
    layers = depth_of_blocks(blocks_for_depth(values.depth))
    same = settings_of(values, "depth", "width", "batch_size", "zero", "threads")
    say(f"{layers:,} layers: {values.rounds} rounds of 4 steps")
    wanted = {**same, "segment": values.segment, "rounds": values.rounds, "warm_up": WARM_UP}
    found = run_worker("deepscale.bench.recorded", wanted, threads=values.threads, limit_s=values.time_limit)
    steps, norms = found["step_cpu_s"], found["norms_cpu_s"]
    plain = steps["none"]
    extra = {kind: [(with_record - without) for with_record, without in zip(steps[kind], plain, strict=True)] for kind in ("blocks", "full")}
    report.rows = [
        Row(f"step without a record, {layers:,} layers", "CPU s", tuple(plain)),
        Row(f"a record of {found['layers']:,} layers' norms", "CPU s", tuple(norms)),
        ratio("the same / step", norms, plain, GOAL_NORMS),
        ratio("a record with block outputs and their gradients / step", extra["blocks"], plain),
        ratio("a record with activation statistics, too / step", extra["full"], plain, GOAL_FULL),
    ]
    costs = {kind: statistics.median(extra[kind]) / statistics.median(plain) for kind in extra}
    report.rows += [Row(f"share of a run of {total:,} steps, default schedule", "x", (_share(total, costs),), GOAL_RUN) for total in RUNS]
    report.rows.append(Row(f"memory of {RECORDS} records", "MB", (found["record_bytes"] / 1e6,), GOAL_BYTES))
    if values.naive_rounds:
        say(f"{layers:,} layers as separate modules: {values.naive_rounds} steps")
        wanted = {**same, "network": "plain", "segment": 0, "rounds": values.naive_rounds, "warm_up": WARM_UP}
        naive = run_worker("deepscale.bench.recorded", wanted, threads=values.threads, limit_s=values.time_limit)
        report.rows.append(Row(f"naive: safe_get_full_grad and a norm of {naive['tensors']:,} tensors", "CPU s", tuple(naive["norms_cpu_s"])))
        times = statistics.median(naive["norms_cpu_s"]) / statistics.median(norms)
        report.rows.append(Row("naive / a record of norms", "x", (times,)))
    report.publish(values.json)


def _share(total: int, costs: dict[str, float]) -> float:
    """What the records of a run of `total` steps cost, as a share of the run."""
    spent, counted = 0.0, 0
    steps = record_steps(total, "auto", RECORDS).steps
    for step in steps:
        full = counts_saturation(counted, step, steps[-1])
        counted += full
        spent += costs["full" if full else "blocks"]
    return spent / total
