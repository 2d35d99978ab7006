"""Checkpoints to resume from, in a format of our own that any ZeRO stage and number of ranks reads, and trained weights as one file.

    checkpoint = find(folder, warn, world)                   # the newest intact one, or None
    restore(checkpoint, model, engine, world, say)           # weights, moments, step, loss scale, running statistics, random states
    saver = Saver(folder, model, engine, world, about=about(asked, settings, info), keep=2, asynchronous=None, say=..., warn=...)
    saver.save(step, progress, arrays, best=accuracy)        # every rank; `progress` and `arrays` come back as they were
    saver.close()
    start_from(path, model, layers, say)                     # trained weights as initial values, as far as they fit

No file of a checkpoint is ever unpickled.
"""

from deepscale.checkpoints.restoring import restore
from deepscale.checkpoints.saving import Saver, about
from deepscale.checkpoints.starting import check_there, start_from
from deepscale.checkpoints.stored import Checkpoint, find, open_checkpoint
from deepscale.checkpoints.trained import Trained, convert, trained
from deepscale.checkpoints.weights import WEIGHTS, check_writable, gathered_state, network_of, read, save, write

__all__ = [
    "Checkpoint", "Saver", "about", "find", "open_checkpoint", "restore",
    "Trained", "check_there", "convert", "start_from", "trained",
    "WEIGHTS", "check_writable", "gathered_state", "network_of", "read", "save", "write",
]  # fmt: skip
