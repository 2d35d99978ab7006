"""`deepscale plan --table`: a page on very deep networks in clusters: memory, communication and the largest depth, by the planner's formulas."""

import argparse
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from deepscale import plan
from deepscale.config import Config
from deepscale.machine import Machine
from deepscale.plan_choices import at_depth, choose, deepest, placements
from deepscale.plan_communication import GPU_BANDWIDTH, NODE_BANDWIDTH, Cluster, communication_of, traffic_of
from deepscale.plan_memory import fits, memory_of
from deepscale.progress import seconds

DEPTHS, WIDTHS = (100_000, 1_000_000), (64, 128, 256, 512)
NODES, GPUS, DEVICE_MEMORY, HOST_MEMORY = 16, 8, 80 * 2**30, 2**40  # where nothing else is given
ABOUT = "100,000 and 1,000,000 layers at widths 64 to 512, on one node and on --nodes (16) of --gpus-per-node (8) GPUs of --device-memory (80GiB)"
SHAPE = {"channels": 3, "image_size": 32, "classes": 10}
Target = Callable[[Config, argparse.Namespace, Cluster], tuple[Machine, Any]]


def page(asked: Config, given: argparse.Namespace, target: Target, arguments: list[str]) -> str:
    """The page, for one node and for several."""
    given.device_memory, given.host_memory = given.device_memory or DEVICE_MEMORY, given.host_memory or HOST_MEMORY
    local = given.gpus_per_node or GPUS
    bandwidths = given.gpu_bandwidth or GPU_BANDWIDTH, given.node_bandwidth or NODE_BANDWIDTH
    clusters = [Cluster(nodes, local, *bandwidths) for nodes in dict.fromkeys((1, given.nodes or NODES))]
    lines = [
        "# Very deep networks in a cluster, on paper",
        "",
        f"GPUs of {_gib(given.device_memory)}, nodes of {local} with {_gib(given.host_memory)} of host memory; bf16 branches, 32x32 images, the",
        "batch nearest to 64 that divides over the ranks. Nothing here was trained: memory is the planner's (how far to trust it: README), bytes are",
        "those of the [formulas](scaling.md#bytes-by-formula), which are checked against what real ranks send, and the time is bytes over bandwidth:",
        f"{bandwidths[0] / 1e9:g} GB/s from a GPU to another of its node, {bandwidths[1] / 1e9:g} GB/s from a node to others, the slower deciding,",
        "and nothing hidden behind computation.",
        "",
    ]
    for cluster in clusters:
        machine, _ = target(asked, given, cluster)
        lines += [f"## {cluster.nodes} node{'s' if cluster.nodes > 1 else ''}, {cluster.ranks} GPUs", "", *_networks(asked, machine, cluster), ""]
        lines += [
            f"Deepest networks that fit {cluster.ranks} GPUs, layers, blocks recomputed (at most 1,000,001):",
            "",
            *_deepest(asked, machine),
            "",
        ]
    lines += [
        "A choice is the fastest that fits, else the smallest (**no**). `deepscale plan --nodes 16 --gpus-per-node 8 --device-memory 80GiB",
        "--host-memory 1TiB --depth 100000 --width 64` shows all choices of one network.",
        "",
        "Written by",
        "",
        "```bash",
        shlex.join(["deepscale", "plan", *arguments]) + " > docs/plan.md",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _networks(asked: Config, machine: Machine, cluster: Cluster) -> Iterator[str]:
    """A row for each depth and width: what is chosen, and what it takes."""
    heading = ["layers", "width", "parameters", "fits", "ZeRO, offload, activations", "memory of a GPU", "of the host, a rank"]
    heading += ["a rank sends in a step", "a node sends to others", "time of that"]
    yield f"| {' | '.join(heading)} |"
    yield "|---" * len(heading) + "|"
    for depth in DEPTHS:
        for width in WIDTHS:
            settings = _settings(asked, machine, depth, width)
            chosen = choose(settings, machine, **SHAPE)
            memory = memory_of(chosen, machine.ranks, **SHAPE)
            found = communication_of(chosen, machine.ranks, SHAPE["channels"], SHAPE["classes"])
            traffic, engine = traffic_of(found, cluster), chosen.engine
            how = f"{engine.zero}, {engine.offload}, {engine.activations}"
            cells = [f"{chosen.model.built_depth:,}", str(width), _count(memory.parameters), "yes" if fits(memory, machine) else "**no**", how]
            cells += [_gib(memory.device), _gib(memory.host), _gb(found.sent), _gb(traffic.node), seconds(traffic.seconds)]
            yield f"| {' | '.join(cells)} |"


def _deepest(asked: Config, machine: Machine) -> Iterator[str]:
    """The largest depth of each width, by ZeRO stage and offload."""
    places = placements(_settings(asked, machine, DEPTHS[0], WIDTHS[0]))
    yield "| width | " + " | ".join(f"ZeRO {zero}{', cpu' if offload == 'cpu' else ''}" for zero, offload in places) + " |"
    yield "|---" * (len(places) + 1) + "|"
    for width in WIDTHS:
        settings = _settings(asked, machine, DEPTHS[0], width)
        found = [deepest(settings, place, "recompute", machine, **SHAPE) for place in places]
        yield f"| {width} | " + " | ".join("none" if depth is None else f"{depth:,}" for depth in found) + " |"


def _settings(asked: Config, machine: Machine, depth: int, width: int) -> Config:
    return at_depth(plan.settled(plan.largest(asked.replace(width=width), machine.ranks), machine), depth)


def _gib(value: float) -> str:
    """ "12.3 GiB", "1.2 TiB"."""
    return "0" if not value else f"{value / 2**40:,.3g} TiB" if value >= 2**40 else f"{value / 2**30:.3g} GiB"


def _gb(value: float) -> str:
    return "0" if not value else f"{value / 1e12:,.3g} TB" if value >= 1e12 else f"{value / 1e9:.3g} GB"


def _count(value: int) -> str:
    return f"{value / 1e9:,.1f} billion"
