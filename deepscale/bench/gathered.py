"""A program, one process per rank: the parameters that ZeRO-3 gathers at once, and the losses beside plain torch's, as JSON.

A gathered parameter counts from the moment it is asked for until it is released, by its whole size. Beside it stands what is alive of the
memory that gathered parameters have had: an autograd graph that holds on to one keeps its memory after it was released.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deepscale import config, errors, memory, ops, world
from deepscale.bench import networks
from deepscale.bench.options import settings_of, whole
from deepscale.engine import DeepSpeedEngine, Engine, TorchEngine, hush
from deepscale.models.stack import BlockStack

# ZeRO sections instead of the one in ds_configs/; parameters are cut up however small, as there.
AHEAD: dict[str, dict[str, int] | None] = {
    "auto": None,
    "none": {"reduce_bucket_size": 2**20, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
    "deepspeed": {},
}


class Gathered:
    """Watches a ZeRO-3 engine: the largest numbers so far are `elements` gathered, stacks `together` with any of them, and elements `alive`.

    `largest` and `total` are elements of the largest stack and of the network. More than one rank is needed: on one, gathering is an alias.
    """

    def __init__(self, engine: DeepSpeedEngine, unit: type[nn.Module] = BlockStack) -> None:
        self.parameters: list[Any] = list(engine.module.parameters())
        self.stacks = [list(module.parameters()) for module in engine.module.modules() if isinstance(module, unit)]
        self.total = sum(p.ds_numel for p in self.parameters)
        self.largest = max(sum(p.ds_numel for p in stack) for stack in self.stacks)  # type: ignore[attr-defined]
        self.buffers: dict[int, tuple[StorageWeakRef, int]] = {}
        self.elements = self.together = self.alive = 0
        coordinator = engine.engine.optimizer.parameter_offload.get_param_coordinator()
        fetch = coordinator.fetch_sub_module

        def watched(module: nn.Module, forward: bool) -> None:
            fetch(module, forward)
            self.look()

        coordinator.fetch_sub_module = watched  # more is gathered nowhere else in a step

    def look(self) -> None:
        """Counts what is gathered now."""
        there = {id(p) for p in self.parameters if p.ds_status.name != "NOT_AVAILABLE"}
        for p in self.parameters:
            if p.ds_status.name == "AVAILABLE":
                storage = p.untyped_storage()
                self.buffers[storage.data_ptr()] = (StorageWeakRef(storage), p.ds_numel)
        self.buffers = {pointer: (storage, n) for pointer, (storage, n) in self.buffers.items() if not storage.expired()}
        self.elements = max(self.elements, sum(p.ds_numel for p in self.parameters if id(p) in there))
        self.together = max(self.together, sum(any(id(p) in there for p in stack) for stack in self.stacks))
        self.alive = max(self.alive, sum(n for _, n in self.buffers.values()))


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say; rank 0 prints the result in its last line."""
    command = config.parser("python -m deepscale.bench.gathered", "Count what ZeRO-3 gathers, on the ranks that the environment names.")
    for name in ("depth", "width", "batch-size", "steps"):
        command.add_argument(f"--{name}", type=whole(), required=True)
    command.add_argument("--activations", choices=("keep", "selective", "recompute", "offload"), default="recompute")
    command.add_argument("--ahead", choices=tuple(AHEAD), default="auto")
    values = command.parse_args(arguments)
    hush(verbose=False)
    ops.skip_shm_comm()
    settings = networks.configuration(**settings_of(values, "depth", "width", "batch_size"), zero=3)
    segment = settings.engine.segment if values.activations in ("recompute", "offload") else None
    # Gamma 1: with the published 0 no weight of a branch would have any effect on the first losses.
    settings = settings.replace(activations=values.activations, segment=segment, layerscale_init=1.0)
    place = world.join(settings.engine)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = _measure(values, _with_file(settings, AHEAD[values.ahead], Path(folder)), place)
    finally:
        world.leave()
    if place.is_main:
        print(json.dumps(result), flush=True)


def _with_file(settings: config.Config, section: dict[str, int] | None, folder: Path) -> config.Config:
    if section is None:
        return settings
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **section}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    return settings.replace(deepspeed_config=str(folder / "zero3.json"))


def _measure(values: argparse.Namespace, settings: config.Config, place: world.World) -> dict[str, Any]:
    images, labels = networks.random_batch(values.batch_size)
    alone = dataclasses.replace(place, rank=0, size=1)
    own = slice(place.rank * values.batch_size // place.size, (place.rank + 1) * values.batch_size // place.size)
    base = memory.reset_peak(place.device)
    engine = DeepSpeedEngine(networks.build(settings), settings, place)
    gathered = Gathered(engine)
    losses, step_s = _train(engine, place, (images[own], labels[own]), values.steps)
    peak = memory.peak_bytes(place.device)
    plain_losses, _ = _train(TorchEngine(networks.build(settings), settings, alone), alone, (images, labels), values.steps)
    return {
        "stacks": len(gathered.stacks),
        "total": gathered.total,
        "largest": gathered.largest,
        "gathered": gathered.elements,
        "together": gathered.together,
        "alive": gathered.alive,
        "losses": losses,
        "plain_losses": plain_losses,
        "step_s": step_s,
        "base_bytes": base,
        "peak_bytes": peak,
    }


def _train(engine: Engine, place: world.World, batch: tuple[Tensor, Tensor], steps: int) -> tuple[list[float], list[float]]:
    """Losses, and seconds of each step."""
    training = networks.Training(engine, place, batch)
    return training.losses, list(_timed_steps(training, steps))


def _timed_steps(training: networks.Training, steps: int) -> Iterator[float]:
    for _ in range(steps):
        begin = time.perf_counter()
        training.step()
        yield time.perf_counter() - begin


if __name__ == "__main__":
    main()
