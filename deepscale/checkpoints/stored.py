"""A checkpoint on disk: found, verified, read.

    DIR/step-00001200/manifest.json          what the run was, every file's bytes and SHA-256, and its own SHA-256
                      rank-0.safetensors     what rank 0 held: ranges of each parameter's flat master weight and moments (`Fragments`)
                      arrays.npz             NumPy arrays that came with it

A folder `step-...` is complete: it was written under another name and renamed. What is in it is read by the manifest's list and by
formats that hold no code; other files are never opened.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepscale.checkpoints.tensor_file import TensorFile
from deepscale.errors import UsageError
from deepscale.files import sha256_of
from deepscale.world import World

FORMAT = 1
MANIFEST, ARRAYS = "manifest.json", "arrays.npz"
KINDS = ("weight", "exp_avg", "exp_avg_sq")  # where a manifest does not say: Adam's
MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
STEP = re.compile(r"step-(\d{8,})")
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
Manifest = dict[str, Any]


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def rank_file(rank: int) -> str:
    """The file of what a rank held."""
    return f"rank-{rank}.safetensors"


def ignore(text: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `manifest` holds what the saver was told: "network", "asked", "settings" (flat, resolved), "progress", "versions"."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimiser steps that were done."""
        return int(self.manifest["step"])

    @property
    def ranks(self) -> int:
        """Ranks that wrote it."""
        return int(self.manifest["ranks"])

    @property
    def progress(self) -> dict[str, Any]:
        """What `Saver.save` was given."""
        return dict(self.manifest["progress"])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that `Saver.save` was given. Raises UsageError."""
        try:
            with np.load(self.path / ARRAYS, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except Exception as error:  # NumPy, zipfile and zlib raise a dozen kinds for bytes that are none of theirs
            raise UsageError(f"{self.path / ARRAYS} cannot be read ({error}); resume from another checkpoint") from None

    def weights(self) -> dict[str, Tensor]:
        """The stacked network's state, float32, on the CPU: parameters, and BatchNorm's running statistics averaged over ranks. Raises UsageError."""
        with Fragments(self.path, self.manifest) as fragments:
            state = {}
            for name, shape in fragments.shapes.items():
                state[name] = torch.empty(shape)
                fragments.read_into("weight", name, 0, state[name].view(-1))
            return state | {name: fragments.averaged(name) for name in self.manifest["buffers"]}


class Fragment(NamedTuple):
    """Elements `start` to `end` of a flat parameter, in the file of one rank."""

    start: int
    end: int
    file: TensorFile


class Fragments:
    """The files of all ranks as one: any range of any parameter. Raises UsageError where they are not exactly the manifest's parameters.

    A rank's file holds, one-dimensional, `KIND/NAME` for the weight and what the optimiser remembers of it (the manifest's kinds), whose first
    element is the parameter's `starts[NAME]` (metadata); and, of this rank alone, `buffer/NAME` and `random/DEVICE`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.kinds = path, tuple(manifest.get("kinds", KINDS))
        self.shapes = {name: torch.Size(shape) for name, shape in manifest["tensors"].items()}
        self.buffers = {name: torch.Size(shape) for name, shape in manifest["buffers"].items()}
        self.found: dict[str, list[Fragment]] = {name: [] for name in self.shapes}
        self.stack = ExitStack()
        with self.stack:  # closes what was opened if anything is wrong
            self.files = [self.stack.enter_context(TensorFile(path / rank_file(rank))) for rank in range(manifest["ranks"])]
            for file in self.files:
                self._take(file)
            for name, parts in self.found.items():
                self._refuse_gaps(name, parts)
            self.stack = self.stack.pop_all()

    def __enter__(self) -> "Fragments":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _take(self, file: TensorFile) -> None:
        """Notes a rank's ranges; every entry must be one that a rank writes."""
        starts = _starts(file)
        for entry, (dtype, shape, _) in file.entries.items():
            kind, _, name = entry.partition("/")
            if kind in self.kinds:
                whole = name in starts and name in self.shapes and len(shape) == 1
                good = whole and dtype == torch.float32 and shape == file.entries.get(f"weight/{name}", (None, None))[1]
                if good and kind == "weight":
                    self.found[name].append(Fragment(starts[name], starts[name] + shape[0], file))
                    good = all(f"{other}/{name}" in file.entries for other in self.kinds)
            elif kind == "buffer":
                good = shape == self.buffers.get(name) and dtype in (torch.float32, torch.float64)
            else:
                good = kind == "random" and dtype == torch.uint8 and len(shape) == 1
            if not good:
                raise UsageError(f"{file.path} holds {entry} {shape}, which is no part of this network's state")
        missing = [name for name in self.buffers if f"buffer/{name}" not in file.entries]
        if missing:
            raise UsageError(f"{file.path} holds no {missing[0]}")

    def _refuse_gaps(self, name: str, parts: list[Fragment]) -> None:
        parts.sort(key=lambda part: part.start)
        ends = [0, *(part.end for part in parts)]
        if [part.start for part in parts] != ends[:-1] or ends[-1] != math.prod(self.shapes[name]):
            ranges = ", ".join(f"{part.start:,} to {part.end:,}" for part in parts) or "nothing"
            raise UsageError(f"{self.path}: of {name}'s {math.prod(self.shapes[name]):,} elements its files hold {ranges}")

    def read_into(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Elements `start` and following of a flat parameter or moment, as many as `out` (k,) takes, converted to its dtype and device."""
        target = out if out.dtype == torch.float32 else torch.empty(out.shape)
        end = start + out.numel()
        for part in self.found[name]:
            first, last = max(start, part.start), min(end, part.end)
            if first < last:
                part.file.read_into(f"{kind}/{name}", first - part.start, target[first - start : last - start])
        if target is not out:
            out.copy_(target)

    def averaged(self, name: str) -> Tensor:
        """A buffer's mean over the ranks."""
        return torch.stack([file.read(f"buffer/{name}") for file in self.files]).sum(0) / len(self.files)


def _starts(file: TensorFile) -> dict[str, int]:
    try:
        starts = json.loads(file.metadata["deepscale"])["starts"]
        if not all(type(start) is int for start in starts.values()):
            raise ValueError("a start is no whole number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{file.path} was not written by deepscale ({error!r})") from None
    return dict(starts)


# ------------------------------------------------------------------------------------------------- manifest and verification


def signature(manifest: Manifest) -> str:
    """The SHA-256 of all that a manifest says beside it."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, itself verified. Raises UsageError, whose text says what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written = manifest["sha256"]
        if manifest["format"] != FORMAT:
            raise UsageError(f"its format is {manifest['format']!r}, this deepscale reads format {FORMAT}")
        if written != signature(manifest):
            raise UsageError(f"{MANIFEST} was changed after it was written")
        _refuse_malformed(manifest)
    except OSError as error:
        raise UsageError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{MANIFEST} is not a manifest ({error!r})") from None
    return dict(manifest)


def _refuse_malformed(manifest: Manifest) -> None:
    """A signed manifest may still be nonsense, or meant ill. Raises ValueError, KeyError and their like, and UsageError."""
    ranks, files = manifest["ranks"], manifest["files"]
    expected = {rank_file(rank) for rank in range(min(ranks, len(files)))} | {ARRAYS}
    if len(files) != ranks + 1 or set(files) != expected:
        raise UsageError(f"{MANIFEST} lists {', '.join(sorted(files)[:5])}, which does not fit {ranks} ranks")
    kinds = manifest.get("kinds", KINDS)
    if kinds[:1] not in (["weight"], ("weight",)) or not set(kinds[1:]) <= MOMENTS or len(set(kinds)) != len(kinds):
        raise UsageError(f"{MANIFEST} names {', '.join(map(str, kinds))} of each weight, which no optimiser here has")
    shapes = [*manifest["tensors"].values(), *manifest["buffers"].values()]
    counts = [manifest["step"], manifest["optimizer_steps"], *(file["bytes"] for file in files.values()), *(n for shape in shapes for n in shape)]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a number in it is not whole, or below 0")
    if not all(isinstance(file["sha256"], str) for file in files.values()) or not isinstance(manifest["progress"], dict):
        raise ValueError("a hash or the progress is missing")
    if manifest["loss_scale"] is not None:
        float(manifest["loss_scale"][0]), int(manifest["loss_scale"][1])


def wrong_with(path: Path, manifest: Manifest, names: list[str]) -> str | None:
    """What is wrong with some of a checkpoint's files, or None: first sizes, then hashes."""
    files = {name: manifest["files"][name] for name in names}
    for name, written in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, {written['bytes']:,} were written"
    for name, written in files.items():
        try:
            if sha256_of(path / name) != written["sha256"]:
                return f"{name} was changed after it was written (its SHA-256 is another)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def verified(path: Path, world: World = ALONE) -> Checkpoint:
    """The checkpoint in a folder, all bytes checked, each rank checking some of the files. Raises UsageError on all ranks, with what is wrong."""
    manifest: Manifest | str = ""
    if world.is_main:
        try:
            manifest = read_manifest(path)
            Fragments(path, manifest).__exit__()
        except UsageError as error:
            manifest = str(error)
    manifest = world.agree(manifest)
    if isinstance(manifest, str):
        raise UsageError(manifest)
    found = world.gather(wrong_with(path, manifest, sorted(manifest["files"])[world.rank :: world.size]))
    if problems := [problem for problem in found if problem is not None]:
        raise UsageError(problems[0])
    return Checkpoint(path, manifest)


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of complete checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def find(folder: Path, warn: Callable[[str], None], world: World = ALONE) -> Checkpoint | None:
    """The newest intact checkpoint of a --checkpoint-dir, None where there is none. Every rank must ask; all get the same.

    Each damaged one that is passed over is named in a warning, with what is wrong with it.
    """
    for path in world.agree(checkpoints_in(folder)):
        try:
            return verified(path, world)
        except UsageError as error:
            warn(f"the checkpoint {path} is damaged and is not used: {error}")
    return None


def open_checkpoint(path: Path, warn: Callable[[str], None] = ignore, world: World = ALONE) -> Checkpoint:
    """The checkpoint in `path` (DIR/step-00001200), or the newest intact one of `path` (DIR). Raises UsageError, naming what is wrong with it."""
    if world.agree(not (path / MANIFEST).is_file() and bool(checkpoints_in(path))):
        found = find(path, warn, world)
        if found is None:
            raise UsageError(f"all checkpoints in {path} are damaged; give another folder")
        return found
    if world.agree(not path.is_dir()):
        raise UsageError(f"there is no checkpoint {path}; give a folder step-... of a --checkpoint-dir, or the folder that holds them")
    try:
        return verified(path, world)
    except UsageError as error:
        raise UsageError(f"{path} is no intact checkpoint: {error}; give another one") from None
