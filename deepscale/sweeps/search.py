"""Which trial comes next, and which is stopped early: Tune's searchers and schedulers for a space.

A search keeps no state of its own: what it must know of trials that have ended, it is told from their folders.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepscale import errors
from deepscale.errors import UsageError
from deepscale.sweeps import values
from deepscale.sweeps.space import Space, Trial, settings_of, trials
from deepscale.sweeps.tags import FINISHED, STOPPED_EARLY

BEGUN, ENDED = "trial.json", "ended.json"  # in a trial's folder
SEED = 0  # of Optuna's sampler; more by the trials of earlier starts, which it would draw again
REDUCTION = 4  # ASHA goes on with the best quarter of each rung
RUNGS = 2  # before the end: at a 16th and at a quarter of the steps


def count(space: Space) -> int:
    """How many trials the sweep has."""
    return len(space.seeds) * (space.samples or 0) if space.search == "optuna" else len(trials(space))


def begun(folder: Path) -> dict[int, dict[str, Any]]:
    """Number -> what each trial in a folder has left of itself: `settings`, and of those that have ended `outcome` and `last`."""
    found = {}
    for name in (BEGUN, ENDED):
        for path in folder.glob(f"*/{name}"):
            record = json.loads(path.read_text())
            found[int(record["number"])] = record
    return dict(sorted(found.items()))


class Listed:
    """The trials of a grid or of random search in their order."""

    def __init__(self, left: Sequence[Trial]) -> None:
        self.left = list(left)

    def next(self) -> Trial | None:
        """The next trial, None after the last."""
        return self.left.pop(0) if self.left else None

    def tell(self, number: int, outcome: str | None, last: Mapping[str, Any]) -> None:
        """How a trial has ended, None for one that failed. Nothing follows from it."""


class Optuna:
    """Optuna's points, each trained with every seed; it is told the mean over them. `known`: `begun` of an earlier start of the sweep."""

    def __init__(self, space: Space, known: Mapping[int, Mapping[str, Any]], replay: bool) -> None:
        try:
            import optuna
        except ImportError:
            raise errors.MissingPackageError("optuna", "sweep", "search: optuna") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.state, self.seeds = space, optuna.trial.TrialState, len(space.seeds)
        self.distributions = _distributions(optuna.distributions, space)
        startup = max(4, (space.samples or 0) // 4)  # drawn evenly, before it models what is good
        sampler = optuna.samplers.TPESampler(seed=SEED + len(known), n_startup_trials=startup, constant_liar=True)
        self.study = optuna.create_study(direction="maximize" if space.mode == "max" else "minimize", sampler=sampler)
        self.asked: list[Any] = []  # Optuna's trials: the points
        self.told: dict[int, tuple[str | None, Mapping[str, Any]]] = {}  # number -> its end
        self.left: list[Trial] = []
        while settings := next((known[number]["settings"] for number in self._numbers(len(self.asked)) if number in known), None):
            self.study.enqueue_trial({name: self._parameter(name, settings[name]) for name in space.axes})
            self._ask()
        ends = {number: record for number, record in known.items() if "outcome" in record}
        for number, record in ends.items():
            self.tell(number, record["outcome"], record["last"])
        if not replay:
            self.left = [trial for trial in self.left if trial.number not in ends]

    def next(self) -> Trial | None:
        """The next trial, None after the last."""
        if not self.left and len(self.asked) < (self.space.samples or 0):
            self._ask()
        return self.left.pop(0) if self.left else None

    def tell(self, number: int, outcome: str | None, last: Mapping[str, Any]) -> None:
        """How a trial has ended, None for one that failed; the last of a point's seeds tells Optuna."""
        if number in self.told or number > len(self.asked) * self.seeds:
            return
        self.told[number] = outcome, last
        index = (number - 1) // self.seeds
        ends = [self.told[other] for other in self._numbers(index) if other in self.told]
        if len(ends) == self.seeds:
            self._tell(self.asked[index], {outcome for outcome, _ in ends}, [last for _, last in ends])

    def _tell(self, point: Any, outcomes: set[str | None], last: Sequence[Mapping[str, Any]]) -> None:
        reached = [float(values.get(self.space.metric, math.nan)) for values in last]
        if None in outcomes:
            self.study.tell(point, state=self.state.FAIL)
        elif outcomes == {FINISHED}:
            self.study.tell(point, statistics.fmean(reached))
        else:  # Optuna takes what was stopped early for worse than what was not, and what has no value, having diverged, for worst
            if outcomes <= {FINISHED, STOPPED_EARLY} and not math.isnan(sum(reached)):
                point.report(statistics.fmean(reached), min(int(values["step"]) for values in last))
            self.study.tell(point, state=self.state.PRUNED)

    def _ask(self) -> None:
        numbers = self._numbers(len(self.asked))
        self.asked.append(self.study.ask(self.distributions))
        point = self.asked[-1].params
        self.left += [Trial(number, settings_of(self.space, point | {"seed": seed})) for number, seed in zip(numbers, self.space.seeds, strict=True)]

    def _numbers(self, index: int) -> range:
        """Numbers of a point's trials."""
        return range(index * self.seeds + 1, (index + 1) * self.seeds + 1)

    def _parameter(self, name: str, text: str) -> Any:
        limits = self.space.ranges.get(name)
        return text if limits is None else min(max(float(text), limits.low), limits.high)


def _distributions(kinds: Any, space: Space) -> dict[str, Any]:
    found = {name: kinds.CategoricalDistribution(axis) for name, axis in space.grid.items()}
    for name, limits in space.ranges.items():
        kind = kinds.IntDistribution if limits.whole else kinds.FloatDistribution
        number = round if limits.whole else float
        found[name] = kind(number(limits.low), number(limits.high), log=limits.log)
    return found


def scheduler(space: Space) -> Any:
    """Tune's scheduler, None without one."""
    if space.scheduler == "none":
        return None
    from ray.tune import schedulers

    steps, every = check_scheduler(space)
    least = every * max(1, math.ceil(steps / REDUCTION**RUNGS / every))  # before it, nothing is stopped
    if space.scheduler == "median":
        # It would pause trials while it has seen too few, and what is paused must hand Tune a checkpoint: within its time slice it does not.
        return schedulers.MedianStoppingRule(time_attr="step", grace_period=least, min_time_slice=math.inf)
    # After the last step it has nothing to stop: a training is told to Tune as ended then.
    return schedulers.ASHAScheduler(time_attr="step", max_t=steps + 1, grace_period=least, reduction_factor=REDUCTION)


def check_scheduler(space: Space) -> tuple[int, int]:
    """(steps of every trial, steps between its validations), (0, 0) without a scheduler. Raises UsageError where one could not compare trials."""
    return (0, 0) if space.scheduler == "none" else (_number(space, "max_steps"), _number(space, "eval_every"))


def _number(space: Space, name: str) -> int:
    given = values.value(name, space.fixed[name]) if name in space.fixed else None
    if not isinstance(given, int):
        flag = name.replace("_", "-")
        raise UsageError(
            f"scheduler {space.scheduler} compares trials at the same step, and {name} is not given; write it under fixed, or type --{flag} 300"
        )
    return given
