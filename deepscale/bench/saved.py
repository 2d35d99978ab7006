"""A program: checkpoints of one network, and the plain write of as many bytes beside each, as JSON.

Files lie in a folder of their own in the working folder, which is removed. Everything is measured once a round, one after the other.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deepscale import config, errors, world
from deepscale.bench import networks
from deepscale.bench.deep import run_program
from deepscale.checkpoints import Saver, find, restore
from deepscale.engine import build_engine


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say, and prints the result in the last line."""
    run_program("python -m deepscale.bench.saved", arguments, {"rounds": 1}, _measure)


def _measure(values: argparse.Namespace, settings: config.Config, place: world.World) -> dict[str, Any]:
    model = networks.build(settings)
    engine = build_engine(model, settings, place)
    networks.Training(engine, place, networks.random_batch(values.batch_size)).step()
    failed: list[str] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:

        def saver(name: str, asynchronous: bool) -> Saver:
            silent = {"say": lambda text: None, "warn": failed.append}
            return Saver(Path(folder, name), model, engine, place, about={}, keep=1, asynchronous=asynchronous, **silent)

        waiting, behind = saver("waiting", False), saver("behind", True)
        behind.save(0, {}, {})  # allocates the copy, which later saves use again
        behind.wait()
        states = waiting._states()
        copies = {name: torch.empty_like(tensor) for name, tensor in states.items()}
        size = sum(file["bytes"] for file in _found(behind, failed).manifest["files"].values())
        raw = memoryview(torch.randint(256, (size,), dtype=torch.uint8).numpy())  # type: ignore[arg-type]
        taken: dict[str, list[float]] = {name: [] for name in ("raw", "save", "copy", "stall", "behind", "verify", "restore")}

        def timed(name: str, work: Callable[[], object]) -> None:
            begin = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - begin)

        for step in range(1, values.rounds + 1):
            timed("raw", lambda: _write(Path(folder, "raw"), raw))
            Path(folder, "raw").unlink()
            timed("save", functools.partial(waiting.save, step, {}, {}))
            timed("copy", lambda: torch._foreach_copy_(list(copies.values()), list(states.values())))
            timed("stall", functools.partial(behind.save, step, {}, {}))
            timed("behind", behind.wait)
            timed("verify", lambda: _found(waiting, failed))
            checkpoint = _found(waiting, failed)
            timed("restore", functools.partial(restore, checkpoint, model, engine, place, failed.append))
    if failed:
        sys.exit(failed[0])
    return {"bytes": size, "parameters": sum(p.numel() for p in model.parameters()), **taken}


def _found(saver: Saver, warned: list[str]) -> Any:
    saver.wait()
    return find(saver.folder, warned.append)


def _write(path: Path, data: memoryview) -> None:
    """All bytes at once, and until they are on the disk."""
    with path.open("wb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
