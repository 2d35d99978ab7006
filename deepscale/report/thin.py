"""Curves of up to 100,000 layers as at most 1,000 points, small enough for one page.

A point stands for some neighbouring layers. Its value is the geometric mean of their positive, finite values, for the axis is
logarithmic; exact zeros and non-finite values have no logarithm, so they are counted beside it and drawn as marks, never lost in
a mean. NaN, which means not recorded, is left out; a point of nothing else is a gap.

Values travel as base64 of little-endian 16-bit integers: 700 x log10(value), which reaches from 1e-46 to 1e46 and is exact to 0.17 %.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Counts = NDArray[np.int16]

LEVELS_PER_DECADE = 700
GAP = -32768  # a point without a positive, finite value


@dataclass
class Thinned:
    """R curves of P points. levels: (R, P) 700 x log10, or GAP. The others: (R, P) how many of the point's values are so."""

    levels: Counts
    zeros: Counts
    nonfinite: Counts
    closed: Counts

    def packed(self) -> dict[str, str]:
        """The arrays as base64, for JSON; counts only where there are any."""
        counts = {"z": self.zeros, "n": self.nonfinite, "c": self.closed}
        arrays = {"y": self.levels} | {key: count for key, count in counts.items() if count.any()}
        return {key: base64.b64encode(array.astype("<i2").tobytes()).decode() for key, array in arrays.items()}


def edges(size: int, points: int) -> NDArray[np.int64]:
    """(P + 1,) where the points' bins begin and end: at most `points` bins of nearly equal size, none empty."""
    return np.linspace(0, size, min(size, points) + 1).astype(np.int64)


def thin(values: Floats, bins: NDArray[np.int64], broken: Bools | None = None, closed: Bools | None = None) -> Thinned:
    """Curves of points from (R, L) values.

    broken (R, L) marks values that count as non-finite though they are recorded as NaN, closed (R, L) zeros that gamma explains.
    """
    none = np.zeros(values.shape, bool)
    rows = zip(values, none if broken is None else broken, none if closed is None else closed, strict=True)
    # Row by row: 100 records of 100,000 layers at once would take some 500 MB.
    return Thinned(*(np.stack(part) for part in zip(*(_thin_row(*row, bins[:-1]) for row in rows), strict=True)))


def _thin_row(values: Floats, broken: Bools, closed: Bools, starts: NDArray[np.int64]) -> tuple[Counts, Counts, Counts, Counts]:
    def total(of: NDArray[Any]) -> NDArray[np.float64]:
        return np.add.reduceat(of, starts, dtype=np.float64)

    infinite = np.isinf(values) | broken
    positive = (values > 0) & ~infinite
    counts = total(positive)
    mean = total(np.log10(values, out=np.zeros(values.shape), where=positive)) / np.maximum(counts, 1)
    levels = np.where(counts > 0, np.rint(mean * LEVELS_PER_DECADE).clip(-32767, 32767), GAP).astype(np.int16)
    zeros, nonfinite, shut = (total(of).clip(0, 32767).astype(np.int16) for of in ((values == 0) & ~infinite, infinite, closed))
    return levels, zeros, nonfinite, shut


def chosen(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` indices, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)) if count else np.zeros(0, np.int64)
