"""What a pass through a stack begins with, whatever its skip connection: BatchNorm's statistics, and who computes its blocks."""

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


def work_of(
    kernel: str,
    spec: BlockSpec,
    weights: Weights,
    x: Tensor,
    moments: Tensor | None,
    fixed: bool,
    masks: Tensor | None,
    observer: BlockObserver | None,
) -> Any:
    """The maths of a block on branches shaped as x: torch's operators, or the native kernel for what that knows."""
    if kernel == "native" and native.computes(spec, x.device, weights.stream, weights.branch):
        return native.NativeWork(spec, weights, x, masks, observer)
    return TorchWork(spec, weights, norms_of(spec, weights.blocks, moments, fixed), masks, observer)


def backward_of(ctx: Any, stream: torch.dtype, x: Tensor, observer: BlockObserver | None) -> tuple[dict[str, Tensor], Weights, Any]:
    """What a pass's backward begins with, once, on branches shaped as x: (its parameters by name, as its blocks use them, who computes them).

    ctx: of autograd, with what the pass has left there. Raises RuntimeError for a second backward.
    """
    if ctx.spent:
        raise RuntimeError("second backward through one forward pass: a BlockStack frees its activations as it goes; run the forward pass again")
    ctx.spent = True
    named = dict(zip(ctx.spec.shapes(), ctx.saved_tensors, strict=False))
    weights = Weights(ctx.spec, named, stream, ctx.branch, ctx.passing)
    return named, weights, work_of(ctx.kernel, ctx.spec, weights, x, ctx.moments, ctx.fixed, ctx.masks, observer)
