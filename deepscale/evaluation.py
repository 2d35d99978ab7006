"""Loss and accuracy of a network over a split."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deepscale.data.tensors import EvalFeed
from deepscale.engine import Engine
from deepscale.models.components import average_running_statistics
from deepscale.models.convnext import cross_entropy
from deepscale.world import World


@torch.no_grad()
def sums(logits: Tensor, loss: Tensor, labels: Tensor) -> Tensor:
    """(loss times images, correct, images) of a batch, float64 (3,)."""
    images = torch.full((), len(labels), dtype=torch.float64, device=loss.device)
    return torch.stack([loss.double() * images, (logits.argmax(1) == labels).sum().double(), images])


@torch.no_grad()
def evaluate(
    engine: Engine, feed: EvalFeed, world: World, batches: int | None = None, between: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Loss and accuracy over a split, every image once over all ranks; of the first `batches` of each rank if given.

    All ranks run equally many forward passes, which ZeRO-3 needs to gather parameters: a rank that has run out of images
    passes a blank one that does not count. `between` is called on every rank after each; what it raises ends the evaluation.
    """
    average_running_statistics(engine.module)
    engine.module.eval()
    try:
        totals = torch.zeros(3, dtype=torch.float64, device=world.device)
        most = math.ceil(math.ceil(feed.images / world.data_size) / feed.batch)
        own = feed.epoch()
        for _ in range(most if batches is None else min(batches, most)):
            world.doing("evaluation")
            images, labels = next(own, None) or (feed.blank(), None)
            logits = engine.forward(images)
            if labels is not None and world.stage == world.stages - 1:
                totals += sums(logits, cross_entropy(logits, labels), labels)
            between()
    finally:
        engine.module.train()
    loss, correct, seen = world.sum(totals).tolist()
    return {"loss": loss / max(1.0, seen), "accuracy": correct / max(1.0, seen), "images": seen}
