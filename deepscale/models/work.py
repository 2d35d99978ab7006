"""What a pass through a stack begins with, whatever its skip connection: BatchNorm's statistics, and who computes its blocks."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepscale.models import native
from deepscale.models.block import BlockSpec, TorchWork, Weights, norms_of
from deepscale.models.components import batch_rows
from deepscale.models.observe import BlockObserver

if TYPE_CHECKING:
    from deepscale.models.stack import BlockStack


def moments_of(stack: "BlockStack", dtype: torch.dtype) -> Tensor | None:
    """BatchNorm's mean and variance (2, n, C) of a pass: to be written in training, else the running ones. None for other norms."""
    if stack.spec.norm != "batchnorm":
        return None
    statistics = stack.statistics
    moments = torch.empty_like(statistics.pending) if stack.training else torch.stack([statistics.running_mean, statistics.running_var])
    return moments.to(dtype)


def note_moments(stack: "BlockStack", moments: Tensor | None, rows: int) -> None:
    """After a forward pass in training over so many rows, once, however often it is computed again: BatchNorm's statistics of it."""
    if moments is not None and stack.training:
        stack.statistics.add(moments[0], moments[1], batch_rows(rows, stack.spec.sync_batchnorm))


@dataclass(frozen=True)
class Run:
    """How a pass runs through a stack: all that its blocks depend on beside their weights and input, so that they can run again.

    moments: of BatchNorm, `fixed` where they are the running ones. masks: stochastic depth's, (n, M, 1). passing: see `Weights`.
    """

    spec: BlockSpec
    kernel: str
    branch: torch.dtype
    moments: Tensor | None
    fixed: bool
    masks: Tensor | None
    passing: tuple[float, ...] | None

    def part(self, blocks: slice) -> "Run":
        """Of some consecutive blocks."""
        moments, masks = None if self.moments is None else self.moments[:, blocks], None if self.masks is None else self.masks[blocks]
        return dataclasses.replace(self, moments=moments, masks=masks, passing=None if self.passing is None else self.passing[blocks])

    def begin(self, named: Mapping[str, Tensor], stream: torch.dtype, x: Tensor, observer: BlockObserver | None) -> tuple[Weights, Any]:
        """(the parameters as the blocks use them, who computes these on branches shaped as x): torch's operators, or the native kernel for what
        that knows."""
        weights = Weights(self.spec, named, stream, self.branch, self.passing)
        if self.kernel == "native" and native.computes(self.spec, x.device, weights.stream, weights.branch):
            return weights, native.NativeWork(self.spec, weights, x, self.masks, observer)
        return weights, TorchWork(self.spec, weights, norms_of(self.spec, weights.blocks, self.moments, self.fixed), self.masks, observer)


def backward_of(ctx: Any, stream: torch.dtype, x: Tensor, observer: BlockObserver | None) -> tuple[dict[str, Tensor], Weights, Any]:
    """What a pass's backward begins with, once, on branches shaped as x: (its parameters by name, as its blocks use them, who computes them).

    ctx: of autograd, with what the pass has left there. Raises RuntimeError for a second backward.
    """
    if ctx.spent:
        raise RuntimeError("second backward through one forward pass: a BlockStack frees its activations as it goes; run the forward pass again")
    ctx.spent = True
    named = dict(zip(ctx.run.spec.shapes(), ctx.saved_tensors, strict=False))
    return named, *ctx.run.begin(named, stream, x, observer)
