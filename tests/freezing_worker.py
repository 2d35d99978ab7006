"""One rank of test_freezing.py: trains networks whose first layers are frozen, saves after the second step and goes on from there anew.

    RANK=0 WORLD_SIZE=1 ... python freezing_worker.py cases.json results

A case is {"name", "settings" (flat, resolved), "folder"}. Its result holds the network's state before the first step, after two, after three,
and after the third step of a network and an engine made anew, which are filled from the checkpoint of the second.
"""

from pathlib import Path
from typing import Any

from engine_worker import BATCH, CLASSES, micro_batches
from rank import Case, run_cases
from torch import Tensor

from deepscale import world
from deepscale.activations import policy_of
from deepscale.checkpoints import Saver, gathered_state, open_checkpoint, restore
from deepscale.config import Config
from deepscale.engine import Engine, build_engine
from deepscale.loop import train_step
from deepscale.models import registry
from deepscale.models.freezing import freeze
from deepscale.models.network import Network

SETTINGS: dict[str, Any] = {
    "batch_size": BATCH, "lr": 0.1, "weight_decay": 0.5, "clip": 0.0, "device": "cpu",
    "offload": "none", "precision": "fp32", "activations": "keep", "segment": None,
}  # fmt: skip


def build(settings: Config, place: world.World, seed: int) -> tuple[Network, Engine]:
    """A network with initial values of this seed, its first layers frozen, in its engine."""
    model = registry.build(settings.model, registry.Images(3, 32, CLASSES), settings.engine.stack_size)
    policy_of(settings).apply(model)
    freeze(model.initialise(seed), settings.recipe.freeze)
    return model, build_engine(model, settings, place)


def state_of(model: Network, engine: Engine) -> dict[str, Tensor]:
    """A copy."""
    return {name: value.clone() for name, value in gathered_state(model, engine).items()}


def run(case: Case, place: world.World) -> list[dict[str, Tensor]]:
    """The four states."""
    settings = Config().replace(**{**SETTINGS, **case["settings"]})
    batches = micro_batches(settings, place, 3)
    model, engine = build(settings, place, 0)
    states = [state_of(model, engine)]
    folder = Path(case["folder"])
    about: dict[str, Any] = {"network": {}, "asked": {}, "settings": {}}
    saver = Saver(folder, model, engine, place, about=about, asynchronous=False, say=lambda line: None, warn=print)
    for step in (1, 2, 3):
        train_step(engine, iter(batches[step - 1 : step]), 1, place, lambda totals: None)
        if step == 2:
            saver.save(step, {}, {})
        if step > 1:
            states.append(state_of(model, engine))
    saver.close()
    model, engine = build(settings, place, 99)
    restore(open_checkpoint(folder / "step-00000002", print, place), model, engine, place, print)
    train_step(engine, iter(batches[2:]), 1, place, lambda totals: None)
    return [*states, state_of(model, engine)]


if __name__ == "__main__":
    run_cases(run)
