"""One rank of test_recorder.py: trains cases one after the other in one process group, recorded, and saves the records.

    RANK=0 WORLD_SIZE=1 ... python recorder_worker.py cases.json results

A case is {"name", "engine" ("torch", "z0" ... "z3"), "offload", "activations", "accumulation", "precision"}. Its result, of which
every rank writes its own to results.RANK, is the record of `RECORDED`, two of the four steps that it trains. DeepSpeed's
torch_autocast leaves a global flag behind: cases in low precision come last.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from engine_worker import CLASSES, global_batch
from rank import Case, run_cases
from torch import Tensor, nn

from deepscale import world
from deepscale.activations import policy_of
from deepscale.config import IN_SEGMENTS, Config
from deepscale.engine import Share, build_engine
from deepscale.gradflow.flow import Flow
from deepscale.gradflow.measure import Measured
from deepscale.gradflow.recorder import Recorder
from deepscale.loop import train_step
from deepscale.models.convnext import ConvNeXt

M = TypeVar("M", bound=nn.Module)
BATCH = 16  # images of a step over all ranks and micro batches
STEPS, RECORDED = 4, (1, 3)  # the second record without blocks, as where `begin` was not called


def images_of(step: int) -> tuple[Tensor, Tensor]:
    """A step's images and labels, the same for every case."""
    pairs = zip(global_batch(2 * step), global_batch(2 * step + 1), strict=True)
    images, labels = (torch.cat(pair) for pair in pairs)
    return images, labels


def micro_batches(accumulation: int, place: world.World) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro batches of all steps, in order."""
    for step in range(1, STEPS + 1):
        parts = [part.chunk(accumulation * place.size) for part in images_of(step)]
        for micro in range(accumulation):
            images, labels = (part[micro * place.size + place.rank] for part in parts)
            yield images, labels


def settings_of(case: Case) -> Config:
    """26 layers of width 4; ReLU, which makes zeros and dead units; gamma 0.1, at which only fp16's second step overflows; clipped."""
    own = {name: case[name] for name in ("offload", "activations", "accumulation", "precision")}
    engine = {"engine": "torch", "zero": 0} if case["engine"] == "torch" else {"zero": int(case["engine"][1])}
    network = {"depth": 26, "patch_size": 4, "width": 4, "activation": "relu", "layerscale_init": 0.1}
    own["segment"] = 2 if own["activations"] in IN_SEGMENTS else None
    return Config().replace(batch_size=BATCH, lr=1e-3, clip=0.02, **network, **own, **engine)


def with_dead_units(model: M) -> M:
    """Biases at which a part of ReLU's units is never on, in the stacked network and in the plain one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("pwconv1_bias", "pwconv1.bias")):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.shape[-1]))
    return model


def run(case: Case, place: world.World) -> Flow:
    """Trains the case's network, stacks of 3 blocks, and records."""
    settings = settings_of(case)
    model = policy_of(settings).apply(ConvNeXt(settings.model, classes=CLASSES, stack_size=3)).initialise(0)
    with_dead_units(model)
    engine = build_engine(model, settings, place)
    recorder = Recorder(model, engine=engine)
    step = 0

    def inspect(totals: Tensor) -> None:
        if step == RECORDED[0]:
            recorder.gradients()
        elif step in RECORDED:
            recorder.gradients(step)

    batches = micro_batches(settings.recipe.accumulation, place)
    for step in range(1, STEPS + 1):
        if step == RECORDED[0]:
            recorder.begin(step)
        train_step(engine, batches, settings.recipe.accumulation, place, inspect)
        recorder.finish()
    return recorder.flow({"loss_scale": engine.loss_scale()})


def maxima_with_nan(rank: int) -> list[float]:
    """max |g| of three layers over two ranks: NaN on the first, on the second, on none."""
    record = Measured(3, torch.device("cpu"))
    own = torch.tensor([torch.nan if rank == 0 else 1.0, torch.nan if rank == 1 else 2.0, 3.0 + rank])
    record.gradient(torch.arange(3), Share(0, own, own), 1)
    record.add_up(dist.get_world_size() > 1)
    return record.fields()["max_abs"].tolist()


if __name__ == "__main__":
    run_cases(run, lambda place: {"maxima with NaN": maxima_with_nan(place.rank)})
