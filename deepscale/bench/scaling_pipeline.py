"""The part of `deepscale bench scaling` on pipelines: step time, waiting and memory of every stage, beside one stage with the same micro batches.

A record is a launch's result (staged.py) with its stages and micro batches.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from deepscale.bench.report import markdown, number
from deepscale.plan_pipeline import bubble

MB = 1e6
Record = dict[str, Any]
HEADINGS = [
    "stages", "micro batches", "images/s", "of one stage's", "waiting", "formula", "busy, s a step, by stage", "planned share of the work",
    "parameters", "peak memory, MB", "planned, MB",
]  # fmt: skip


def record_of(micro_batches: int, batch_size: int, found: dict[str, Any]) -> Record:
    """What is kept of a launch."""
    stages = found["stages"]
    cores = {core for stage in stages for core in stage["cores"]}
    return {"micro_batches": micro_batches, "batch_size": batch_size, "cores": len(cores), "stages": stages}


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A row of numbers for each (stages, micro batches), medians over its launches."""
    launches: dict[tuple[int, int], list[Record]] = {}
    for record in records:
        launches.setdefault((len(record["stages"]), record["micro_batches"]), []).append(record)
    found = []
    for (stages, micro_batches), own in sorted(launches.items()):

        def each(name: str, own: list[Record] = own, stages: int = stages) -> list[float]:
            return [statistics.median(record["stages"][i][name] for record in own) for i in range(stages)]

        step_s = statistics.median(statistics.median(record["stages"][0]["step_s"]) for record in own)
        # Passes begin and end together; what is not busy is waiting, sending among it.
        waiting = [1 - statistics.fmean(stage["busy_s"] / stage["passes_s"] for stage in r["stages"]) for r in own] if stages > 1 else [0.0]
        grown = [statistics.median(r["stages"][i]["peak_bytes"] - r["stages"][i]["base_bytes"] for r in own) for i in range(stages)]
        found.append(
            {
                "stages": stages, "micro_batches": micro_batches, "step_s": step_s, "images_per_s": own[0]["batch_size"] / step_s,
                "waiting": statistics.median(waiting), "bubble": bubble(stages, micro_batches), "busy_s": each("busy_s"),
                "planned_share": each("planned_share"), "parameters": each("parameters"), "peak_bytes": grown, "planned_bytes": each("planned_bytes"),
                "launches": len(own), "oversubscribed": min(record["cores"] for record in own) < stages, "losses": own[0]["stages"][0]["losses"],
            }
        )  # fmt: skip
    alone = {row["micro_batches"]: row for row in found if row["stages"] == 1}
    for row in found:
        one = alone.get(row["micro_batches"])
        row["speedup"] = None if one is None else row["images_per_s"] / one["images_per_s"]
        pairs = [] if one is None else list(zip(row["losses"], one["losses"], strict=True))
        row["losses_apart"] = max((abs(a - b) / abs(b) for a, b in pairs), default=None)
    return found


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table."""
    several = row["stages"] > 1
    values = [
        f"{row['stages']}" + (" (!)" if row["oversubscribed"] else ""),
        f"{row['micro_batches']}",
        number(row["images_per_s"]),
        "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        f"{row['waiting']:.0%}" if several else "",
        f"{row['bubble']:.0%}" if several else "",
        " ".join(f"{value:.3g}" for value in row["busy_s"]) if several else "",
        " ".join(f"{value:.0%}" for value in row["planned_share"]),
        " ".join(f"{value:,.0f}" for value in row["parameters"]),
        " ".join(f"{value / MB:.0f}" for value in row["peak_bytes"]),
        " ".join(f"{value / MB:.0f}" for value in row["planned_bytes"]),
    ]
    return dict(zip(HEADINGS, values, strict=True))


def section(records: Sequence[Record]) -> list[str]:
    """The page's lines on pipelines; none without records."""
    found = rows(records)
    if not found:
        return []
    table = [list(cells(row).values()) for row in found]
    launches = sorted({row["launches"] for row in found})
    apart = [row["losses_apart"] for row in found if row["losses_apart"] is not None and row["stages"] > 1]
    losses = [f"Losses of every step equal one stage's within {max(apart):.0e}: the clipped norm is summed stage by stage."] if apart else []
    return [
        "## Pipeline: the depth cut into stages, a rank each",
        "",
        "The network and the batch of strong scaling, cut into micro batches (`--accumulation`) and into stages (`--pipeline-stages`) by DeepSpeed's",
        f"PipelineEngine; n = {' to '.join(map(str, dict.fromkeys((launches[0], launches[-1]))))} launches. {' '.join(losses)}",
        "",
        *markdown([HEADINGS, *table], left=1),
        "",
        "Of one stage's: images/s against one rank's with the same micro batches. Waiting: share of the passes' time that a stage is in no forward",
        "or backward pass, in the mean over stages: the bubble, what stages differ by, and sending; formula: (P - 1)/(M + P - 1) of P stages and M",
        "micro batches. Several numbers are the stages', from the image on. Memory is over the process with everything imported.",
        "",
    ]
