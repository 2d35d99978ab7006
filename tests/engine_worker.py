"""One rank of test_engine.py: runs cases one after the other in one process group and saves what came out.

    RANK=0 WORLD_SIZE=1 ... python engine_worker.py cases.json results

A case is {"name", "settings" (flat, resolved), "steps", and optionally "cpu_adam", "plain"}. Its result, of which every rank writes
its own to results.RANK, holds the losses of the steps over all ranks, the gradients of every parameter before the first and the
last step, the running statistics of this rank, and the whole state at the end. DeepSpeed's torch_autocast leaves a global
flag behind: cases in low precision come last.
"""

from typing import Any

import torch
from rank import Case, run_cases
from torch import Tensor, nn

from deepscale import ops, world
from deepscale.activations import policy_of
from deepscale.checkpoints import gathered_state
from deepscale.config import IN_SEGMENTS, Config
from deepscale.engine import build_engine
from deepscale.loop import train_step
from deepscale.models import registry
from deepscale.models.components import commit_running_statistics
from deepscale.models.convnext import ConvNeXt, cross_entropy
from deepscale.models.naming import load_plain
from deepscale.models.reference import PlainConvNeXt
from deepscale.optim import build_schedule

BATCH = 8  # images of a step over all ranks and micro batches
CLASSES = 10
Batch = tuple[Tensor, Tensor]


def global_batch(step: int) -> Batch:
    """The images of a step, the same for every engine: noise around one colour per class, so that there is something to learn."""
    random = torch.Generator().manual_seed(step)
    labels = torch.arange(BATCH) % CLASSES
    tint = torch.linspace(-1.0, 1.0, CLASSES)[labels, None, None, None]
    return torch.randn(BATCH, 3, 32, 32, generator=random) + tint * torch.tensor([1.0, -1.0, 0.5])[:, None, None], labels


def micro_batches(settings: Config, place: world.World, steps: int) -> list[Batch]:
    """This rank's micro batches of all steps, in order."""
    accumulation = settings.recipe.accumulation
    size = BATCH // accumulation // place.size
    parts = []
    for step in range(steps):
        images, labels = global_batch(step)
        for micro in range(accumulation):
            first = (micro * place.size + place.rank) * size
            parts.append((images[first : first + size], labels[first : first + size]))
    return parts


def run(case: Case, place: world.World) -> dict[str, Any]:
    """Trains the case's network for its steps."""
    defaults = {"depth": 14, "patch_size": 4, "width": 4, "batch_size": BATCH, "lr": 1e-3}
    defaults |= {"zero": 0, "offload": "none", "precision": "fp32", "activations": "keep"}
    defaults["segment"] = 1 if case["settings"].get("activations") in IN_SEGMENTS else None
    chosen = {**defaults, **case["settings"]}
    unknown = registry.unknown(chosen.get("model", "convnext"))
    settings = Config().replace(**{name: value for name, value in chosen.items() if name not in unknown})
    model = policy_of(settings).apply(registry.build(settings.model, registry.Images(classes=CLASSES), 2)).initialise(0)
    engine = build_engine(model, settings, place, case.get("cpu_adam", False))
    schedule = build_schedule(engine.optimizer, settings.recipe, case["steps"])
    losses: list[float] = []
    gradients: list[dict[str, Tensor]] = []

    def inspect(totals: Tensor) -> None:
        losses.append((totals[0] / totals[2]).item())
        if len(losses) in (1, case["steps"]):
            found = {name: engine.gradient(p) for name, p in model.named_parameters()}
            gradients.append({name: g.detach().float().clone() for name, g in found.items() if g is not None})

    batches = iter(micro_batches(settings, place, case["steps"]))
    for step in range(case["steps"]):
        train_step(engine, batches, settings.recipe.accumulation, place, inspect)
        if step + 1 < case["steps"]:
            schedule.step()
    own = {name: value.detach().clone() for name, value in model.named_buffers() if "running" in name}
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    state = gathered_state(model, engine)
    model.eval()
    with torch.no_grad():
        evaluated = engine.forward(global_batch(99)[0]).float()
    return {
        "losses": losses, "gradients": [gradients[0], gradients[-1]], "state": state, "own_statistics": own, "dtypes": dtypes,
        "evaluated": evaluated, "loss_scale": engine.loss_scale(), "settings": engine.settings, "optimizer": type(engine.optimizer).__name__,
    }  # fmt: skip


def run_plain(case: Case) -> dict[str, Any]:
    """The same steps with the unstacked reference, torch's AdamW and its OneCycle, all written out; on one rank."""
    settings = Config().replace(**{"patch_size": 4, "width": 4, "depth": 14, **case["settings"]})
    plain = PlainConvNeXt(settings.model, classes=CLASSES).initialise(0)
    recipe = settings.recipe
    decayed = [p for name, p in plain.named_parameters() if name.endswith("weight") and not name.endswith("norm.weight")]
    rest = [p for name, p in plain.named_parameters() if not (name.endswith("weight") and not name.endswith("norm.weight"))]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=case["steps"])
    losses = []
    for step in range(case["steps"]):
        images, labels = global_batch(step)
        loss = cross_entropy(plain(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(plain.parameters(), recipe.clip)
        optimizer.step()
        commit_running_statistics(plain)
        if step + 1 < case["steps"]:
            schedule.step()
        losses.append(loss.item())
    stacked = ConvNeXt(settings.model, classes=CLASSES, stack_size=2)
    load_plain(stacked, plain.state_dict())
    plain.eval()
    with torch.no_grad():
        evaluated = plain(global_batch(99)[0])
    return {"losses": losses, "state": stacked.state_dict(), "evaluated": evaluated}


def train(case: Case, place: world.World) -> dict[str, Any] | None:
    """A case by the engine that it names, or None where it needs DeepSpeed's CPU optimiser and that cannot be had."""
    if case.get("cpu_adam") and not ops.OPS["cpu_adam"].loaded():
        return None
    return run_plain(case) if case.get("plain") else run(case, place)


if __name__ == "__main__":
    run_cases(train, lambda place: {"cpu_adam": ops.ensure_ops(["cpu_adam"], print)["cpu_adam"] is None})
