"""Trainings that are programs of their own, as a sweep and a study start them: what they do not inherit, and what their end says.

Knows neither torch nor Ray: the worker of a sweep's trial loads this.
"""

import signal
from pathlib import Path

from filelock import FileLock

from deepscale import errors
from deepscale.folder_lock import LOCK
from deepscale.sweeps.tags import FINISHED, NON_FINITE, OUT_OF_MEMORY

# What a launcher or a job may have set: a program that is started here is a world of its own.
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Why a training has no result.
REFUSED, INTERRUPTED = "refused", "interrupted"
# Exit codes of a training after which nothing is left to train: these are results, and a second try would end in the same way.
ENDS = {0: FINISHED, errors.NonFiniteError.exit_code: NON_FINITE, errors.OutOfMemoryError.exit_code: OUT_OF_MEMORY}
PATIENCE_S = 90.0  # from SIGTERM, after which a training writes a checkpoint, to SIGKILL
PREDECESSOR_S = 120.0  # for the same training of a sweep or study that was killed, which still writes its checkpoint


def wait_for_predecessor(checkpoints: Path) -> None:
    """Until the same training, whose sweep or study was killed, has written its last checkpoint."""
    if checkpoints.is_dir():
        with FileLock(checkpoints / LOCK).acquire(timeout=PREDECESSOR_S):
            pass


def last_words(path: Path) -> str:
    """The sentence with which a training ended, or its last line."""
    try:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    said = [line for line in lines if line.startswith("deepscale: ")]
    return (said or lines or ["it has said nothing"])[-1].removeprefix("deepscale: ")[:500]


def how(code: int) -> str:
    """ "with exit code 1", "by signal SIGKILL"."""
    return f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
