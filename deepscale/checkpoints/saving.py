"""Saving a run's state between two steps: what each rank holds, copied for a thread that writes it, or written at once (writing.py)."""

import functools
import json
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepscale import config, machine
from deepscale.checkpoints import weights
from deepscale.checkpoints.restoring import buffers_of, shape_of
from deepscale.checkpoints.stored import FORMAT, step_name
from deepscale.checkpoints.writing import Draft, Writer
from deepscale.config import Config
from deepscale.data.splits import DatasetInfo
from deepscale.engine import Engine
from deepscale.engine_states import kinds_of, steps_of
from deepscale.world import World

COPY_SHARE = 0.5  # of the free host memory that an asynchronous save may take for its copy
PACKAGES = ("deepscale", "torch", "deepspeed", "numpy")


def about(asked: Config, settings: Config, info: DatasetInfo) -> dict[str, Any]:
    """What a manifest says of the run: "network" (what rebuilds it), "asked" and "settings" (flat settings, before and after planning)."""
    return {"network": weights.described(settings, info), "asked": config.as_json(asked), "settings": config.as_json(settings)}


class Saver:
    """Saves a run's state into `folder`, and keeps the last `keep` checkpoints and the best.

    `asynchronous`: write from a thread while training goes on; None: where a copy of the states fits into free host memory.
    Every rank must call, at the same steps. A save that fails is a warning, never an exception. Whoever makes a saver holds the
    folder's lock: what killed runs left half-written is removed.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        engine: Engine,
        world: World,
        *,
        about: Mapping[str, Any],
        keep: int = 2,
        asynchronous: bool | None = None,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.folder, self.model, self.engine, self.world = folder, model, engine, world
        self.about, self.asynchronous, self.say = dict(about), asynchronous, say
        self.writer = Writer(folder, world, keep, say, warn)
        self.versions = {"python": platform.python_version(), **dict(_versions())}
        self.last: int | None = None  # the step of the last checkpoint that is in place
        self.current: tuple[Draft, threading.Thread] | None = None
        self.copies: dict[str, Tensor] = {}
        self.attempts = 0
        self.listed: dict[str, Tensor] | None = None
        self.starts: dict[str, int] = {}  # where this rank's parts begin
        self.own: set[str] = set()  # names of what `_parts` has copied
        if world.is_main:
            for leftover in folder.glob(".step-*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.token = world.agree(secrets.token_hex(4))  # nobody writes before rank 0 has removed

    @torch.no_grad()
    def save(
        self, step: int, progress: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], best: float | None = None, again: bool = False
    ) -> None:
        """Saves the state after `step` optimiser steps, between two steps. `progress` (JSON) and `arrays` (rank 0's) come back as they were.

        `best`: the validation accuracy here, if it was measured. A step that is saved already is not saved again but with `again`.
        """
        self.wait()
        if step == self.last and not again:
            return
        self.attempts += 1
        draft = self._described(step, progress, arrays, best)
        if self._asynchronous(draft):
            self._copy(draft)
            self._start(draft)
        else:
            self._start(draft)
            self.wait()

    def _described(self, step: int, progress: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], best: float | None) -> Draft:
        if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
            raise TypeError(f"the array {objects[0]} holds Python objects, which only a pickle could keep")
        scale = self.engine.loss_scale_state()
        manifest = {
            "format": FORMAT, "step": step, "ranks": self.world.size, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "optimizer_steps": steps_of(self.engine.optimizer), "loss_scale": None if scale is None else list(scale),
            "best": best, "versions": self.versions, "progress": progress, **self.about,
        }  # fmt: skip
        manifest = self._shapes | json.loads(json.dumps(manifest))  # as it will be read; and whatever changes later does not change it
        folder = self.folder / f".{step_name(step)}.{self.token}-{self.attempts}.tmp"
        states = self._states()
        return Draft(step, folder, manifest, states, self.starts, {name: np.array(array) for name, array in arrays.items()}, best)

    @functools.cached_property
    def _shapes(self) -> dict[str, Any]:
        """What a manifest says of all tensors."""
        return {
            "kinds": ["weight", *kinds_of(self.engine.optimizer)],
            "tensors": {name: list(shape_of(parameter)) for name, parameter in self.model.named_parameters()},
            "buffers": {name: list(buffer.shape) for name, buffer in buffers_of(self.model).items()},
        }

    def _parts(self) -> dict[str, Tensor]:
        """This rank's part of weights and moments by the names of its file, as views of memory that steps change in place.

        Listed once: at depth that takes as long as copying a third of it. Of what rests on a disk there are copies, made each time.
        """
        if self.listed is not None:
            return self.listed
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            held = self.engine.held(parameter)
            first, last = 0, held.weight.numel()
            if held.everywhere:  # each rank writes its share
                first, last = (last * rank // self.world.data_size for rank in (self.world.data_rank, self.world.data_rank + 1))
            if first < last:
                starts[name] = held.start + first
                parts = {f"{kind}/{name}": part[first:last] for kind, part in {"weight": held.weight, **held.moments}.items()}
                if held.changed is not None:
                    parts = {key: part.clone() for key, part in parts.items()}
                    self.own |= parts.keys()
                tensors |= parts
        self.starts = starts
        if not self.own:
            self.listed = tensors
        return tensors

    def _states(self) -> dict[str, Tensor]:
        """What this rank writes, by the names of its file."""
        tensors = self._parts() | {f"buffer/{name}": buffer for name, buffer in buffers_of(self.model).items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.world.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.world.device)
        return tensors

    def _asynchronous(self, draft: Draft) -> bool:
        """As asked, or, the first time, whether every rank's copy fits into its share of the free host memory."""
        if self.asynchronous is None:
            copy = sum(tensor.nbytes for tensor in draft.tensors.values())
            fits = copy <= COPY_SHARE * machine.measure_machine(self.world).host_bytes
            self.asynchronous = all(self.world.gather(fits))
            if not self.asynchronous:
                self.say(f"checkpoints are written while training waits: a copy of {copy / 2**30:.1f} GiB does not fit beside it")
        return self.asynchronous

    def _copy(self, draft: Draft) -> None:
        """The states as they are now, into host memory that later saves use again: allocating it takes longer than copying."""
        if self.own:
            draft.tensors = {name: tensor if name in self.own else tensor.clone() for name, tensor in draft.tensors.items()}
            return
        if not self.copies:
            self.copies = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in draft.tensors.items()}
        torch._foreach_copy_([self.copies[name] for name in draft.tensors], list(draft.tensors.values()))
        draft.tensors = self.copies

    def _start(self, draft: Draft) -> None:
        thread = threading.Thread(target=self.writer, args=(draft,), name="checkpoint", daemon=True)
        thread.start()  # which the system may refuse
        self.current = (draft, thread)

    def wait(self) -> None:
        """Until what was saved is in place, or has failed."""
        if self.current is None:
            return
        draft, thread = self.current
        draft.written.wait()
        draft.error = next((error for error in self.world.gather(draft.error) if error is not None), None)
        draft.all_ended.set()
        thread.join()
        self.current = None
        if self.world.agree(draft.saved):
            self.last = draft.step

    def close(self) -> None:
        """Waits; the end."""
        self.wait()
        self.copies = {}

    def leave(self, timeout_s: float) -> None:
        """After an error, which other ranks may not have: the thread has so long to end what it is writing."""
        if self.current is not None:
            self.current[1].join(timeout_s)


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)
