"""Writing checkpoints: complete and verified, or not at all.

Every rank writes its own file and says in a small one (`part-0.json`) what it wrote, or that it failed; rank 0 waits for all of these,
writes the manifest, renames. So threads need no collective. A rank that could not even say so, on a full disk, says it at the
next save, where the ranks tell each other how the last one went.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepscale.checkpoints import tensor_file
from deepscale.checkpoints.stored import ARRAYS, FORMAT, MANIFEST, checkpoints_in, rank_file, signature, step_name, step_of
from deepscale.files import atomic, sha256_of, sync
from deepscale.world import World

BEST = "best.json"
POLL_S = 0.02
VISIBLE_S = 60.0  # a network file system shows a file to other nodes within this time


@dataclass
class Draft:
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


@dataclass
class Writer:
    """What a saver's thread does: one checkpoint from `Draft` to its folder in `folder`, and the removal of those that are not kept."""

    folder: Path
    world: World
    keep: int
    say: Callable[[str], None]
    warn: Callable[[str], None]

    def __call__(self, draft: Draft) -> None:
        """Writes this rank's part, and, on rank 0, what makes them a checkpoint."""
        part: dict[str, Any] = {}
        try:
            part = self._write_part(draft)
        except Exception as error:
            draft.error = _reason(error)
            part = {"error": draft.error}
            with suppress(OSError):
                (draft.folder / rank_file(self.world.rank)).unlink()
        with suppress(OSError):  # where this cannot be written, the ranks hear of it at the next save
            self._say_part(draft, part)
        draft.written.set()
        if self.world.is_main:
            try:
                self._complete(draft)
                draft.saved = True
                self._forget(draft)
            except Exception as error:
                kept = checkpoints_in(self.folder)
                last = f"the last good one is {kept[0]}" if kept else "there is none yet"
                what = "older checkpoints were not removed" if draft.saved else f"the checkpoint of step {draft.step:,} was not saved"
                self.warn(f"{what}: {_reason(error)}; training goes on, {last}")
            shutil.rmtree(draft.folder, ignore_errors=True)

    def _write_part(self, draft: Draft) -> dict[str, Any]:
        draft.folder.mkdir(parents=True, exist_ok=True)
        path = draft.folder / rank_file(self.world.rank)
        described = {"format": FORMAT, "step": draft.step, "rank": self.world.rank, "starts": draft.starts}
        return tensor_file.write(path, draft.tensors, {"deepscale": json.dumps(described)})._asdict()

    def _say_part(self, draft: Draft, part: Mapping[str, Any]) -> None:
        """Tells rank 0. Not synced: after a loss of power nobody reads it."""
        note = draft.folder / f"part-{self.world.rank}.json"
        note.with_suffix(".tmp").write_text(json.dumps(part))
        note.with_suffix(".tmp").replace(note)

    def _complete(self, draft: Draft) -> None:
        """Waits for the others' parts, adds what is rank 0's, renames, removes what is no longer kept."""
        files = {rank_file(rank): part for rank, part in enumerate(self._parts(draft))}
        path = draft.folder / ARRAYS
        with path.open("wb") as file:
            np.savez(file, **draft.arrays)  # type: ignore[arg-type]
        sync(path)
        files[ARRAYS] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, part in files.items():
            size = (draft.folder / name).stat().st_size
            if size != part["bytes"]:
                raise OSError(f"{name} has {size:,} bytes, {part['bytes']:,} were written")
        manifest = draft.manifest | {"files": files}
        (draft.folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": signature(manifest)}))
        sync(draft.folder / MANIFEST)
        for said in draft.folder.glob("part-*.json"):
            said.unlink()
        sync(draft.folder)
        target = self.folder / step_name(draft.step)
        old = target.with_name(f".{target.name}.old.tmp")
        if target.exists():  # a damaged one, or one of a run that went on from an earlier one
            target.rename(old)
        draft.folder.rename(target)
        sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        took, mib = time.monotonic() - draft.begin, sum(part["bytes"] for part in files.values()) / 2**20
        self.say(f"checkpoint of step {draft.step:,} saved in {took:.1f} s, {mib:,.0f} MiB: {target}")

    def _parts(self, draft: Draft) -> list[dict[str, Any]]:
        """What every rank wrote. Raises OSError with the first failure, once every rank has ended."""
        paths = [draft.folder / f"part-{rank}.json" for rank in range(self.world.size)]
        deadline: float | None = None
        while not all(path.is_file() for path in paths):
            if draft.all_ended.is_set():
                if draft.error is not None:
                    raise OSError(draft.error)
                deadline = deadline or time.monotonic() + VISIBLE_S
                if time.monotonic() > deadline:
                    raise OSError(f"what other ranks wrote cannot be seen here: {self.folder} is not the same folder on every node")
            time.sleep(POLL_S)
        parts: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
        if errors := [part["error"] for part in parts if "error" in part]:
            raise OSError(errors[0])
        return parts

    def _forget(self, draft: Draft) -> None:
        """Notes the best, and removes all but the last `keep` and it.

        Checkpoints of later steps are damaged, or of a run that this one does not continue: they are put aside, where `find` does not look,
        in place of what an earlier run has put there.
        """
        for later in checkpoints_in(self.folder):
            if step_of(later) > draft.step:
                token = draft.folder.name.split(".")[2].partition("-")[0]  # of this run of the program
                for earlier in self.folder.glob("aside-*"):
                    if not earlier.name.endswith(token):
                        shutil.rmtree(earlier, ignore_errors=True)
                aside = later.with_name(f"aside-{later.name}-{token}")
                later.rename(aside)
                self.warn(f"the checkpoint {later} is of a later step than this run has reached, and not one it goes on from: it is now {aside}")
        best = self._best()
        if draft.best is not None and (best is None or draft.best > best["accuracy"]):
            best = {"step": draft.step, "accuracy": draft.best}
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
