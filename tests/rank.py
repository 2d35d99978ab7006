"""What the programs that are ranks of a test (*_worker.py) have in common."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from deepscale import ops, world
from deepscale.config import EngineConfig
from deepscale.engine import hush

Case = dict[str, Any]


def run_cases(run: Callable[[Case, world.World], Any], first: Callable[[world.World], dict[str, Any]] = lambda place: {}) -> None:
    """`python WORKER cases.json results`: runs each case of the file in one process group, and saves results by name to results.RANK.

    `first` gives results that need no case.
    """
    cases, target = sys.argv[1:3]
    hush(False)
    ops.skip_shm_comm()
    place = world.join(EngineConfig(threads=1, device="cpu"))
    results = first(place)
    with open(cases) as file:
        for case in json.load(file):
            torch.manual_seed(0)
            results[case["name"]] = run(case, place)
    torch.save(results, f"{target}.{place.rank}")
    world.leave()
