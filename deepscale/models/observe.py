"""What the blocks of a stack do in a pass, counted while it runs: the signal, its gradient, and the activation's saturation.

Sums are float64, since a vanishing gradient's squares leave float32's range long before the gradient does.
"""

import torch
from torch import Tensor

SATURATED = 0.01  # |f'| below which an output counts as saturated


class BlockObserver:
    """Sums over the passes of one optimiser step, of n blocks with `units` activation outputs each.

    `reset` begins a step, and says whether saturation is counted, the dearest part. Sums of observers of the same blocks on other
    ranks add up.
    """

    def __init__(self, blocks: int, units: int, device: torch.device) -> None:
        self.activations = True
        # passes; mean of x; its square; variance of x; squared norm of the gradient; rows seen by the activation
        self.sums = torch.zeros(6, blocks, dtype=torch.float64, device=device)
        self.saturated = torch.zeros(blocks, units, dtype=torch.float64, device=device)  # outputs per unit
        # One view per block and sum: indexing in every pass would cost more than the sums.
        self._passes, self._mean, self._square, self._variance, self._gradient, self._rows = (row.unbind() for row in self.sums)
        self._saturated = self.saturated.unbind()

    def reset(self, activations: bool = True) -> None:
        """Forgets all passes."""
        self.activations = activations
        self.sums.zero_()
        self.saturated.zero_()

    @torch.no_grad()
    def output(self, i: int, x: Tensor) -> None:
        """Block i's output x, of any shape."""
        x = x.double()
        mean = x.mean()
        self._passes[i].add_(1)
        self._mean[i].add_(mean)
        self._square[i].addcmul_(mean, mean)
        # Not from the mean of squares: where the signal dies, x is nearly constant.
        self._variance[i].add_(torch.linalg.vector_norm(x - mean).square_().div_(x.numel()))

    @torch.no_grad()
    def gradient(self, i: int, g: Tensor) -> None:
        """The gradient with respect to block i's output."""
        self._gradient[i].add_(torch.linalg.vector_norm(g, dtype=torch.float64).square_())

    @torch.no_grad()
    def derivative(self, i: int, derivative: Tensor) -> None:
        """f' of block i's activation, rows (M, units); overwritten."""
        self._saturated[i].add_(derivative.abs_().lt_(SATURATED).sum(0, dtype=torch.float32))
        self._rows[i].add_(derivative.shape[0])

    def statistics(self) -> dict[str, Tensor]:
        """(n,) each: mean and standard deviation of x, norm of its gradient, shares of saturated outputs and of dead units."""
        passes, mean, square, variance, gradient, rows = self.sums
        mean = mean / passes
        nothing = torch.full_like(mean, torch.nan)
        found = {
            "output_mean": mean,
            "output_std": (variance / passes + (square / passes - mean * mean).clamp_(min=0)).sqrt_(),
            "output_grad_l2": torch.where(passes > 0, gradient.sqrt(), nothing),
            "saturated": nothing,
            "dead": nothing,
        }
        if self.activations:
            found["saturated"] = self.saturated.mean(1) / rows
            found["dead"] = torch.where(rows > 0, (self.saturated == rows[:, None]).double().mean(1), nothing)
        return found
