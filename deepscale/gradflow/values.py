"""Reading a record's values along depth: what gamma closes, what is zero, the slope, and bins for curves and pictures.

Gradients differ by decades, so they are averaged as logarithms; zeros, infinities and NaN have none and are kept apart.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepscale.errors import unknown_choice
from deepscale.gradflow.flow import BLOCK_FIELDS, LAYER_FIELDS, Flow

Bools = NDArray[np.bool_]
Doubles = NDArray[np.float64]
AVERAGED = ("zeros", "nonfinite", "output_mean", "saturated", "dead")  # arithmetically: shares, and what may be negative
FEWEST = 3  # points that a slope is fitted to


def owners(flow: Flow) -> list[str]:
    """(L,) the module in which each layer's module lies: the block of a block's layers and of its gamma."""
    return [name.removesuffix(".weight").rpartition(".")[0] for name in flow.layer_names.tolist()]


def closed_by_gamma(flow: Flow, record: int) -> Bools:
    """(L,) weights of blocks whose gamma, or, as Fixup has it at first, last layer, is exactly 0: their gradient is 0 because the branch is."""
    gates = np.flatnonzero(np.isin(flow.layer_kinds, ("gamma", "pwconv2")))
    shut = gates[flow.weight_l2[record][gates] == 0]
    if not len(shut):
        return np.zeros(len(flow.layer_names), bool)
    own = owners(flow)
    blocks = {own[i] for i in shut}
    inside = np.array([owner in blocks for owner in own], bool)
    return inside & flow.weights & only_zeros(flow, record)


def only_zeros(flow: Flow, record: int) -> Bools:
    """(L,) gradients in which every value is exactly 0."""
    zeros, mean = flow.zeros[record], flow.mean_abs[record]
    return np.asarray(np.where(np.isnan(zeros), mean == 0, zeros == 1))


def slope(values: NDArray[Any], depths: NDArray[Any], groups: NDArray[Any]) -> float:
    """Decades per 1,000 layers of positive finite values (P,) against depth: least squares, with a free offset per group.

    The offsets keep the steps between stages, which downsampling makes, from being taken for depth's effect. NaN where
    fewer than 3 values, or no two of one group, are left.
    """
    used = np.isfinite(values) & (values > 0)
    if used.sum() < FEWEST:
        return float("nan")
    y, x = np.log10(values[used], dtype=np.float64), depths[used].astype(np.float64)
    _, group = np.unique(groups[used], return_inverse=True)
    sizes = np.bincount(group)
    y -= (np.bincount(group, y) / sizes)[group]
    x -= (np.bincount(group, x) / sizes)[group]
    spread = float(x @ x)
    return 1000 * float(x @ y) / spread if spread else float("nan")


def depth_curve(flow: Flow, record: int, name: str, points: int = 300) -> list[tuple[int, float]]:
    """A field of one record against depth, ascending, at most `points`: [(layers on the path, value)].

    The layer fields are of the weights on the path; left out are downsamplings, which have no depth of their own, and weights
    that gamma closes. More layers than points are averaged in bins; the first and the last stay themselves. Gradients and
    norms are averaged geometrically over what is positive: a 0 stands for layers that are all exactly 0. Shares and means are
    averaged as they are. What is not finite or not recorded leaves no point. Raises UsageError for an unknown field.
    """
    if name in BLOCK_FIELDS:
        depths, values = flow.block_depths, np.asarray(getattr(flow, name)[record], np.float64)
    elif name in LAYER_FIELDS:
        own = flow.weights & (flow.layer_kinds != "downsample") & ~closed_by_gamma(flow, record)
        depths, values = flow.layer_depths[own], np.asarray(getattr(flow, name)[record], np.float64)[own]
    else:
        raise unknown_choice("the field", name, [*LAYER_FIELDS, *BLOCK_FIELDS])
    finite = np.isfinite(values)
    depths, values = depths[finite], values[finite]
    if not len(values):
        return []
    bins, middles = bins_of(depths, points)
    means = np.bincount(bins, values) / np.bincount(bins) if name in AVERAGED else geometric(values, bins, len(middles))
    return list(zip(middles.tolist(), means.tolist(), strict=True))


def geometric(values: NDArray[Any], bins: NDArray[Any], count: int) -> Doubles:
    """Geometric mean per bin: values (..., P), the bin of each (P,) -> (..., count).

    Of a bin's positive values; 0 where all are exactly 0, infinity where one is infinite; NaN where all are, which
    stands for what is not recorded.
    """
    rows = np.atleast_2d(np.asarray(values, np.float64))
    positive, infinite = (rows > 0) & np.isfinite(rows), np.isinf(rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(positive, np.log(np.where(positive, rows, 1.0)), 0.0)
    starts = np.arange(len(rows))[:, None] * count + bins

    def total(weights: NDArray[Any]) -> Doubles:
        sums = np.bincount(starts.ravel(), weights.ravel(), len(rows) * count)
        return np.asarray(sums, np.float64).reshape(len(rows), count)

    counts, zeros = total(positive), total(rows == 0)
    means = np.where(counts > 0, np.exp(total(logs) / np.maximum(counts, 1)), np.where(zeros > 0, 0.0, np.nan))
    means[total(infinite) > 0] = np.inf
    shaped: Doubles = means.reshape(*np.shape(values)[:-1], count)
    return shaped


def bins_of(depths: NDArray[Any], points: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ascending depths (P,) in at most `points` >= 2 bins of equally many: the bin of each (P,), the middle depth of each bin.

    The first and the last depth have their own bins, however many there are: they are what is asked for first.
    """
    places, index = np.unique(depths, return_inverse=True)
    if len(places) <= points:
        return np.asarray(index, np.int64), np.asarray(places, np.int64)
    inner = len(places) - 2
    group = np.concatenate([[0], 1 + np.arange(inner) * (points - 2) // inner, [points - 1]])
    middles = np.bincount(group, places) / np.bincount(group)
    return np.asarray(group[index], np.int64), np.round(middles).astype(np.int64)
