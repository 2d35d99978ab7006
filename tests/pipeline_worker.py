"""One rank of test_pipeline.py: trains cases one after the other in one process group, each cut into its own number of stages.

A case is {"name", "stages", "settings" (flat, resolved), and optionally "folder" (where it saves after its second step), "from" (a folder that it
resumes from)}; or, a whole command, one of resume_worker.py with its "stages". Its result holds the losses of the steps, the gradients that are here
before the last, the records, the evaluation, the whole state at the end, and the elements of the parameters that have memory here. `run` on one rank
with plain torch is the reference.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import resume_worker
import torch
from rank import Case, run_cases
from torch import Tensor

from deepscale import train, world
from deepscale.checkpoints import Saver, gathered_state, open_checkpoint, restore
from deepscale.config import Config
from deepscale.data.splits import DatasetInfo
from deepscale.data.synthetic import synthetic
from deepscale.data.tensors import EvalFeed
from deepscale.engine import build_engine
from deepscale.evaluation import evaluate
from deepscale.gradflow.recorder import Recorder
from deepscale.loop import train_step
from deepscale.optim import build_schedule

BATCH, STEPS, HALF, EVALUATED = 16, 4, 2, 37
DEFAULTS: dict[str, Any] = {
    "depth": 26, "width": 4, "patch_size": 4, "batch_size": BATCH, "accumulation": 4, "lr": 1e-2, "zero": 0, "offload": "none", "precision": "fp32",
    "activations": "keep", "segment": None, "layerscale_init": 1.0, "device": "cpu", "kernel": "torch", "stack_size": 2, "clip": 0.0,
}  # fmt: skip


def info() -> DatasetInfo:
    """Of the images."""
    return synthetic(train_images=10, test_images=EVALUATED + 9).info


def micro_batches(settings: Config, place: world.World, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro batches of the steps from `first` on; those of all ranks that share out a step are the same images."""
    for step in range(first, STEPS):
        random = torch.Generator().manual_seed(step)
        images, labels = torch.randn(BATCH, 3, 32, 32, generator=random), torch.randint(10, (BATCH,), generator=random)
        size = BATCH // settings.recipe.accumulation // place.data_size
        for micro in range(settings.recipe.accumulation):
            begin = (micro * place.data_size + place.data_rank) * size
            yield images[begin : begin + size], labels[begin : begin + size]


def run(case: Case, place: world.World) -> dict[str, Any]:
    """Trains the case's network for its steps."""
    place = dataclasses.replace(place, stages=case["stages"])
    if "arguments" in case:
        return resume_worker.run(case, place)
    settings = Config().replace(**{**DEFAULTS, **case["settings"], "pipeline_stages": place.stages})
    images = info()
    model = train.build_model(settings, images, place)
    engine, step, said = build_engine(model, settings, place), 0, list[str]()
    schedule = build_schedule(engine.optimizer, settings.recipe, STEPS)
    if case.get("from"):
        checkpoint = open_checkpoint(Path(case["from"]) / f"step-{HALF:08d}", said.append, place)
        restore(checkpoint, model, engine, place, said.append)
        step = checkpoint.step
        for _ in range(step):
            schedule.step()
    recorder = Recorder(model, engine=engine)
    losses, gradients = list[float](), dict[str, Tensor]()

    def inspect(totals: Tensor) -> None:
        losses.append((totals[0] / totals[2]).item())
        recorder.gradients()
        if step + 1 == STEPS:
            found = {name: engine.gradient(parameter) for name, parameter in model.named_parameters()}
            gradients.update({name: g.clone() for name, g in found.items() if g is not None})

    batches = micro_batches(settings, place, step)
    while step < STEPS:
        recorder.begin(step + 1)
        train_step(engine, batches, settings.recipe.accumulation, place, inspect)
        recorder.finish()
        step += 1
        if step < STEPS:
            schedule.step()
        if case.get("folder") and step == HALF:
            about = {"network": {}, "asked": {}, "settings": {}}
            saver = Saver(Path(case["folder"]), model, engine, place, about=about, asynchronous=True, say=said.append, warn=said.append)
            saver.save(step, {}, {"nothing": np.zeros(1)})
            saver.close()
    source = synthetic(train_images=10, test_images=EVALUATED + 9)
    feed = EvalFeed(source.test, source.info, batch=8, rank=place.data_rank, world_size=place.data_size, device=place.device, limit=EVALUATED)
    return {
        "losses": losses, "gradients": gradients, "flow": recorder.flow(), "evaluated": evaluate(engine, feed, place), "said": said,
        "state": gathered_state(model, engine), "own": sum(p.numel() for p in model.parameters() if not p.is_meta), "settings": engine.settings,
    }  # fmt: skip


if __name__ == "__main__":
    run_cases(run)
