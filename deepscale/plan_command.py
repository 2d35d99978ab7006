"""`deepscale plan`: what a run would build, what it would take, and how to start it; nothing is built, and nothing of its size allocated."""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
from typing import Any

import torch

from deepscale import config, kernel, pipeline, plan, plan_report, plan_table, world
from deepscale.config import GROUPS, Config
from deepscale.errors import UsageError
from deepscale.machine import Machine, measure_machine
from deepscale.models import registry
from deepscale.parsing import parse_bytes, parse_count
from deepscale.plan_choices import Choice, deepest, placements, policies, resolved
from deepscale.plan_communication import GPU_BANDWIDTH, NODE_BANDWIDTH, Cluster, communication_of, traffic_of
from deepscale.plan_memory import memories_of
from deepscale.plan_network import data_ranks, flops_of, images_of
from deepscale.plan_pipeline import bubble, edges_of, shares
from deepscale.plan_time import measure_step_s
from deepscale.world import World

CONTEXT_BYTES = 2**29  # of CUDA's driver and libraries, on the device beside what torch allocates; not measured here
# Python with torch, MLflow and the engine imported, resident (Linux, torch 2.15, deepspeed 0.19.8, mlflow 3.17).
PROCESS_BYTES = {"deepspeed": 1_000_000_000, "torch": 750_000_000}
DATASET_BYTES = {"fashionmnist": 70_000 * 28**2}  # held in memory; others are taken as 60,000 images of CIFAR's size
CIFAR_BYTES = 60_000 * 3 * 32**2


# Settings that decide what is built and what it takes: typed in the command even where the planner chose them.
CHOSEN = ("depth", "width", "patch_size", "batch_size", "precision", "zero", "offload", "activations", "segment", "slots", "stack_size")


def main(arguments: list[str]) -> None:
    """Prints the plan of these settings. Raises UsageError for bad input, and for what does not fit."""
    parser = config.parser("deepscale plan", "What a run with these settings will build and take, on this machine or on another.")
    size = "24GiB, 24GB, 512MiB ..."
    parser.add_argument("--device-memory", type=parse_bytes, metavar="SIZE", help=f"of the GPU to plan for: {size} (default: what is here)")
    parser.add_argument("--host-memory", type=parse_bytes, metavar="SIZE", help=f"memory of the host: {size} (default: what is free here)")
    parser.add_argument("--ranks", type=parse_count, metavar="N", help="processes, on one host, a GPU each (default: 1)")
    parser.add_argument("--nodes", type=parse_count, metavar="N", help="hosts of a cluster (default: 1)")
    parser.add_argument("--gpus-per-node", type=parse_count, metavar="N", help="ranks on each of them, a GPU each (default: 1)")
    for name, text, default in (
        ("gpu", "each GPU sends to another of its node", GPU_BANDWIDTH),
        ("node", "each node sends to others", NODE_BANDWIDTH),
    ):
        text = f"that {text} in a second (default: {default / 1e9:.0f}GB)"
        parser.add_argument(f"--{name}-bandwidth", type=parse_bytes, metavar="SIZE", help=f"bytes {text}")
    parser.add_argument("--classes", type=parse_count, default=10, metavar="N", help="classes of the data set (default: 10)")
    parser.add_argument("--max-depth", action="store_true", help="how deep each choice can go, instead of a plan for --depth")
    parser.add_argument("--table", action="store_true", help=f"a page in Markdown: {plan_table.ABOUT}")
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object on standard output")
    config.add_arguments(parser, *GROUPS)
    given = parser.parse_args(arguments)
    asked = config.from_namespace(given)
    if given.table:
        print(plan_table.page(asked, given, target, arguments), end="")
        return
    if given.max_depth and asked.model.model != "convnext":
        raise UsageError(f"--max-depth is for --model convnext, and --model {asked.model.model} was given; leave --max-depth out")
    cluster = cluster_of(given)
    machine, place = target(asked, given, cluster)
    if not given.max_depth:
        asked = kernel.choose(asked, place, _say, _say)
    grey, side = asked.data.grey or asked.data.dataset == "fashionmnist", asked.data.image_size
    shape = {"channels": 1 if grey else 3, "image_size": 32 if side == config.AUTO else side, "classes": given.classes}
    record = {"machine": dataclasses.asdict(machine) | {"process_bytes": process_bytes(asked), "here": here(given)}}
    record["cluster"] = dataclasses.asdict(cluster)
    if given.max_depth:
        record |= _depths(asked, machine, shape)
    else:
        record |= _planned(asked, given, machine, place, shape, cluster)
    print(json.dumps(record, indent=2, default=str) if given.json else plan_report.text(record))


