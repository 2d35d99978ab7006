"""Which optimiser steps of a run are recorded.

Gradients change fast early and slowly later, so `auto` spaces records by powers: 10 per decade up to step 100, then 25 per
decade; 43 records of 1,000 steps, 82 of 35,100, 118 of a million. Steps are counted from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

FEWEST = 12  # records of a run that has so many steps: first, last and 10 between
DENSE = 10  # records per decade of steps up to DENSE_UNTIL
DENSE_UNTIL = 100
SPARSE = 25  # records per decade from there on: the decades are long, and most of a run lies in the last
UNMEASURED = 3  # steps of a run whose length is measured on them; all are recorded

Every = int | Literal["auto"]


@dataclass(frozen=True)
class Schedule:
    """The steps that are recorded, ascending; whether there were more than the record holds."""

    steps: tuple[int, ...]
    thinned: bool = False


def record_steps(total: int | None, every: Every, capacity: int, recorded: Sequence[int] = ()) -> Schedule:
    """The steps of a run that are recorded, among them the first and the last.

    `total` is the number of steps of the run, None while it is not yet known: then the first `UNMEASURED` steps, which
    are given back as `recorded` once it is. `every` is "auto", or N for steps 1, N, 2N ... and the last, or 0 for none.
    `capacity` is the largest number of records; what is more is thinned evenly, but never what is recorded already.

    Raises ValueError for a capacity that does not hold the recorded steps, the first and the last.

    >>> record_steps(30, "auto", 200).steps
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 30)
    >>> record_steps(30, 10, 200, recorded=(1, 2, 3)).steps
    (1, 2, 3, 10, 20, 30)
    """
    if every == 0:
        return Schedule(())
    if total is None:
        return Schedule(tuple(range(1, UNMEASURED + 1)))
    kept = tuple(recorded) or (1,)
    if total <= kept[-1]:
        return Schedule(kept)
    room = capacity - len(kept) - 1
    if room < 0:
        raise ValueError(f"{capacity} records do not hold {len(kept)} recorded steps and the last")
    between = _by_powers(kept, total) if every == "auto" else _multiples(every, kept[-1], total)
    if len(between) > room:
        # Evenly between the last recorded and the last step, which are index 0 and len(between) + 1 of the whole.
        gap = (len(between) + 1) / (room + 1)
        return Schedule((*kept, *(between[round(gap * (i + 1)) - 1] for i in range(room)), total), thinned=True)
    return Schedule((*kept, *between, total))


def _multiples(every: int, after: int, before: int) -> range:
    """The multiples of `every` between two steps, both left out; nothing is allocated."""
    return range(every * (after // every + 1), before, every)


def _by_powers(kept: tuple[int, ...], total: int) -> list[int]:
    """The steps between the last kept and the last one: spaced by powers, then as many as `FEWEST` asks for."""
    chosen, power = set[int](), 0
    while (step := _power(power)) < total:
        chosen.add(step)
        power += 1
    steps = sorted({*kept, *(step for step in chosen if step > kept[-1]), total})
    while len(steps) < min(total, FEWEST):
        gaps = [(after / before, before, after) for before, after in pairwise(steps) if after - before > 1 and before >= kept[-1]]
        if not gaps:
            break
        _, before, after = max(gaps)
        steps = sorted([*steps, min(after - 1, max(before + 1, round((before * after) ** 0.5)))])
    return [step for step in steps if kept[-1] < step < total]


def _power(index: int) -> int:
    dense = 2 * DENSE  # indices up to DENSE_UNTIL
    return round(10 ** (index / DENSE)) if index <= dense else round(DENSE_UNTIL * 10 ** ((index - dense) / SPARSE))
