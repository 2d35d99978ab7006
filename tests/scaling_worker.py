"""One rank of test_scaling.py: trains cases in one process group, counts what was sent, and evaluates images that do not divide by the ranks.

A case is {"name", "settings" (flat, resolved)}. Its result holds the losses of the steps over all ranks, bytes that left this rank in a step, bytes
of the whole tensors of each kind of collective in a step, and the evaluation.
"""

from typing import Any

import torch
from rank import Case, run_cases
from torch import Tensor

from deepscale import world
from deepscale.activations import policy_of
from deepscale.bench.traffic import Collectives, bytes_sent
from deepscale.config import Config
from deepscale.data.splits import Source
from deepscale.data.synthetic import synthetic
from deepscale.data.tensors import EvalFeed
from deepscale.engine import Engine, build_engine
from deepscale.loop import evaluate, train_step
from deepscale.models.convnext import ConvNeXt, cross_entropy

BATCH = 12  # images of a step over all ranks and micro batches
WARM_UP, COUNTED, NOTED = 3, 2, 1  # steps; ZeRO-3 learns the order of the modules in the first two
EVALUATED = 101
DEFAULTS: dict[str, Any] = {
    "depth": 110, "width": 8, "patch_size": 4, "batch_size": BATCH, "lr": 1e-3, "zero": 0, "offload": "none", "precision": "fp32",
    "activations": "recompute", "segment": 4, "layerscale_init": 1.0, "device": "cpu",
}  # fmt: skip


def settings_of(case: Case) -> Config:
    """The case's configuration, without any `auto` that matters here."""
    return Config().replace(**{**DEFAULTS, **case["settings"]})


def micro_batches(settings: Config, place: world.World) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro batches of all steps, in order; those of all ranks are the same images whatever the ranks."""
    parts, size = [], BATCH // settings.recipe.accumulation // place.size
    for step in range(WARM_UP + COUNTED + NOTED):
        random = torch.Generator().manual_seed(step)
        images, labels = torch.randn(BATCH, 3, 32, 32, generator=random), torch.randint(10, (BATCH,), generator=random)
        for micro in range(settings.recipe.accumulation):
            first = (micro * place.size + place.rank) * size
            parts.append((images[first : first + size], labels[first : first + size]))
    return parts


def source() -> Source:
    """Images to evaluate, the same everywhere."""
    return synthetic(train_images=10, test_images=EVALUATED + 9)


def run(case: Case, place: world.World, collectives: Collectives | None = None) -> dict[str, Any]:
    """Trains the case's network for its steps, and evaluates it."""
    settings = settings_of(case)
    model = policy_of(settings).apply(ConvNeXt(settings.model, stack_size=settings.engine.stack_size)).initialise(0)
    engine = build_engine(model, settings, place)
    batches, losses = iter(micro_batches(settings, place)), list[float]()

    def steps(count: int) -> None:
        for _ in range(count):
            train_step(engine, batches, settings.recipe.accumulation, place, lambda totals: losses.append((totals[0] / totals[2]).item()))

    steps(WARM_UP)
    before = _counted(place)
    steps(COUNTED)
    sent = _counted(place) - before
    whole: dict[str, int] = {}
    if collectives is not None:
        collectives.calls, collectives.on = [], True
        steps(NOTED)
        collectives.on = False
        for call in collectives.calls:
            whole[call.kind] = whole.get(call.kind, 0) + call.bytes // NOTED
    test = source()
    feed = EvalFeed(test.test, test.info, batch=16, rank=place.rank, world_size=place.size, device=place.device, limit=EVALUATED)
    found = {images: evaluate(engine, _limited(feed, images), place) for images in (EVALUATED, 2)}
    own = feed.last - feed.first
    expected = {images: everything(engine, test, images) for images in (EVALUATED, 2)}
    return {"losses": losses, "sent": sent / COUNTED, "whole": whole, "evaluated": found, "expected": expected, "images_of_two": own}


@torch.no_grad()
def everything(engine: Engine, test: Source, images: int) -> tuple[int, float]:
    """(correct, loss) of the first images in one batch, by each rank alone: the plain reference of `evaluate`."""
    [(pixels, labels)] = EvalFeed(test.test, test.info, batch=images, device=torch.device("cpu"), limit=images).epoch()
    engine.module.eval()
    logits = engine.forward(pixels)
    return int((logits.argmax(1) == labels).sum()), float(cross_entropy(logits, labels))


def _counted(place: world.World) -> int:
    """Bytes sent by now, when every rank has what it was sent."""
    if place.size > 1:
        torch.distributed.barrier()
    return bytes_sent() or 0


def _limited(feed: EvalFeed, images: int) -> EvalFeed:
    feed.limit(images)
    return feed


def main() -> None:
    """Runs the cases of a file."""
    collectives = Collectives(torch.device("cpu"))  # before DeepSpeed keeps two of torch's functions
    run_cases(lambda case, place: run(case, place, collectives))


if __name__ == "__main__":
    main()
