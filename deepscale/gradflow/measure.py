"""The numbers of a record: sums over this rank's shares of the parameters, then over the ranks, in one vector each.

Squares are summed in float64: those of a vanishing gradient leave float32's range long before the gradient does, and torch adds the
squares of a long row one after the other. Magnitudes are summed pairwise, for which float32 will do where it does not overflow.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from deepscale.engine import Share

f64 = torch.float64
HUGE = 1e25  # so many times smaller than float32's largest that no row's magnitudes overflow


def rows_of(values: Tensor, start: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """Elements `start` ... of a flat tensor whose rows have `size` elements -> (first row, (rows, k)), without copying.

    At most three parts: the rest of a row that another rank began, whole rows, and the beginning of a row that another rank ends.
    """
    row, inside = divmod(start, size)
    head = min(values.numel(), size - inside) if inside else 0
    whole = (values.numel() - head) // size
    if head:
        yield row, values[None, :head]
    first = row + (inside > 0)
    if whole:
        yield first, values[head : head + whole * size].view(whole, size)
    if head + whole * size < values.numel():
        yield first + whole, values[None, head + whole * size :]


class Measured:
    """Sums over L layers, float64, on the device of the shares."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.sums = torch.zeros(6, layers, dtype=f64, device=device)
        self.absolute, self.square, self.zeros, self.nonfinite, self.weight_square, self.change_square = self.sums
        self.top = torch.zeros(layers, dtype=f64, device=device)
        self.numel = torch.ones(layers, dtype=f64, device=device)

    def gradient(self, layers: Tensor, share: Share, size: int) -> None:
        """A parameter's gradient and weight; `layers` (n,) are the layers of its n rows of `size` elements."""
        self.numel.index_fill_(0, layers, float(size))
        for first, g in rows_of(share.gradient, share.start, size):
            at = layers[first : first + len(g)]
            magnitude = g.abs().to(torch.promote_types(g.dtype, torch.float32))
            top, bottom = magnitude.amax(1), magnitude.amin(1)
            # On a GPU counting is cheaper than asking whether there is anything to count.
            if g.is_cuda or not bool((bottom > 0).all()):
                self.zeros[at] += (magnitude == 0).sum(1).to(f64)
            if g.is_cuda or not bool(torch.isfinite(top).all()):
                self.nonfinite[at] += (~torch.isfinite(g)).sum(1).to(f64)
            wide = g.is_cuda or not bool((top < HUGE).all())
            self.absolute[at] += magnitude.sum(1, dtype=f64 if wide else magnitude.dtype).to(f64)
            self.top[at] = torch.maximum(self.top[at], top.to(f64))
        self._squares(self.square, layers, share.start, share.gradient, size)
        self._squares(self.weight_square, layers, share.start, share.weight, size)

    def change(self, layers: Tensor, share: Share, before: Tensor, size: int) -> None:
        """What a step has changed a parameter by, against its copy from before."""
        self._squares(self.change_square, layers, share.start, share.weight - before, size)

    def _squares(self, into: Tensor, layers: Tensor, start: int, values: Tensor, size: int) -> None:
        for first, part in rows_of(values, start, size):
            into[layers[first : first + len(part)]] += torch.linalg.vector_norm(part, dim=1, dtype=f64).square_().to(into.device)

    def add_up(self, spread: bool) -> None:
        """Adds up the sums of all ranks, if shares are spread over them: two messages, whatever the number of tensors."""
        if spread:
            dist.all_reduce(self.sums)
            dist.all_reduce(self.top, op=dist.ReduceOp.MAX)
            # gloo's maximum of a number and NaN is whichever came first.
            self.top[self.absolute.isnan()] = torch.nan

    def fields(self) -> dict[str, Tensor]:
        """(L,) each, of the gradients and weights; `flow.LAYER_FIELDS` says what."""
        return {
            "mean_abs": self.absolute / self.numel,
            "l2": self.square.sqrt(),
            "max_abs": self.top,
            "zeros": self.zeros / self.numel,
            "nonfinite": self.nonfinite / self.numel,
            "weight_l2": self.weight_square.sqrt(),
        }