def here(given: argparse.Namespace) -> bool:
    """Whether the device that is planned for is this machine's, so that it can be timed."""
    return given.device_memory is None


def cluster_of(given: argparse.Namespace) -> Cluster:
    """The nodes and ranks that are planned for. Raises UsageError for numbers that contradict each other."""
    nodes = given.nodes or 1
    stages = getattr(given, "pipeline_stages", 1)
    local = given.gpus_per_node or (given.ranks or stages if nodes == 1 else 1)
    if given.ranks not in (None, nodes * local):
        raise UsageError(f"{nodes:,} nodes of {local:,} ranks are {nodes * local:,}, and --ranks {given.ranks:,} was given; leave --ranks out")
    pipeline.check_ranks(stages, nodes * local)
    bandwidths = {name: value for name in ("gpu_bandwidth", "node_bandwidth") if (value := getattr(given, name)) is not None}
    return Cluster(nodes, local, **bandwidths)


def target(asked: Config, given: argparse.Namespace, cluster: Cluster) -> tuple[Machine, World]:
    """The machine that is planned for, and this process's place in it. Raises UsageError for one that cannot be."""
    if given.device_memory is not None and asked.engine.device == "cpu":
        raise UsageError("--device-memory is that of a GPU, and --device cpu was given; type --host-memory for a CPU's")
    device = "cuda" if given.device_memory is not None else world.choose_device(asked.engine)
    place = World(0, cluster.ranks, 0, cluster.ranks_per_node, torch.device(device))
    if given.device_memory is None:
        machine = measure_machine(place)
    else:
        host = measure_machine(dataclasses.replace(place, device=torch.device("cpu"))).host_bytes
        machine = Machine(device, max(0, given.device_memory - CONTEXT_BYTES), host, True, cluster.ranks)
    if given.host_memory is not None:
        machine = dataclasses.replace(machine, host_bytes=given.host_memory // cluster.ranks_per_node)
    machine = dataclasses.replace(machine, host_bytes=max(0, machine.host_bytes - process_bytes(asked)))
    return (machine if device == "cuda" else dataclasses.replace(machine, device_bytes=machine.host_bytes)), place


def process_bytes(asked: Config) -> int:
    """A training process before its network: packages, and the images in memory."""
    return PROCESS_BYTES[asked.engine.engine] + DATASET_BYTES.get(asked.data.dataset, CIFAR_BYTES)


def _planned(asked: Config, given: argparse.Namespace, machine: Machine, place: World, shape: dict[str, int], cluster: Cluster) -> dict[str, Any]:
    """The plan of a run, and of all choices at its size."""
    found = plan.resolve(asked, place, machine, **shape)
    step_s = found.step_s
    if step_s is None and here(given):
        step_s = measure_step_s(found.config, place, images_of(found.config, place.size, **shape))
    flops = flops_of(found.config, machine.ranks, **shape)
    parts = found.config.recipe.accumulation * data_ranks(found.config, machine.ranks)
    engine = found.config.engine
    chosen = Choice(int(engine.zero), engine.offload, engine.activations, engine.segment, engine.slots)
    free = _open(asked, found.config)
    choices = [resolved(Choice(*where, *policy), found.config, machine, **shape) for where in placements(free) for policy in policies(free)]
    choices += [] if chosen in choices else [chosen]
    return {
        "parameters": found.memory.parameters,
        "flops": {name: parts * value for name, value in dataclasses.asdict(flops).items()} | {"total": parts * flops.total},
        "choices": [plan_report.choice_record(choice, choice.apply(found.config), machine, shape) for choice in choices],
        "recommended": dataclasses.asdict(chosen),
        "device_bytes": found.memory.device,
        "host_bytes": found.memory.host,
        "step_s": step_s,
        "communication": _communication(found.config, given, machine, shape, cluster),
        "pipeline": _pipeline(found.config, machine, shape),
        "notes": list(found.notes),
        "command": command(asked, found.config, machine.ranks, cluster.nodes),
        "settings": config.flat(found.config),
    }


def _open(asked: Config, settings: Config) -> Config:
    """The settings with ZeRO, offload and activation policy open again where they were not given by hand."""
    names = ("zero", "offload", "activations", "segment", "slots")
    return settings.replace(**{name: config.flat(asked)[name] for name in names}) if not asked.engine.deepspeed_config else settings


def _depths(asked: Config, machine: Machine, shape: dict[str, int]) -> dict[str, Any]:
    """How deep each choice can go, at the settings' sizes."""
    settings = plan.settled(plan.largest(asked, machine.ranks), machine)
    names = dict.fromkeys(name for name, *_ in policies(settings))
    rows = [
        {"zero": zero, "offload": offload, "activations": name, "max_depth": deepest(settings, (zero, offload), name, machine, **shape)}
        for zero, offload in placements(settings)
        for name in names
    ]
    sizes = {name: config.flat(settings)[name] for name in ("width", "patch_size", "batch_size", "precision")}
    return {"sizes": sizes, "depths": rows}


def _pipeline(settings: Config, machine: Machine, shape: dict[str, int]) -> dict[str, Any] | None:
    """The stages of a pipeline, and the share of a step that they wait; None without one."""
    cut, micro_batches = settings.engine.pipeline_stages, settings.recipe.accumulation
    if cut == 1:
        return None
    memories, edges = memories_of(settings, machine.ranks, **shape), edges_of(settings, machine.ranks, **shape)
    found = shares(settings, images_of(settings, machine.ranks, **shape))
    stages = [
        {
            "parts": last - first, "parameters": memory.parameters, "flops": share, "open": min(cut - i, micro_batches), "kept": memory.kept,
            "states": memory.states_device, "total": memory.total,
        }
        for i, (memory, share, (first, last)) in enumerate(zip(memories, found, itertools.pairwise(edges), strict=True))
    ]  # fmt: skip
    return {"stages": stages, "micro_batches": micro_batches, "bubble": bubble(cut, micro_batches)}


def _communication(settings: Config, given: argparse.Namespace, machine: Machine, shape: dict[str, int], cluster: Cluster) -> list[dict[str, Any]]:
    """What each rank and node sends in a step, for every ZeRO stage of the engine; without seconds where no bandwidth is known."""
    known = machine.device == "cuda" or given.gpu_bandwidth or given.node_bandwidth
    possible = range(4) if settings.engine.pipeline_stages == 1 else pipeline.ZERO
    stages = possible if settings.engine.engine == "deepspeed" and not settings.engine.deepspeed_config else [int(settings.engine.zero)]
    rows = []
    for zero in stages if machine.ranks > 1 else []:
        own = settings.replace(zero=zero, offload="none" if zero == 0 else settings.engine.offload)
        found = communication_of(own, machine.ranks, **shape)
        traffic = traffic_of(found, cluster)
        rows.append({"zero": zero, "sent": found.sent, "gpu": traffic.gpu, "node": traffic.node, "seconds": traffic.seconds if known else None})
    return rows


def command(asked: Config, settings: Config, ranks: int, nodes: int = 1) -> str:
    """The command that trains as planned: what was given, and the planner's choices that decide what is built and what it takes."""
    values, given = config.flat(settings), config.differing(asked)
    chosen = [name for name in CHOSEN if not (name == "depth" and asked.model.blocks) and not (name in ("zero", "offload") and _fixed(asked))]
    chosen = [name for name in chosen if not (name in ("segment", "slots") and values[name] is None)]
    network = settings.model.model
    if network != "convnext":
        chosen = [name for name in chosen if name not in ("stack_size", *registry.unknown(network))]
    parts = [part for name in [*chosen, *(name for name in given if name not in CHOSEN)] for part in config.typed(name, values[name])]
    if settings.engine.offload == "nvme" and settings.engine.nvme_path is None:
        parts += ["--nvme-path", "DIR"]
    if nodes > 1:
        return shlex.join(["sbatch", f"--nodes={nodes}", f"--gpus-per-node={ranks // nodes}", "slurm/train.sbatch", *parts])
    plain = asked.engine.engine == "torch" and ranks == 1
    start = ["python", "-m", "deepscale.train"] if plain else ["deepspeed", *(["--num_gpus", str(ranks)] if ranks > 1 else []), "deepscale/train.py"]
    return ("DS_ACCELERATOR=cpu " if settings.engine.device == "cpu" and ranks > 1 else "") + shlex.join([*start, *parts])


def _fixed(asked: Config) -> bool:
    """Whether ZeRO and offload are not the command's to say: a file says them, or there is none."""
    return asked.engine.deepspeed_config is not None or asked.engine.engine == "torch"


def _say(text: str) -> None:
    print(f"plan: {text}", file=sys.stderr, flush=True)
