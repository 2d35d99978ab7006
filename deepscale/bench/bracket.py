"""The deepest network that trains within a limit, found by few trials: each costs minutes at depth.

Peak memory grows in proportion to depth but for a constant, so two shallow trials foretell the deepest depth to a few percent;
from there on the trials close a bracket around it. Nothing rests on the forecast but the number of trials.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepscale.bench.limit import TRAINED
from deepscale.depth import LAYERS_PER_BLOCK, MAX_DEPTH, MIN_DEPTH

SHALLOW = (1 / 8, 1 / 4)  # of the planned depth: the trials that the forecast starts from
MARGIN = 0.4  # of the tolerance that a trial keeps from the forecast, on either side
APART = 0.6  # of the deepest trial's layers has at most the other that the forecast rests on
FURTHEST = 8.0  # times the deepest trial; a forecast beyond is not trusted


@dataclass(frozen=True)
class Trial:
    """A network of `layers` layers that was trained for some steps within a limit: its outcome, bytes at the peak and planned, and seconds."""

    policy: str
    layers: int
    outcome: str
    peak: int
    planned: int
    seconds: float
    measured: dict[str, Any] = field(default_factory=dict)


def search(run: Callable[[int], Trial], planned: int, limit: int, tolerance: float) -> list[Trial]:
    """The trials until the deepest that trained and the shallowest that did not are within `tolerance` (a share) of each other.

    They begin with the smallest network; where it does not train, none does. `planned` layers are expected to be the deepest.
    """
    trials: list[Trial] = []
    while (depth := next_depth(trials, planned, limit, tolerance)) is not None:
        trials.append(run(depth))
    return trials


def ends(trials: Sequence[Trial]) -> tuple[Trial | None, Trial | None]:
    """The deepest that trained, and the shallowest that did not."""
    trained = [trial for trial in trials if trial.outcome == TRAINED]
    failed = [trial for trial in trials if trial.outcome != TRAINED]
    return max(trained, key=lambda t: t.layers, default=None), min(failed, key=lambda t: t.layers, default=None)


def next_depth(trials: Sequence[Trial], planned: int, limit: int, tolerance: float) -> int | None:
    """The layers to try next, strictly within the bracket so far; None where it is narrow enough."""
    if not trials:
        return MIN_DEPTH
    deepest, shallowest = ends(trials)
    if deepest is None:
        return None
    low, high = deepest.layers, shallowest.layers if shallowest else None
    closing = max(_built(low * (1 + tolerance)), low + LAYERS_PER_BLOCK)  # if it does not train, the bracket is narrow enough
    if closing > MAX_DEPTH or (high is not None and high <= closing):
        return None
    forecast = _forecast(trials, planned, limit)
    target = forecast * (1 - MARGIN * tolerance)
    if target <= closing:
        target = min(forecast * (1 + MARGIN * tolerance), closing)
    target = min(target, MAX_DEPTH)
    if high is None:
        return max(_built(target), low + LAYERS_PER_BLOCK)
    if target > high / (1 + tolerance):  # if what is tried instead trains, the bracket is narrow enough
        failures = sum(trial.outcome != TRAINED for trial in trials)
        target = high / (1 + tolerance) + LAYERS_PER_BLOCK - 1 if failures == 1 else math.sqrt(low * high)
    return min(max(_built(target), low + LAYERS_PER_BLOCK), high - LAYERS_PER_BLOCK)


def _built(layers: float) -> int:
    """The deepest network of at most so many layers."""
    return int(layers - 2) // LAYERS_PER_BLOCK * LAYERS_PER_BLOCK + 2


def _forecast(trials: Sequence[Trial], planned: int, limit: int) -> float:
    """The deepest that trains as far as is known; before there are enough trials, where to begin.

    On the line through the deepest trial that did and one well below it: over a short distance the peaks' own noise decides.
    """
    trained = sorted((trial for trial in trials if trial.outcome == TRAINED), key=lambda trial: trial.layers)
    if len(trained) <= len(SHALLOW):
        return planned * SHALLOW[len(trained) - 1]
    last = trained[-1]
    before = next((trial for trial in reversed(trained) if trial.layers <= APART * last.layers), trained[0])
    per_layer = (last.peak - before.peak) / (last.layers - before.layers)
    further = (limit - last.peak) / per_layer if per_layer > 0 else math.inf
    return min(last.layers + further, last.layers * FURTHEST)
