"""Writing checkpoints: complete and verified, or not at all.

Every rank writes its own file and says in a small one (`part-0.json`) what it wrote, or that it failed; rank 0 waits for all of these,
writes the manifest, renames. So threads need no collective. A rank that could not even say so, on a full disk, says it at the
next save, where the ranks tell each other how the last one went.
"""

import json
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepscale import config, machine
from deepscale.checkpoints import tensor_file, weights
from deepscale.checkpoints.restoring import buffers_of, shape_of
from deepscale.checkpoints.stored import ARRAYS, FORMAT, KINDS, MANIFEST, checkpoints_in, rank_file, signature, step_name
from deepscale.config import Config
from deepscale.data.splits import DatasetInfo
from deepscale.engine import Engine
from deepscale.engine_states import steps_of
from deepscale.errors import UsageError
from deepscale.files import atomic, sync
from deepscale.world import World

BEST = "best.json"
POLL_S = 0.02
VISIBLE_S = 60.0  # a network file system shows a file to other nodes within this time
COPY_SHARE = 0.5  # of the free host memory that an asynchronous save may take for its copy
PACKAGES = ("deepscale", "torch", "deepspeed", "numpy")


def about(asked: Config, settings: Config, info: DatasetInfo) -> dict[str, Any]:
    """What a manifest says of the run: "network" (what rebuilds it), "asked" and "settings" (flat settings, before and after planning)."""
    return {"network": weights.described(settings, info), "asked": config.as_json(asked), "settings": config.as_json(settings)}


