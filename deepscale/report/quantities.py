"""What of a record the page draws: three quantities against depth, and the first layer's gradient over training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepscale.gradflow.flow import Flow
from deepscale.gradflow.values import closed_by_gamma
from deepscale.report.thin import Bools, Floats, chosen, edges, thin

# Key -> (field of Flow, what it is, on the axis).
QUANTITIES = {
    "output": ("output_grad_l2", "gradient norm at the block outputs"),
    "weight": ("mean_abs", "mean |gradient| of the weights"),
    "signal": ("output_std", "standard deviation of the block outputs"),
}


@dataclass
class Quantity:
    """A quantity of one run at the records that hold it.

    values (R, L); broken (R, L) where the gradient was not finite; closed (R, L) where it is exactly 0 because of gamma 0.
    """

    key: str
    names: NDArray[np.str_]
    depths: NDArray[np.int64]
    steps: NDArray[np.int64]
    values: Floats
    broken: Bools
    closed: Bools

    def curves(self, points: int, rows: NDArray[np.int64]) -> dict[str, Any]:
        """For JSON: the steps of these records, depths of the first and the last layer of each point, and the thinned values."""
        bins = edges(len(self.depths), points)
        packed = thin(self.values[rows], bins, self.broken[rows], self.closed[rows]).packed()
        # `count`: layers or blocks per point; a gap between `first` and `last` holds what is no part of this quantity.
        place = {"first": self.depths[bins[:-1]].tolist(), "last": self.depths[bins[1:] - 1].tolist(), "count": np.diff(bins).tolist()}
        return {"steps": self.steps[rows].tolist(), "place": place, **packed}

    def ends(self, points: int) -> dict[str, Any]:
        """The first and the last record."""
        return self.curves(points, np.array([0, len(self.steps) - 1]))

    def overview(self, points: int, records: int) -> dict[str, Any]:
        """All records, or so many evenly chosen ones."""
        return self.curves(points, chosen(len(self.steps), records))


def quantities(flow: Flow) -> Iterator[Quantity]:
    """The quantities that the record holds; each at the records at which anything of it was recorded."""
    bad_at_depth = np.zeros((len(flow.steps), flow.depth + 1), bool)
    layers, rows = np.broadcast_to(flow.layer_depths, flow.nonfinite.shape), np.arange(len(flow.steps))[:, None]
    broken = flow.nonfinite > 0
    bad_at_depth[np.broadcast_to(rows, layers.shape)[broken], layers[broken]] = True
    for key, (field, _) in QUANTITIES.items():
        values = getattr(flow, field)
        if key == "weight":
            taken = flow.weights
            closed = np.stack([closed_by_gamma(flow, record) for record in range(len(flow.steps))])
            found = (flow.layer_names[taken], flow.layer_depths[taken], values[:, taken], broken[:, taken], closed[:, taken])
        else:
            # A NaN in the middle of a backward pass that turned non-finite is one, not something that was not recorded.
            bad = np.isnan(values) & bad_at_depth[:, flow.block_depths] if key == "output" else np.zeros(values.shape, bool)
            found = (flow.block_names, flow.block_depths, values, bad, np.zeros(values.shape, bool))
        names, depths, values, bad, closed = found
        held = np.flatnonzero((~np.isnan(values) | bad).any(axis=1))
        if len(held):
            yield Quantity(key, names, depths, flow.steps[held], values[held], bad[held], closed[held])


def first_layer(flow: Flow) -> list[tuple[float, float]]:
    """(step, mean |g| of the stem's weight), infinite where it was not finite."""
    first = int(np.flatnonzero(flow.weights)[0])
    values = np.where(flow.nonfinite[:, first] > 0, np.inf, flow.mean_abs[:, first])
    return [(float(step), float(value)) for step, value in zip(flow.steps, values, strict=True) if not np.isnan(value)]
