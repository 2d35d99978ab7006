"""One rank of test_zero3.py: trains a network of 12 stacks under ZeRO-3 and, for the same batches, with plain torch.

    RANK=0 WORLD_SIZE=2 ... python zero3_worker.py cases.json results

A case is {"name", "settings" (flat, beside SETTINGS), "steps", "sliced"}; every rank saves its results to results.RANK. With `sliced` the
network is one whose blocks are cut out of stacked parameters by autograd itself, as BlockStack does not.
"""

import gc
from typing import Any

import torch
from engine_worker import BATCH, CLASSES, global_batch, micro_batches
from rank import Case, run_cases
from torch import Tensor, nn

from deepscale import world
from deepscale.activations import policy_of
from deepscale.bench.gathered import Gathered
from deepscale.checkpoints import gathered_state
from deepscale.config import Config
from deepscale.engine import DeepSpeedEngine, build_engine
from deepscale.loop import train_step
from deepscale.models.convnext import ConvNeXt, Head
from deepscale.models.reversible import Held
from deepscale.models.stack import BlockStack

SETTINGS: dict[str, Any] = {
    "blocks": (2, 2, 12, 8), "width": 8, "patch_size": 4, "batch_size": BATCH, "stack_size": 2, "layerscale_init": 1.0, "clip": 0.0,
    "offload": "none", "precision": "fp32", "activations": "keep", "segment": None, "device": "cpu",
}  # fmt: skip


class Sliced(nn.Module):
    """Two linear layers in one parameter (2, C, C), taken out of it by autograd."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, channels, channels) / channels**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weight.unbind(0):
            x = torch.tanh(x @ weight)
        return x


class SlicedNetwork(nn.Module):
    """12 such stacks behind the images' first 96 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.Sequential(*[Sliced(96) for _ in range(12)])
        self.head = Head("none", False, 96, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stacks(images.flatten(1)[:, :96])[:, :, None, None])
        return logits


def run(case: Case, place: world.World) -> dict[str, Any]:
    """Trains for the case's steps, with an evaluation after the second."""
    settings = Config().replace(**{**SETTINGS, **case["settings"]})
    model: nn.Module = SlicedNetwork()
    if not case.get("sliced"):
        model = policy_of(settings).apply(ConvNeXt(settings.model, classes=CLASSES, stack_size=2).initialise(0))
    engine = build_engine(model, settings, place)
    watched = Gathered(engine, Sliced if case.get("sliced") else BlockStack) if isinstance(engine, DeepSpeedEngine) else None
    losses: list[float] = []
    gradients: list[dict[str, Tensor]] = []

    def inspect(totals: Tensor) -> None:
        losses.append((totals[0] / totals[2]).item())
        if len(gradients) == 1 and step + 1 < case["steps"]:
            return
        found = {name: engine.gradient(p) for name, p in model.named_parameters()}
        gradients.append({name: g.detach().clone() for name, g in found.items() if g is not None})

    batches = iter(micro_batches(settings, place, case["steps"]))
    for step in range(case["steps"]):
        train_step(engine, batches, settings.recipe.accumulation, place, inspect)
        if step == 1:
            model.eval()
            with torch.no_grad():
                losses.append(engine.forward(global_batch(99)[0]).float().square().sum().item())
            model.train()
    result = {"losses": losses, "gradients": gradients, "settings": engine.settings}
    if isinstance(model, ConvNeXt):
        result["state"] = gathered_state(model, engine)
        if settings.model.skip == "reversible":
            logits = engine.forward(global_batch(99)[0])
            result["held"] = sum(type(own) is Held and own.value is not None for own in gc.get_objects())
            del logits
    if watched is not None:
        result |= {name: getattr(watched, name) for name in ("elements", "together", "alive", "largest", "total")}
    return result


if __name__ == "__main__":
    run_cases(run)
