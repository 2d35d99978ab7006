"""What a rank that fails tells rank 0, which keeps the run's record and would see only that the rank is gone."""

import json
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from deepscale import rendezvous
from deepscale.world import World

KEY = "last words"
PATIENCE = timedelta(seconds=10)


class Words(NamedTuple):
    """Of which rank; its outcome, as a run's record has it; and why."""

    rank: int
    outcome: str
    text: str


def leave(place: World, outcome: str, text: str) -> bool:
    """Whether it is told: rank 0 is another process, and could be reached."""
    if place.size > 1 and not place.is_main:
        with suppress(Exception):
            rendezvous.connect(PATIENCE).set(KEY, json.dumps([place.rank, outcome, text]))
            return True
    return False


def read(place: World) -> Words | None:
    """What a rank has told; of several, the last."""
    if place.size > 1:
        with suppress(Exception):
            store = rendezvous.connect(PATIENCE)
            if store.check([KEY]):
                return Words(*json.loads(store.get(KEY)))
    return None
