"""What a record of gradient flow says: a verdict in words, a few numbers for charts, and capped curves against depth.

The verdict rests on the gradient with respect to the block outputs and on the stem. Weights inside a block say little
about depth: with LayerScale (arXiv:2103.17239) gamma 0 their gradient is exactly 0 by construction, with 1e-6 a
millionth; and without a skip their gradient is signal times gradient, which stays level where the one falls as the other
grows. Only a model without observed blocks is judged by its weights.

Slopes are positive where the gradient grows with depth, that is where it falls on its way back to the image.
"""

from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from deepscale.errors import UsageError
from deepscale.gradflow.flow import Flow, Integers
from deepscale.gradflow.values import Bools, Doubles, closed_by_gamma, depth_curve, only_zeros, owners, slope

__all__ = ["LABELS", "Thresholds", "Verdict", "depth_curve", "scalars", "verdict"]

NEVER = 2**31
HEALTHY, VANISHING, EXPLODING, DEAD, NONFINITE = LABELS = ("healthy", "vanishing", "exploding", "dead layers", "non-finite")


@dataclass(frozen=True)
class Thresholds:
    """From where on a gradient is called ill.

    The defaults are measured on ConvNeXts of 26 to 10,001 layers at initialisation, width 8 and 16. With a skip and gamma 0,
    1e-6, 1 or none the first block's gradient is 4e-4 to 1.7 times the last block's, for every activation and norm (the least
    is sigmoid at 10,001 layers; norm none is 4e-3 at every depth, which the four downsamplings make); while they train it
    stays between 0.1 and 10 times. Without a skip and with LayerNorm it is 9 times at 26 layers, which trains; at width 8 it
    is 1e-6 at 110 and exactly 0 at 1,004, at width 16 with patch 4 5e-10. Where more signal survives, the gradient explodes
    instead: at 1,004 layers 1e15 times in between at width 16 with patch 1, 400 to 5,000 times at the first block from width 32
    on. BatchNorm without a skip explodes (arXiv:1902.08129) where a gamma of 50 keeps the signal alive: 26 times at 26 layers,
    9,000 times at 110. A learning rate of 0.3 kills 110 layers within 20 steps: 2e-4 at the blocks, and at the stem mean |g|
    1e-9, a millionth of the head's.
    """

    vanishing_ratio: float = 1e-4  # first block's gradient over the last block's; below it: vanishing
    exploding_ratio: float = 1e3  # largest block's gradient over the last block's; above it: exploding
    exploding_l2: float = 1e4  # of any weight's gradient; healthy networks stay below 20
    negligible: float = 1e-8  # mean |g|: AdamW's default eps, below which a weight hardly moves
    dead_share: float = 1.0  # of a block's activation units
    # Weights and blocks from which on the network is called by its dead layers; NEVER where stochastic depth drops whole blocks: what is
    # dropped in a step has no gradient there.
    dead_layers: int = 1

    @classmethod
    def of(cls, flow: Flow) -> "Thresholds":
        """Those that the run was judged by, as its settings in the record say; else the defaults."""
        with suppress(KeyError, TypeError, ValueError):
            settings = flow.meta["settings"]
            limits = cls(vanishing_ratio=float(settings["vanishing_ratio"]), exploding_ratio=float(settings["exploding_ratio"]))
            dropping = settings.get("drop_path_mode") == "batch" and float(settings.get("drop_path", 0)) > 0
            return replace(limits, dead_layers=NEVER) if dropping else limits
        return cls()


@dataclass(frozen=True)
class Verdict:
    """One of LABELS, a sentence that begins with it and holds the numbers it rests on, and these numbers by name."""

    label: str
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Findings:
    """What one record shows. Masks are (L,) over layers; depth's effect is read from P points: block outputs, or else weights."""

    flow: Flow
    limits: Thresholds
    depths: Integers  # (P,)
    values: Doubles  # (P,)
    on_blocks: bool
    ratio: float  # first point over last; NaN where not defined
    largest: float  # over the last point
    slope: float
    stages: int  # groups of points, between which steps are not depth's effect
    closed: Bools
    dead: Bools
    dead_blocks: int
    nonfinite: Bools
    l2: Doubles  # (L,)
    path: NDArray[np.int64]  # the layers that are weights on the path
    stem_zero: bool  # its gradient is exactly 0
    stem: float  # mean |g|
    head: float

    def layer(self, index: int) -> str:
        """A layer's name and place."""
        return f"{str(self.flow.layer_names[index]).removesuffix('.weight')} (layer {self.flow.layer_depths[index]:,})"


