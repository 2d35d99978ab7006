"""Floating point operations of a pass, counted operator by operator as torch runs them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def counted_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions that `work` runs; a multiplication and an addition are two.

    Products inside a compiled kernel are not seen.
    """
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}) as counter:
        work()
    return counter.get_total_flops()


def _convolution_backward(output: Shape, x: Shape, weight: Shape, *others: object, out_shape: Sequence[Shape | None]) -> int:
    """As many as forward for each of the gradients of input and weight; torch's own formula counts groups as if they were dense."""
    return sum(shape is not None for shape in out_shape[:2]) * 2 * math.prod(output) * math.prod(weight[1:])
