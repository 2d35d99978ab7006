"""One rank of test_nonfinite.py: spoils a network in mid-run, and saves which layer the next step blames.

    RANK=0 WORLD_SIZE=1 ... python nonfinite_worker.py cases.json results

A case is {"engine" ("torch", "z0" ... "z3"), "values" ({parameter of the stacked network: [row, value]})}.
"""

import json
import sys
from typing import Any

import torch
from engine_worker import CLASSES, micro_batches
from torch import Tensor

from deepscale import ops, world
from deepscale.config import Config, EngineConfig
from deepscale.engine import Engine, build_engine, hush
from deepscale.loop import remembered, train_step
from deepscale.models.convnext import ConvNeXt
from deepscale.nonfinite import culprit

STEPS = 2  # before the one that is spoilt


class Stopped(Exception):
    """A loss that is not finite; the message is what is said of it."""


def spoil(model: ConvNeXt, engine: Engine, name: str, row: int, value: float) -> None:
    """Sets one row of a parameter, wherever the engine holds it."""
    parameter = dict(model.named_parameters())[name]
    size = getattr(parameter, "ds_shape", parameter.shape)[1:].numel()
    if parameter.numel():
        parameter.data.view(-1)[row * size : (row + 1) * size] = value
    if hasattr(parameter, "ds_tensor"):
        share = engine.share(parameter)
        begin, end = (min(max(0, edge - share.start), share.weight.numel()) for edge in (row * size, (row + 1) * size))
        share.weight[begin:end] = value


def run(case: dict[str, Any], place: world.World) -> str:
    """What is said of the step after the case's values were set."""
    own = {"engine": "torch", "zero": 0} if case["engine"] == "torch" else {"zero": int(case["engine"][1])}
    network = {"depth": 26, "patch_size": 4, "width": 4, "batch_size": 8, "layerscale_init": 1.0, "accumulation": 2}
    settings = Config().replace(**network, offload="none", precision="fp32", activations="keep", segment=None, **own)
    model = ConvNeXt(settings.model, classes=CLASSES, stack_size=2).initialise(0)
    engine = build_engine(model, settings, place)
    batches, said = iter(micro_batches(settings, place, STEPS + 1)), "the loss stayed finite"
    for step in range(STEPS + 1):
        images: list[Tensor] = []

        def inspect(sums: Tensor, images: list[Tensor] = images) -> None:
            if not torch.isfinite(sums).all():
                raise Stopped(culprit(model, engine, place, images))

        if step == STEPS:
            for name, (row, value) in case["values"].items():
                spoil(model, engine, name, row, float(value))
        try:
            train_step(engine, remembered(batches, images), 2, place, inspect)
        except Stopped as stopped:
            said = str(stopped)
    return said


def main() -> None:
    """Runs the cases of a file."""
    cases, target = sys.argv[1:3]
    hush(False)
    ops.skip_shm_comm()
    place = world.join(EngineConfig(threads=1, device="cpu"))
    with open(cases) as file:
        torch.save([run(case, place) for case in json.load(file)], f"{target}.{place.rank}")
    world.leave()


if __name__ == "__main__":
    main()