@dataclass
class Saving:
    """One checkpoint on its way."""

    step: int
    folder: Path  # the temporary one
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    starts: dict[str, int]
    arrays: dict[str, NDArray[Any]]
    best: float | None
    begin: float = field(default_factory=time.monotonic)
    error: str | None = None  # of this rank
    written: threading.Event = field(default_factory=threading.Event)  # this rank has written its part, or failed
    all_ended: threading.Event = field(default_factory=threading.Event)  # every rank has
    saved: bool = False  # rank 0: it is in place


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
        self.about, self.keep, self.asynchronous, self.say, self.warn = dict(about), keep, asynchronous, say, warn
        self.versions = {"python": platform.python_version(), **dict(_versions())}
        self.last: int | None = None  # the step of the last checkpoint that is in place
        self.current: tuple[Saving, threading.Thread] | None = None
        self.copies: dict[str, Tensor] = {}
        self.attempts = 0
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
        saving = self._described(step, progress, arrays, best)
        if self._asynchronous(saving):
            self._copy(saving)
            self._start(saving)
        else:
            self._start(saving)
            self.wait()

    def _described(self, step: int, progress: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], best: float | None) -> Saving:
        if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
            raise TypeError(f"the array {objects[0]} holds Python objects, which only a pickle could keep")
        tensors, starts = self._states()
        scale = self.engine.loss_scale_state()
        manifest = {
            "format": FORMAT, "step": step, "ranks": self.world.size, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "tensors": {name: list(shape_of(parameter)) for name, parameter in self.model.named_parameters()},
            "buffers": {name: list(buffer.shape) for name, buffer in buffers_of(self.model).items()},
            "optimizer_steps": steps_of(self.engine.optimizer), "loss_scale": None if scale is None else list(scale),
            "best": best, "versions": self.versions, "progress": progress, **self.about,
        }  # fmt: skip
        manifest = json.loads(json.dumps(manifest))  # as it will be read; and whatever changes later does not change it
        folder = self.folder / f".{step_name(step)}.{self.token}-{self.attempts}.tmp"
        return Saving(step, folder, manifest, tensors, starts, {name: np.array(array) for name, array in arrays.items()}, best)

    def _states(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What this rank writes, by the names of its file, as views; and where its part of each parameter starts."""
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            held = self.engine.held(parameter)
            first, last = 0, held.weight.numel()
            if held.everywhere:  # each rank writes its share
                first, last = (last * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
            if first < last:
                starts[name] = held.start + first
                parts = (held.weight, held.exp_avg, held.exp_avg_sq)
                tensors |= {f"{kind}/{name}": part[first:last] for kind, part in zip(KINDS, parts, strict=True)}
        tensors |= {f"buffer/{name}": buffer for name, buffer in buffers_of(self.model).items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.world.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.world.device)
        return tensors, starts

    def _asynchronous(self, saving: Saving) -> bool:
        """As asked, or, the first time, whether every rank's copy fits into its share of the free host memory."""
        if self.asynchronous is None:
            copy = sum(tensor.nbytes for tensor in saving.tensors.values())
            fits = copy <= COPY_SHARE * machine.measure_machine(self.world).host_bytes
            self.asynchronous = all(self.world.gather(fits))
            if not self.asynchronous:
                self.say(f"checkpoints are written while training waits: a copy of {copy / 2**30:.1f} GiB does not fit beside it")
        return self.asynchronous

    def _copy(self, saving: Saving) -> None:
        """The states as they are now, into host memory that later saves use again: allocating it takes longer than copying."""
        for name, tensor in saving.tensors.items():
            if name not in self.copies:
                self.copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self.copies[name].copy_(tensor)
        saving.tensors = self.copies

    def _start(self, saving: Saving) -> None:
        thread = threading.Thread(target=self._run, args=(saving,), name="checkpoint", daemon=True)
        self.current = (saving, thread)
        thread.start()

    def wait(self) -> None:
        """Until what was saved is in place, or has failed."""
        if self.current is None:
            return
        saving, thread = self.current
        saving.written.wait()
        saving.error = next((error for error in self.world.gather(saving.error) if error is not None), None)
        saving.all_ended.set()
        thread.join()
        self.current = None
        if self.world.agree(saving.saved):
            self.last = saving.step

    def close(self) -> None:
        """Waits; the end."""
        self.wait()
        self.copies = {}

    def leave(self, timeout_s: float) -> None:
        """After an error, which other ranks may not have: the thread has so long to end what it is writing."""
        if self.current is not None:
            self.current[1].join(timeout_s)

    # --------------------------------------------------------------------------------------------- in the thread

    def _run(self, saving: Saving) -> None:
        """Writes this rank's part, and, on rank 0, what makes them a checkpoint."""
        part: dict[str, Any] = {}
        try:
            part = self._write_part(saving)
        except Exception as error:
            saving.error = _reason(error)
            part = {"error": saving.error}
            with suppress(OSError):
                (saving.folder / rank_file(self.world.rank)).unlink()
        with suppress(UsageError):  # where this cannot be written, the ranks hear of it at the next save
            _write_json(saving.folder / f"part-{self.world.rank}.json", part)
        saving.written.set()
        if self.world.is_main:
            try:
                self._complete(saving)
                saving.saved = True
            except Exception as error:
                kept = checkpoints_in(self.folder)
                last = f"the last good one is {kept[0]}" if kept else "there is none yet"
                self.warn(f"the checkpoint of step {saving.step:,} was not saved: {_reason(error)}; training goes on, {last}")
            shutil.rmtree(saving.folder, ignore_errors=True)

    def _write_part(self, saving: Saving) -> dict[str, Any]:
        saving.folder.mkdir(parents=True, exist_ok=True)
        path = saving.folder / rank_file(self.world.rank)
        described = {"format": FORMAT, "step": saving.step, "rank": self.world.rank, "starts": saving.starts}
        return _checked(path, tensor_file.write(path, saving.tensors, {"deepscale": json.dumps(described)}))

    def _complete(self, saving: Saving) -> None:
        """Waits for the others' parts, adds what is rank 0's, renames, removes what is no longer kept."""
        files = {rank_file(rank): part for rank, part in enumerate(self._parts(saving))}
        path = saving.folder / ARRAYS
        with path.open("wb") as file:
            np.savez(file, **saving.arrays)  # type: ignore[arg-type]
        sync(path)
        files[ARRAYS] = {"bytes": path.stat().st_size, "sha256": tensor_file.sha256_of(path)}
        for name, part in files.items():
            size = (saving.folder / name).stat().st_size
            if size != part["bytes"]:
                raise OSError(f"{name} has {size:,} bytes, {part['bytes']:,} were written")
        manifest = saving.manifest | {"files": files}
        _write_json(saving.folder / MANIFEST, manifest | {"sha256": signature(manifest)})
        for said in saving.folder.glob("part-*.json"):
            said.unlink()
        sync(saving.folder)
        target = self.folder / step_name(saving.step)
        if target.exists():  # a damaged one, or of a run that went on from an earlier one
            _remove(target)
        saving.folder.rename(target)
        sync(self.folder)
        took, mib = time.monotonic() - saving.begin, sum(part["bytes"] for part in files.values()) / 2**20
        self.say(f"checkpoint of step {saving.step:,} saved in {took:.1f} s, {mib:,.0f} MiB: {target}")
        self._forget(saving)

    def _parts(self, saving: Saving) -> list[dict[str, Any]]:
        """What every rank wrote. Raises OSError with the first failure, once every rank has ended."""
        paths = [saving.folder / f"part-{rank}.json" for rank in range(self.world.size)]
        deadline: float | None = None
        while not all(path.is_file() for path in paths):
            if saving.all_ended.is_set():
                if saving.error is not None:
                    raise OSError(saving.error)
                deadline = deadline or time.monotonic() + VISIBLE_S
                if time.monotonic() > deadline:
                    raise OSError(f"what other ranks wrote cannot be seen here: {self.folder} is not the same folder on every node")
            time.sleep(POLL_S)
        parts: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
        if errors := [part["error"] for part in parts if "error" in part]:
            raise OSError(errors[0])
        return parts

    def _forget(self, saving: Saving) -> None:
        """Notes the best, and removes all but the last `keep` and it."""
        best = self._best()
        if saving.best is not None and (best is None or saving.best > best["accuracy"]):
            best = {"step": saving.step, "accuracy": saving.best}
            _write_json(self.folder / BEST, best)
        for old in checkpoints_in(self.folder)[self.keep :]:
            if best is None or old.name != step_name(best["step"]):
                _remove(old)

    def _best(self) -> dict[str, Any] | None:
        """The best checkpoint that is there: its step and accuracy."""
        try:
            best = json.loads((self.folder / BEST).read_text())
            there = (self.folder / step_name(int(best["step"]))).is_dir()
            return {"step": int(best["step"]), "accuracy": float(best["accuracy"])} if there else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _checked(path: Path, written: tensor_file.Written) -> dict[str, Any]:
    """The file's size and hash, after reading it back. Raises OSError where that is not what was written."""
    if tensor_file.sha256_of(path) != written.sha256:
        raise OSError(f"{path.name} reads back otherwise than it was written; the disk or the memory is faulty")
    return written._asdict()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A small file, complete or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value))


def _remove(checkpoint: Path) -> None:
    """Renamed first: a run that is killed meanwhile leaves no half of a checkpoint."""
    gone = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _reason(error: Exception) -> str:
    """The error as the middle of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)
