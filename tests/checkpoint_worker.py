"""One rank of test_checkpoint_engines.py: trains, saves and resumes, cases one after the other in one process group.

    RANK=0 WORLD_SIZE=1 ... python checkpoint_worker.py cases.json results

A case is {"name", "settings" (flat, resolved), "cpu_adam", "folder" (where it saves), "from" (a folder that it resumes from, perhaps once another
process has saved there; else it starts anew), "saves" (steps), "last" (step)}. Its result holds the losses of its steps, what the network
says of fixed images at the end, and the state that forward passes read on this rank. Cases in low precision come last (engine_worker.py).
"""

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_worker import BATCH, CLASSES, global_batch, micro_batches

from deepscale import ops, world
from deepscale.activations import policy_of
from deepscale.checkpoints import Saver, find, gathered_state, open_checkpoint, restore, tensor_file, writing
from deepscale.config import Config, EngineConfig
from deepscale.engine import build_engine, hush
from deepscale.loop import train_step
from deepscale.models.convnext import ConvNeXt
from deepscale.optim import build_schedule

STEPS = 6  # of the schedule
PATIENCE_S = 120.0


def awaited(folder: Path) -> Path:
    """The folder, once a checkpoint of the last step is in it."""
    begin = time.monotonic()
    while not (folder / f"step-{STEPS:08d}").is_dir():
        assert time.monotonic() - begin < PATIENCE_S, f"nobody saved into {folder}"
        time.sleep(0.05)
    return folder


def run(case: dict[str, Any], place: world.World) -> dict[str, Any]:
    """Trains from the case's checkpoint, or from the start, to its last step, and saves on the way."""
    defaults = {"depth": 14, "patch_size": 4, "width": 4, "batch_size": BATCH, "lr": 1e-3, "layerscale_init": 1.0, "clip": 0.0, "zero": 0}
    defaults |= {"offload": "none", "precision": "fp32", "activations": "keep", "segment": None}
    settings = Config().replace(**{**defaults, **case["settings"]})
    resumed = case.get("from")
    torch.manual_seed(99 if resumed else place.rank)
    model = policy_of(settings).apply(ConvNeXt(settings.model, classes=CLASSES, stack_size=2)).initialise(99 if resumed else 0)
    engine = build_engine(model, settings, place, case.get("cpu_adam", False))
    schedule = build_schedule(engine.optimizer, settings.recipe, STEPS)
    said: list[str] = []
    step = 0
    if resumed:
        checkpoint = open_checkpoint(awaited(Path(resumed)) / f"step-{case['saves'][0]:08d}", said.append, place)
        restore(checkpoint, model, engine, place, said.append)
        step = checkpoint.step
        assert checkpoint.progress == {"seen": step * BATCH, "nothing": None} and checkpoint.arrays()["names"].tolist() == ["stem", "head"]
    for _ in range(step):
        schedule.step()
    about = {"network": {}, "asked": {}, "settings": {}}
    saver = Saver(
        Path(case["folder"]), model, engine, place, about=about, asynchronous=case.get("asynchronous", False), say=said.append, warn=said.append
    )
    losses: list[float] = []

    def save() -> None:
        if step in case["saves"]:
            if case.get("fails") and step == case["saves"][0]:
                fail_once(case["fails"], place)
            saver.save(step, {"seen": step * BATCH, "nothing": None}, {"names": np.array(["stem", "head"])})

    save()
    micro = len(micro_batches(settings, place, 1))
    batches = iter(micro_batches(settings, place, STEPS)[step * micro :])
    while step < case["last"]:
        train_step(engine, batches, settings.recipe.accumulation, place, lambda totals: losses.append((totals[0] / totals[2]).item()))
        step += 1
        if step < STEPS:
            schedule.step()
        save()
    saver.close()
    drawn = torch.rand(3)
    state = gathered_state(model, engine)
    model.eval()
    with torch.no_grad():
        evaluated = engine.forward(global_batch(99)[0]).float()
    return {"losses": losses, "state": state, "evaluated": evaluated, "said": said, "drawn": drawn, "loss_scale": engine.loss_scale()}


def fail_once(how: str, place: world.World) -> None:
    """The last rank's next file meets a full disk; "silently": the note that says so does, too."""
    if place.rank + 1 == place.size:
        write, note = tensor_file.write, writing.Writer._say_part

        def full(*arguments: Any) -> Any:
            tensor_file.write = write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")

        def silent(*arguments: Any) -> Any:
            writing.Writer._say_part = note
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the note")

        tensor_file.write = full
        if how == "silently":
            writing.Writer._say_part = silent


def damaged_and_found(folder: Path, place: world.World) -> dict[str, Any]:
    """Which checkpoint every rank finds, before and after the last rank's file of the newest one has changed."""
    case = {"settings": {"engine": "torch"}, "saves": [1, 2], "last": 2, "folder": str(folder)}
    warned: list[str] = []
    found = []
    for change in (False, True):
        file = folder / "step-00000002" / f"rank-{place.size - 1}.safetensors"
        if not change:
            run(case, place)
        elif place.is_main:
            raw = file.read_bytes()
            file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        place.gather(None)  # nobody looks before
        checkpoint = find(folder, warned.append, place)
        found.append(None if checkpoint is None else checkpoint.step)
    return {"steps": found, "warned": warned}


def main() -> None:
    """Runs the cases of a file."""
    cases, target = sys.argv[1:3]
    hush(False)
    ops.skip_shm_comm()
    place = world.join(EngineConfig(threads=1, device="cpu"))
    ready = ops.ensure_ops(["cpu_adam"], print)["cpu_adam"] is None
    results: dict[str, Any] = {"cpu_adam": ready}
    with open(cases) as file:
        for case in json.load(file):
            if ready or not case.get("cpu_adam"):
                results[case["name"]] = run(case, place)
    results["found"] = damaged_and_found(Path(cases).parent / "damaged", place)
    torch.save(results, f"{target}.{place.rank}")
    world.leave()


if __name__ == "__main__":
    main()
