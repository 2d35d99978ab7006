"""A plan as text and as numbers for scripts: one record, and the tables made from it."""

import dataclasses
from typing import Any

from deepscale.config import Config
from deepscale.depth import MAX_DEPTH
from deepscale.machine import Machine
from deepscale.plan_choices import Choice
from deepscale.plan_memory import fits, memory_of
from deepscale.progress import gib, seconds

Record = dict[str, Any]


def choice_record(choice: Choice, settings: Config, machine: Machine, shape: dict[str, int]) -> Record:
    """Bytes per rank of one choice, by cause, on device and host."""
    memory = memory_of(settings, machine.ranks, **shape)
    states = memory.states
    device = {"weights": states.weights, "gradients": states.gradients, "optimizer": states.optimizer}
    device |= {"buffers": states.buffers + states.gathered + max(states.arrived, states.stepping), "kept": memory.kept, "segment": memory.segment}
    device |= {"workspace": memory.workspace, "data": memory.data, "retained": memory.retained, "peak": memory.device}
    host = {"weights": states.weights_host, "gradients": states.gradients_host, "optimizer": states.optimizer_host}
    host |= {"kept": memory.kept_host, "peak": memory.host}
    return dataclasses.asdict(choice) | {"device": device, "host": host, "disk": states.disk, "total": memory.total, "fits": fits(memory, machine)}


def text(record: Record) -> str:
    """The plan as a reader wants it."""
    machine = record["machine"]
    where = f"CPU with {gib(machine['host_bytes'])} left" if machine["device"] == "cpu" else f"GPU with {gib(machine['device_bytes'])} left"
    host = "" if machine["device"] == "cpu" else f", {gib(machine['host_bytes'])} on the host"
    lines = [
        f"planned for: {machine['ranks']} x {where}{host}, per rank, beside a process of {gib(machine['process_bytes'])} with its packages and images"
        + ("" if machine["device"] == "cpu" else ", and CUDA's own 0.5 GiB on the device"),
        "",
    ]
    return "\n".join(lines + (_depths(record) if "depths" in record else _plan(record)))


def _plan(record: Record) -> list[str]:
    flops, chosen = record["flops"], record["recommended"]
    again = f", computed again {_tera(flops['again'])}" if flops["again"] else ""
    step = "no calibration: the device is not this machine's" if record["step_s"] is None else f"about {seconds(record['step_s'])}"
    rows = [row for row in record["choices"] if (row["zero"], row["offload"]) == (chosen["zero"], chosen["offload"])]
    return [
        *record["notes"],
        f"FLOPs a step: {_tera(flops['total'])} (forward {_tera(flops['forward'])}, backward {_tera(flops['backward'])}{again})",
        f"seconds a step: {step}",
        "",
        "Per rank, GiB: what rests, and the peak by activation policy. `!` does not fit, `<` is recommended.",
        *_states(record),
        "",
        f"Activations and what passes, per rank, GiB, with ZeRO {chosen['zero']}, offload {chosen['offload']}:",
        *_table(
            [["activations", "kept", "on the host", "one segment", "workspace", "data", "held by malloc"]]
            + [[_policy(row), *(_gib(v) for v in _causes(row))] for row in rows]
        ),
        "",
        *_pipeline(record),
        *_communication(record),
        "to train it:",
        f"  {record['command']}",
    ]


def _pipeline(record: Record) -> list[str]:
    """The stages of a pipeline, a line for each."""
    found = record["pipeline"]
    if found is None:
        return []
    head = ["stage", "parts", "parameters", "of the FLOPs", "open micro batches", "weights, gradients, optimizer", "kept", "peak"]
    rows = [
        [
            f"{i}", f"{own['parts']}", f"{own['parameters']:,}", f"{own['flops']:.0%}", f"{own['open']}", _gib(own["states"]), _gib(own["kept"]),
            _gib(own["total"]),
        ]
        for i, own in enumerate(found["stages"], 1)
    ]  # fmt: skip
    said = f"{found['micro_batches']} micro batch{'es' if found['micro_batches'] > 1 else ''} a step (--accumulation)"
    return [f"Pipeline, {said}: a stage waits {found['bubble']:.0%} of the passes' time. GiB of a rank:", *_table([head, *rows]), ""]


