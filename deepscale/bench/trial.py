"""A program: training steps of one network in plain torch in a fresh process, and the memory at each point as JSON.

Nothing is imported that a plain torch program would not: no DeepSpeed, no tracker. Both sides of the comparison take the same
steps with the same AdamW. On a GPU the program keeps its own limit; on a CPU its parent does (limit.py).
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from deepscale import config, errors, kernel, memory
from deepscale.bench import networks
from deepscale.bench.gpu_network import limit_memory
from deepscale.bench.limit import OUT_OF_MEMORY, TRAINED
from deepscale.bench.options import KERNELS, say, settings_of, whole
from deepscale.engine import TorchEngine, hush
from deepscale.outcome import is_out_of_memory
from deepscale.world import World

PLAIN = "plain"


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say, and prints the result in the last line."""
    command = config.parser("python -m deepscale.bench.trial", "Train one network for some steps in this process.")
    for name in ("depth", "width", "batch-size", "segment", "steps", "threads", "memory"):
        command.add_argument(f"--{name}", type=whole(), required=True)
    command.add_argument("--policy", required=True, help="plain: the published network; else what the stacked one keeps")
    command.add_argument("--kernel", choices=KERNELS, default="torch", help="of the stacked network's blocks")
    command.add_argument("--device", choices=("cpu", "cuda"), required=True)
    values = command.parse_args(arguments)
    hush(verbose=False)
    torch.set_num_threads(values.threads)
    print(json.dumps(_train(values)), flush=True)


def _train(values: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(values.device)
    if device.type == "cuda":
        limit_memory(device, values.memory)
        torch.cuda.reset_peak_memory_stats(device)
    base = memory.resident_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    result: dict[str, Any] = {"outcome": TRAINED, "base_bytes": base, "peaks": [], "step_s": [], "losses": []}
    try:
        training = build(values, device)
        result["built_bytes"] = memory.resident_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)
        for _ in range(values.steps):
            begin = time.perf_counter()
            training.step()
            result["step_s"].append(time.perf_counter() - begin)
            result["peaks"].append(memory.peak_bytes(device))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result["outcome"] = OUT_OF_MEMORY
    return result | {"peak_bytes": memory.peak_bytes(device), "losses": training.losses if result["peaks"] else []}


def build(values: argparse.Namespace, device: torch.device) -> networks.Training:
    """The network on its engine, with its batch."""
    settings = settings_for(values, values.policy, values.depth)
    place, plain = World(0, 1, 0, 1, device), values.policy == PLAIN
    if not plain:
        settings = kernel.choose(settings.replace(kernel=values.kernel), place, say, say)
    images, labels = networks.random_batch(values.batch_size, channels_last=not plain)
    engine = TorchEngine(networks.build(settings, plain).to(device), settings, place)
    return networks.Training(engine, place, (images.to(device), labels.to(device)))


def settings_for(values: argparse.Namespace, policy: str, depth: int) -> config.Config:
    """The settings of a network under this policy; the plain one keeps what autograd does."""
    sizes = settings_of(values, "width", "batch_size", "threads") | {"engine": "torch", "depth": depth}
    if policy in config.IN_SEGMENTS:
        return networks.configuration(**sizes, segment=values.segment).replace(activations=policy)
    return networks.configuration(**sizes, segment=0).replace(activations="keep" if policy == PLAIN else policy)


if __name__ == "__main__":
    main()
