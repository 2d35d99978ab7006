"""One rank of test_nvme.py: cases of engine_worker.py and of checkpoint_worker.py ("saves"), and the check before a run.

    RANK=0 WORLD_SIZE=1 ... python nvme_worker.py cases.json results

A case with "wrong" is a check with that done wrong; its result is the sentence, or None where nothing was said.
"""

import os
from typing import Any
from unittest.mock import patch

import checkpoint_worker
import engine_worker
from rank import Case, run_cases
from torch import Tensor

from deepscale import engine_config, world
from deepscale.config import Config
from deepscale.errors import UsageError
from deepscale.nvme import transfer
from deepscale.nvme.check import check

read = transfer.Handle._read


def read_as_libaio(self: transfer.Handle, part: Tensor, path: str, start: int) -> None:
    """O_DIRECT into the tensor itself, and nobody looks at the refusal of an address between blocks."""
    if part.data_ptr() % 512 == 0:
        read(self, part, path, start)


def one_number(self: transfer.Handle, part: Tensor, path: str, start: int) -> None:
    """A gradient that is wrong in its first number, which changes its sign."""
    read(self, part, path, start)
    if "_gradient_" in path and start == 0:
        part[3] ^= 0x80


WRONG = {"as libaio": read_as_libaio, "one number": one_number, "nothing": read}


def checked(case: Case, place: world.World) -> str | None:
    """The sentence of the check, None where all is right."""
    settings = Config().replace(**{"batch_size": 8, "patch_size": 4, "precision": "fp32", "activations": "keep", "segment": None, **case["settings"]})
    with patch.object(transfer.Handle, "_read", WRONG[case["wrong"]]):
        try:
            check(settings, engine_config.resolve(settings, place.size, False), place)
        except UsageError as error:
            return str(error)
    return None


def run(case: Case, place: world.World) -> Any:
    """A check, or steps of training, and the names in the disk's folder meanwhile."""
    if "wrong" in case:
        return checked(case, place)
    if "saves" in case:
        return checkpoint_worker.run(case, place)
    result = engine_worker.run(case, place)
    path = case["settings"].get("nvme_path")
    files = [file for _, _, names in os.walk(path) for file in names if file.endswith(".swp")] if path else []
    return result | {"files": files}


if __name__ == "__main__":
    run_cases(run)
