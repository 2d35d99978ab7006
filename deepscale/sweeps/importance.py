"""Which axis of a sweep the result hangs on, as the share of the results' variance that each axis explains.

Grids: analysis of variance. The share of an axis is its sum of squares over that of all trials (eta squared), given all other axes and
the interactions that it is no part of (type II: points of the grid may be missing); interactions of two axes are terms of their own, and what is
left is seeds and higher interactions. Nothing is fitted but the means of the grid's own values, so it is exact for the few trials of a
small grid, in which a learned model (a forest) would have next to nothing to learn from. Of a full grid the shares and the rest add up to 1;
where points are missing, what two axes could both explain is in neither share.

Random points and Optuna's, where values hardly repeat: functional ANOVA of a random forest (Hutter, Hoos and Leyton-Brown, 2014), as
optuna.importance computes it.

Either measure gives noise a share, which stands beside each as `chance`. An axis of k values that changes nothing gets k - 1 times what the
rest has per degree of freedom (a share of ten times that is one of F = 10); a forest gives it what it finds when its values are shuffled.
"""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepscale.sweeps.results import Row, Sweep
from deepscale.sweeps.tags import FINISHED, STOPPED_EARLY

Floats = NDArray[np.float64]
FEWEST = 10  # trials for a forest
SHUFFLES, TREES = 3, 32
LOG_FROM = 3.0  # numbers that span less are taken as they are


@dataclass(frozen=True)
class Share:
    """Of the variance: of one axis, or of the interaction of two ("activation x norm"). chance: what noise alone would get."""

    name: str
    share: float
    chance: float


@dataclass(frozen=True)
class Importance:
    """The largest share first. rest: what no term explains, None where the measure does not say. at: the step of all values, None for the last."""

    measure: str
    shares: tuple[Share, ...]
    rest: float | None
    trials: int
    at: int | None


def importance(sweep: Sweep) -> Importance | str:
    """The shares, or a sentence why there are none."""
    rows, values, at = comparable(sweep)
    levels = {name: [sweep.of(row)[name] for row in rows] for name in sweep.axes}
    levels = {name: found for name, found in levels.items() if len(set(found)) > 1}
    if len(values) < 3 or not levels:
        return "there are too few results for the importance of the axes"
    if np.ptp(values) == 0:
        return "all results are equal: no axis explains anything"
    if 2 * (1 + sum(len(set(found)) - 1 for found in levels.values())) <= len(values):
        shares, rest = anova(levels, values)
        return Importance("analysis of variance", _sorted(shares), rest, len(values), at)
    if len(values) < FEWEST:
        return f"the importance of axes without repeated values takes {FEWEST} results or more, and there are {len(values)}"
    try:
        return Importance("functional ANOVA of a random forest", _sorted(forest(levels, values)), None, len(values), at)
    except ImportError as error:
        return f"the importance of axes without repeated values needs the package {error.name}: type pip install 'deepscale[sweep]' scikit-learn"


def comparable(sweep: Sweep) -> tuple[list[Row], Floats, int | None]:
    """The trials with a result, and its values: the last ones, or where a scheduler stopped some, those of the last step that all have reached."""
    rows = [row for row in sweep.rows if row.outcome in (FINISHED, STOPPED_EARLY) and row.curve]
    at = None
    if any(row.outcome == STOPPED_EARLY for row in rows):
        common = set.intersection(*({step for step, _ in row.curve} for row in rows))
        at = max(common, default=None)
        if at is None:  # nothing in common: the finished ones alone can be compared
            rows = [row for row in rows if row.outcome == FINISHED]
    values = [row.curve[-1][1] if at is None else dict(row.curve)[at] for row in rows]
    finite = [(row, value) for row, value in zip(rows, values, strict=True) if math.isfinite(value)]
    return [row for row, _ in finite], np.array([value for _, value in finite]), at


def anova(levels: Mapping[str, Sequence[str]], values: Floats) -> tuple[list[Share], float]:
    """(shares of axes and of pairs of them, the rest); levels: each axis' value in each trial. Pairs only where something is left as rest."""
    columns: dict[tuple[str, ...], Floats] = {(name,): _indicators(found) for name, found in levels.items()}
    pairs: dict[tuple[str, ...], Floats] = {(a, b): _products(columns[a,], columns[b,]) for a, b in itertools.combinations(levels, 2)}
    if _fit(list((columns | pairs).values()), values)[1] < len(values):
        columns |= pairs
    total = float(((values - values.mean()) ** 2).sum())
    rest, free = _fit(list(columns.values()), values)
    noise = rest / total / (len(values) - free)  # of a degree of freedom
    shares = []
    for term, own in columns.items():
        others = [column for other, column in columns.items() if not set(term) <= set(other)]
        (without, rank), (left, full) = _fit(others, values), _fit([*others, own], values)
        if full > rank:  # else the grid has no points that tell it from the others
            shares.append(Share(" × ".join(term), max(0.0, without - left) / total, (full - rank) * noise))
    return shares, rest / total


def _indicators(found: Sequence[str]) -> Floats:
    """(trials, values - 1): 1 where a trial has the value."""
    known = list(dict.fromkeys(found))
    return np.array([[float(value == level) for level in known[1:]] for value in found])


def _products(a: Floats, b: Floats) -> Floats:
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def _fit(columns: Sequence[Floats], values: Floats) -> tuple[float, int]:
    """(sum of squares that a mean and these columns leave, how many of them are independent)."""
    design = np.concatenate([np.ones((len(values), 1)), *columns], axis=1)
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(((values - design @ fitted) ** 2).sum()), int(rank)


def forest(levels: Mapping[str, Sequence[str]], values: Floats) -> list[Share]:
    """Shares by optuna's functional ANOVA, and by chance: the mean share of an axis whose values are shuffled among the trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions, columns = _distributions(levels)

    def shares(columns: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        study = optuna.create_study()
        for *point, value in zip(*columns.values(), values, strict=True):
            params = dict(zip(columns, point, strict=True))
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=float(value)))
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False))

    order = np.random.default_rng(0)

    def by_chance(name: str) -> float:
        own = columns[name]
        return float(np.mean([shares({**columns, name: [own[i] for i in order.permutation(len(own))]})[name] for _ in range(SHUFFLES)]))

    return [Share(name, float(share), by_chance(name)) for name, share in shares(columns).items()]


def _distributions(levels: Mapping[str, Sequence[str]]) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """Optuna's word for each axis, numbers as such, and its value in each trial."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distributions: dict[str, Any] = {}
    columns: dict[str, Sequence[Any]] = {}
    for name, found in levels.items():
        numbers = numbers_of(found)
        if numbers is None:
            distributions[name], columns[name] = CategoricalDistribution(list(dict.fromkeys(found))), found
        else:
            distributions[name], columns[name] = FloatDistribution(min(numbers), max(numbers), log=is_logarithmic(numbers)), numbers
    return distributions, columns


def numbers_of(found: Sequence[str]) -> list[float] | None:
    """The values as numbers, None where one is a word."""
    try:
        return [float(value) for value in found]
    except ValueError:
        return None


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Whether numbers lie evenly in their logarithm rather than in themselves: by which middle of their range their median is nearer to."""
    low, high = min(numbers), max(numbers)
    return low > 0 and high >= LOG_FROM * low and float(np.median(numbers)) < (math.sqrt(low * high) + (low + high) / 2) / 2


def _sorted(shares: Sequence[Share]) -> tuple[Share, ...]:
    return tuple(sorted(shares, key=lambda share: -share.share))