def verdict(flow: Flow, record: int = -1, thresholds: Thresholds | None = None) -> Verdict:
    """How the gradient of one record flows, by `thresholds`, else by those of the run.

    Where several labels hold, it is the gravest: non-finite, vanishing, exploding, dead layers.

    Raises UsageError for a run without records.
    """
    found = _examine(flow, record, thresholds or Thresholds.of(flow))
    if _closed_by_head(flow, record):
        return Verdict(HEALTHY, "healthy: the head is still 0, as Fixup has it at first, and nothing comes back from it", _numbers(found))
    judged = {NONFINITE: _nonfinite(found), VANISHING: _vanishing(found), EXPLODING: _exploding(found), DEAD: _dead(found)}
    label, why = next(((label, why) for label, why in judged.items() if why), (HEALTHY, _over_depth(found) or "all gradients are finite"))
    closed = int(found.closed.sum())
    return Verdict(label, f"{label}: {why}" + (f"; {closed:,} weights closed by gamma" if closed else ""), _numbers(found))


def scalars(flow: Flow, record: int = -1) -> dict[str, float]:
    """One record in a handful of finite numbers for MLflow; one that is not defined is left out, never replaced.

    `grad/first_layer_mean_abs` is the stem's, `grad/last_layer_mean_abs` the head's; least and largest are over the weights
    that gamma does not close. Ratio, slope and zeros are those of `verdict`. Raises UsageError for a run without records.
    """
    found = _examine(flow, record, Thresholds())
    mean_abs = np.asarray(flow.mean_abs[record], np.float64)
    values = {"first_layer_mean_abs": found.stem, "last_layer_mean_abs": found.head}
    finite = mean_abs[flow.weights & ~found.closed & np.isfinite(mean_abs)]
    if len(finite):
        values |= {"min_mean_abs": float(finite.min()), "max_mean_abs": float(finite.max())}
    return {f"grad/{name}": value for name, value in (values | _numbers(found)).items() if np.isfinite(value)}


def _examine(flow: Flow, record: int, limits: Thresholds) -> _Findings:
    if not len(flow.steps):
        raise UsageError("the run has no record of gradient flow to judge; train it with --record-every auto")
    closed, zero, path = closed_by_gamma(flow, record), only_zeros(flow, record), np.flatnonzero(flow.weights)
    outputs = np.asarray(flow.output_grad_l2[record], np.float64)
    on_blocks = bool((~np.isnan(outputs)).any())
    depths, values, groups = (flow.block_depths, outputs, flow.block_groups) if on_blocks else _weights_as_points(flow, record)
    known = values[~np.isnan(values)]
    defined = len(known) > 0 and 0 < known[-1] < np.inf
    with np.errstate(invalid="ignore"):
        dead_blocks = int((flow.dead[record] >= limits.dead_share).sum())
        # A norm may overflow where every value is finite; the mean of a gradient with a NaN is not a number either.
        nonfinite = (flow.nonfinite[record] > 0) | np.isinf(flow.mean_abs[record])
    return _Findings(
        flow, limits, depths, values, on_blocks,
        ratio=float(known[0] / known[-1]) if defined else np.nan,
        largest=float(known.max() / known[-1]) if defined else np.nan,
        slope=slope(values, depths, groups),
        stages=len(np.unique(groups)),
        closed=closed,
        dead=zero & flow.weights & ~closed & ~_behind_zero(flow, outputs),
        dead_blocks=dead_blocks,
        nonfinite=nonfinite,
        l2=np.where(flow.weights, np.asarray(flow.l2[record], np.float64), np.nan),
        path=path,
        stem_zero=bool(zero[path[0]]),
        stem=float(flow.mean_abs[record, path[0]]),
        head=float(flow.mean_abs[record, path[-1]]),
    )  # fmt: skip


def _closed_by_head(flow: Flow, record: int) -> bool:
    """Whether the head's weight is exactly 0 and gets a gradient, and no other weight does."""
    head = np.flatnonzero(flow.layer_kinds == "head")
    others = np.delete(np.asarray(flow.mean_abs[record]), head)
    return bool(len(head)) and not flow.weight_l2[record][head].any() and bool(flow.mean_abs[record][head].all()) and not others.any()


def _weights_as_points(flow: Flow, record: int) -> tuple[Integers, Doubles, Integers]:
    """(depths, mean |g|, groups) of the weights that stand for the blocks: all but those in blocks with a gamma, which are as small as it."""
    own = owners(flow)
    scaled = {owner for owner, kind in zip(own, flow.layer_kinds, strict=True) if kind == "gamma"}
    points = flow.weights & np.array([owner not in scaled for owner in own], bool)
    return flow.layer_depths[points], np.asarray(flow.mean_abs[record], np.float64)[points], np.zeros(int(points.sum()), np.int64)


def _behind_zero(flow: Flow, outputs: Doubles) -> Bools:
    """(L,) layers whose own or next block output has gradient exactly 0: nothing reaches them."""
    if not len(outputs):
        return np.zeros(len(flow.layer_names), bool)
    # A downsampling has the depth of the block before it, and the gradient of the one after.
    after = np.searchsorted(flow.block_depths, flow.layer_depths, side="right")
    following = np.where(flow.layer_kinds == "downsample", after, np.searchsorted(flow.block_depths, flow.layer_depths))
    return np.asarray((outputs[np.minimum(following, len(outputs) - 1)] == 0) & (following < len(outputs)))