def _communication(record: Record) -> list[str]:
    """What ranks send each other, a line for each ZeRO stage."""
    rows, cluster = record["communication"], record["cluster"]
    if not rows:
        return []
    timed = rows[0]["seconds"] is not None
    gpu, node = (f"{cluster[f'{name}_bandwidth'] / 1e9:g} GB/s" for name in ("gpu", "node"))
    said = f"; seconds at {gpu} from a GPU to another of its node and {node} from a node to others, nothing of it hidden behind computation"
    lines = [["ZeRO", "each rank sends", "of it within its node", "a node sends to others", *(["seconds"] if timed else [])]]
    for row in rows:
        amounts = [f"{row[name] / 1e9:.3g} GB" for name in ("sent", "gpu", "node")]
        lines.append([str(row["zero"]), *amounts, *([seconds(row["seconds"])] if timed else [])])
    nodes = f"{cluster['nodes']} node{'s' if cluster['nodes'] > 1 else ''} of {cluster['ranks_per_node']} ranks"
    return [f"Sent in a step, {nodes}{said if timed else ''}:", *_table(lines), ""]


def _causes(row: Record) -> list[int]:
    device = row["device"]
    return [device["kept"], row["host"]["kept"], device["segment"], device["workspace"], device["data"], device["retained"]]


def _states(record: Record) -> list[str]:
    """One line for each ZeRO stage and offload."""
    found, policies = record["choices"], list(dict.fromkeys(_policy(row) for row in record["choices"]))
    chosen = (record["recommended"]["zero"], record["recommended"]["offload"], _policy(record["recommended"]))
    head = ["ZeRO", "offload", "weights", "gradients", "optimizer", "buffers", "on the host", *policies]
    disk = any(row["disk"] for row in found)
    lines = [head + ["on a disk"] * disk]
    for zero, offload in sorted({(row["zero"], row["offload"]) for row in found}, key=lambda place: (place[1] == "cpu", place[0])):
        own = {_policy(row): row for row in found if (row["zero"], row["offload"]) == (zero, offload)}
        first = next(iter(own.values()))
        states = [first["device"][name] for name in ("weights", "gradients", "optimizer", "buffers")]
        peaks = [_peak(own[name], record, (zero, offload, name) == chosen) if name in own else "" for name in policies]
        lines.append(
            [
                str(zero),
                offload,
                *(_gib(value) for value in (*states, first["host"]["peak"] - first["host"]["kept"])),
                *peaks,
                *([_gib(first["disk"])] * disk),
            ]
        )
    return _table(lines)


def _peak(row: Record, record: Record, chosen: bool) -> str:
    one = record["machine"]["device"] == "cpu"
    return _gib(row["total"] if one else row["device"]["peak"]) + ("<" if chosen else "" if row["fits"] else "!")


def _depths(record: Record) -> list[str]:
    """How deep every choice can go."""
    rows, sizes = record["depths"], record["sizes"]
    policies = list(dict.fromkeys(_policy(row) for row in rows))
    lines = [["ZeRO", "offload", *policies]]
    for place in dict.fromkeys((row["zero"], row["offload"]) for row in rows):
        own = {_policy(row): row["max_depth"] for row in rows if (row["zero"], row["offload"]) == place}
        lines.append([str(place[0]), place[1], *(f"{own[name]:,}" if own.get(name) else "none" for name in policies)])
    return [
        f"Deepest networks that fit, layers (at most {MAX_DEPTH + 1:,}), at width {sizes['width']}, patch {sizes['patch_size']}, "
        f"batch {sizes['batch_size']}, {sizes['precision']}:",
        *_table(lines),
    ]


def _policy(row: Record) -> str:
    return str(row["activations"]) + (f" {row['segment']}" if row.get("segment") else "")


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}" if value else "0"


def _tera(flops: float) -> str:
    """FLOPs with three digits: "57.1 TFLOP", "812 GFLOP"."""
    return f"{flops / 1e12:.3g} TFLOP" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP"


def _table(lines: list[list[str]]) -> list[str]:
    """Markdown: the first line is the head; words to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = [not lines[-1][i][:1].isdigit() for i in range(len(widths))]
    rows = [" | ".join(c.ljust(w) if left[i] else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    rows.insert(1, "-|-".join("-" * width for width in widths))
    return [f"| {row} |" if i != 1 else f"|-{row}-|" for i, row in enumerate(rows)]
