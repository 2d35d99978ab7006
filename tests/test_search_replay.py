"""docs/sweeps.md says how often ASHA keeps both goals where the grid's own curves run in random orders. Here they run again, by Ray's ASHA."""

import json
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY

from deepscale.sweeps import search, space

STEPS, EVERY, ORDERS = 600, 50, 300
CURVES = [
    [value for step, value in json.loads(path.read_text())["curves"]["val/accuracy"] if step % EVERY == 0]
    for path in sorted((REPOSITORY / "docs/results/search-grid").glob("*.json"))
]
BEST = max(curve[-1] for curve in CURVES)


def replay(scheduler: Any, order: list[int]) -> tuple[int, float]:
    """(steps in all, best last accuracy) of trainings in that order, two at a time, which end where the scheduler says so."""
    waiting, running, steps, best = [(number, 0) for number in reversed(order)], [], 0, 0.0
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(waiting.pop())
            scheduler.on_trial_add(None, SimpleNamespace(trial_id=str(running[-1][0])))
        going = []
        for number, step in running:
            value, step, steps = CURVES[number][step // EVERY], step + EVERY, steps + EVERY
            if step == STEPS:  # told to Tune as ended
                best = max(best, value)
            elif scheduler.on_trial_result(None, SimpleNamespace(trial_id=str(number)), {"step": step, "val/accuracy": value}) == "CONTINUE":
                going.append((number, step))
        running = going
    return steps, best


def share(make: Callable[[], Any]) -> float:
    """In how many of the orders at most 40 % of all steps lead to within 1 point of the best."""
    draws, kept = random.Random(0), 0
    for _ in range(ORDERS):
        scheduler = make()
        scheduler.set_search_properties("val/accuracy", "max")
        steps, best = replay(scheduler, draws.sample(range(len(CURVES)), len(CURVES)))
        kept += steps <= 0.4 * STEPS * len(CURVES) and BEST - best <= 0.01
    return kept / ORDERS


def test_how_often_both_goals_are_kept() -> None:
    schedulers = pytest.importorskip("ray.tune.schedulers")
    assert {len(curve) for curve in CURVES} == {STEPS // EVERY} and len(CURVES) == 16
    ours = space.read(REPOSITORY / "tune/spaces/search.yaml", keys={"scheduler": "asha"})

    def best_third(first: int) -> Callable[[], Any]:
        return lambda: schedulers.ASHAScheduler(time_attr="step", max_t=STEPS + 1, grace_period=first, reduction_factor=3)

    measured = [share(make) for make in (lambda: search.scheduler(ours), best_third(50), best_third(100))]
    page = (REPOSITORY / "docs/sweeps.md").read_text().replace("\n", " ")
    said = re.search(r"kept both goals in (\d+) % of them \((\d+) % with the best third from step 50; (\d+) %", page)
    assert said is not None
    # Three standard deviations of a share among so many orders.
    assert measured == pytest.approx([int(number) / 100 for number in said.groups()], abs=3 * (0.25 / ORDERS) ** 0.5), measured