def _numbers(found: _Findings) -> dict[str, float]:
    numbers = {
        "first_last_ratio": found.ratio,
        "largest_last_ratio": found.largest,
        "slope_decades_per_1000_layers": found.slope,
        "nonfinite_layers": found.nonfinite.sum(),
        "zero_blocks": (found.values == 0).sum() if found.on_blocks else np.nan,
        "dead_layers": found.dead.sum() + found.dead_blocks,
        "closed_by_gamma": found.closed.sum(),
    }
    return {name: float(value) for name, value in numbers.items() if np.isfinite(value)}


def _nonfinite(found: _Findings) -> str:
    where = np.flatnonzero(found.nonfinite)
    if not len(where):
        return ""
    # Backward goes from the head to the image: what is nearest to the head was hit first.
    origin = found.layer(where[-1])
    return f"the gradients of {len(where):,} of {len(found.nonfinite):,} layers hold NaN or infinity, on the way back to the image first {origin}"


def _vanishing(found: _Findings) -> str:
    recorded = ~np.isnan(found.values)
    known = found.values[recorded]
    if found.on_blocks and known[0] == 0:
        run = int(np.argmax(known != 0)) if known.any() else len(known)  # block outputs from the first on
        place = f"{run:,} of {len(known):,} block outputs, from layer {found.depths[recorded][run - 1]:,} back to the first"
        if found.largest > found.limits.exploding_ratio:
            return f"the gradient is exactly 0 at {place}, but {_bulge(found)}"
        return f"the gradient is exactly 0 at {place}{_slope(found) if found.slope > 0 else ''}{_layers(found)}"
    if found.ratio < found.limits.vanishing_ratio:
        return _over_depth(found) + (f", but {_bulge(found)}" if found.largest > found.limits.exploding_ratio else "")
    if found.stem_zero:
        return f"the gradient of {found.layer(found.path[0])} is exactly 0"
    # A network that has learnt all it can has small gradients too, but everywhere.
    if found.stem < found.limits.negligible and found.stem < found.limits.vanishing_ratio * found.head:
        share = f"{_number(found.stem / found.head)} of the last layer's"
        return f"mean |g| of {found.layer(found.path[0])} is {_number(found.stem)}, {share}{_layers(found)}"
    if not found.on_blocks and len(known) and (middle := float(np.median(known))) < found.limits.negligible:
        return f"the median layer's mean |g| is {_number(middle)}, below {found.limits.negligible:.0e}{_layers(found)}"
    return ""


def _exploding(found: _Findings) -> str:
    if found.ratio > found.limits.exploding_ratio:
        return _over_depth(found)
    if found.largest > found.limits.exploding_ratio:
        return _bulge(found)
    l2 = np.nan_to_num(found.l2, nan=0.0, posinf=np.inf)
    if l2.max() > found.limits.exploding_l2:
        return f"the gradient of {found.layer(int(l2.argmax()))} has L2 norm {_number(l2.max())}, over {found.limits.exploding_l2:,.0f}"
    return ""


def _dead(found: _Findings) -> str:
    layers = np.flatnonzero(found.dead)
    if len(layers) + found.dead_blocks < max(1, found.limits.dead_layers):
        return ""
    weights = f"{len(layers):,} of {len(found.path):,} weights get only zeros, the first is {found.layer(layers[0])}" if len(layers) else ""
    blocks = (
        f"{found.dead_blocks:,} of {len(found.flow.block_names):,} blocks have only dead or saturated activation units" if found.dead_blocks else ""
    )
    return "; ".join(part for part in (weights, blocks) if part)


def _over_depth(found: _Findings) -> str:
    """The first over the last, and the slope between; empty where they are not defined."""
    if not np.isfinite(found.ratio):
        return ""
    what, place = ("the gradient at the first block's output", "block") if found.on_blocks else ("mean |g| of the first layer", "layer")
    return f"{what} is {_times(found.ratio)} the last {place}'s{_slope(found)}{_layers(found)}"


def _bulge(found: _Findings) -> str:
    what, place = ("the gradient", "block") if found.on_blocks else ("mean |g|", "layer")
    return f"{what} at layer {found.depths[np.nanargmax(found.values)]:,} of {found.flow.depth:,} is {_times(found.largest)} the last {place}'s"


def _slope(found: _Findings) -> str:
    if not np.isfinite(found.slope):
        return ""
    deep = found.flow.depth > 1000
    change = abs(found.slope) * (1 if deep else found.flow.depth / 1000)  # of a shallower network nobody knows what 1,000 layers would do
    size = "less than 0.01" if change < 0.01 else _number(change)
    inside, end = ("within the stages", " towards the image") if found.stages > 1 else ("towards the image", "")
    return f"; {inside} it {'falls' if found.slope > 0 else 'grows'} by {size} decades{' per 1,000 layers' if deep else ''}{end}"


def _layers(found: _Findings) -> str:
    return f", over {found.flow.depth:,} layers"


def _times(ratio: float) -> str:
    return f"{_number(ratio)} times" if ratio >= 1 else f"{_number(ratio)} of"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e5 else f"{value:.2g}"
