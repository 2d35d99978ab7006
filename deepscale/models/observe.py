"""What the blocks of a stack do in a pass, counted while it runs: the signal, its gradient, and the activation's saturation.

Sums are float64, since a vanishing gradient's squares leave float32's range long before the gradient does.
"""

import torch
from torch import Tensor

SATURATED = 0.01  # |f'| below which an output counts as saturated


class BlockObserver:
    """What n blocks with `units` activation outputs each do in the passes of one optimiser step.

    `reset` begins a step, and says whether saturation is counted, the dearest part. While passes run, numbers are only kept, one small
    tensor each: adding them up block by block would cost more than taking them. `collect` makes sums of them, which add up with those of
    observers of the same blocks on other ranks.
    """

    without_gradients = False  # whether passes without gradients, which are evaluation's, show their outputs too

    def __init__(self, blocks: int, units: int, device: torch.device) -> None:
        self.blocks, self.units, self.device = blocks, units, device
        self.reset()

    def reset(self, activations: bool = True) -> None:
        """Forgets all passes."""
        self.activations, self.collected = activations, False
        # (block, number) of every pass, in order
        self._outputs: list[tuple[int, Tensor, Tensor]] = []  # mean, root mean square deviation
        self._gradients: list[tuple[int, Tensor]] = []
        self._derivatives: list[tuple[int, Tensor, int]] = []  # saturated outputs per unit, rows
        self._measured: list[tuple[Tensor, dict[int, int]]] = []  # by a kernel, in a pass: all of these (n, 3 + units), and each block's rows

    def output(self, i: int, x: Tensor) -> None:
        """Block i's output x, of any shape."""
        x = x.detach()
        mean = x.mean()
        # Not from the mean of squares: where the signal dies, x is nearly constant.
        self._outputs.append((i, mean, torch.linalg.vector_norm(x - mean, dtype=torch.float64).div_(x.numel() ** 0.5)))

    def gradient(self, i: int, g: Tensor) -> None:
        """The gradient with respect to block i's output."""
        self._gradients.append((i, torch.linalg.vector_norm(g.detach(), dtype=torch.float64)))

    def derivative(self, i: int, derivative: Tensor) -> None:
        """f' of block i's activation, rows (M, units); overwritten."""
        self._derivatives.append((i, derivative.detach().abs_().lt_(SATURATED).sum(0, dtype=torch.float32), len(derivative)))

    def room(self, i: int) -> Tensor:
        """Where a kernel writes block i's numbers, float64 (3 + units). All blocks of a pass have theirs side by side: small tensors between
        the activations that backward frees would keep malloc from using that memory for gradients."""
        if not self._measured or i in self._measured[-1][1]:
            self._measured.append((torch.empty(self.blocks, 3 + self.units, dtype=torch.float64), {}))
        return self._measured[-1][0][i]

    def measured(self, i: int, numbers: Tensor, rows: int) -> None:
        """What a kernel has measured of block i, in its room: as `gradient`, `output` of the block before, and `derivative` would."""
        self._measured[-1][1][i] = rows

    def counted(self, i: int, saturated: Tensor, rows: int) -> None:
        """Block i's saturated outputs per unit (units,), of so many rows, as `derivative` would count them."""
        if self.activations:
            self._derivatives.append((i, saturated, rows))

    @torch.no_grad()
    def collect(self) -> None:
        """Makes `sums` (6, n) and `saturated` (n, units), float64, of what was kept; a second call changes nothing."""
        if self.collected:
            return
        # passes; mean of x; its square; variance of x; squared norm of the gradient; rows seen by the activation
        self.sums = torch.zeros(6, self.blocks, dtype=torch.float64, device=self.device)
        self.saturated = torch.zeros(self.blocks, self.units, dtype=torch.float64, device=self.device)
        if self._outputs:
            at, means, deviations = zip(*self._outputs, strict=True)
            self._add_outputs(at, torch.stack(means).double(), torch.stack(deviations))
        if self._gradients:
            at, norms = zip(*self._gradients, strict=True)
            self._add(at, torch.stack(norms).square()[None], self.sums[4:5])
        if self._derivatives:
            at, counts, rows = zip(*self._derivatives, strict=True)
            self._add(at, torch.tensor(rows, dtype=torch.float64, device=self.device)[None], self.sums[5:])
            self._add(at, torch.stack(counts).double().T, self.saturated.T)
        for numbers, measured in self._measured:
            self._collect_measured(numbers, measured)
        self.reset(self.activations)
        self.collected = True

    def _collect_measured(self, numbers: Tensor, rows: dict[int, int]) -> None:
        at, together = tuple(rows), numbers[list(rows)]  # (measured blocks, 3 + units)
        self._add(at, together[:, 0].square()[None], self.sums[4:5])
        later = torch.tensor([i > 0 for i in at])  # the first block has none before it
        self._add_outputs(tuple(i - 1 for i in at if i), together[later, 1], together[later, 2])
        if self.activations:
            self._add(at, torch.tensor([list(rows.values())], dtype=torch.float64), self.sums[5:])
            self._add(at, together[:, 3:].T, self.saturated.T)

    def _add_outputs(self, at: tuple[int, ...], mean: Tensor, deviation: Tensor) -> None:
        self._add(at, torch.stack([torch.ones_like(mean), mean, mean.square(), deviation.square()]), self.sums[:4])

    def _add(self, at: tuple[int, ...], values: Tensor, into: Tensor) -> None:
        into.index_add_(1, torch.tensor(at, dtype=torch.int64, device=self.device), values.to(self.device))

    def statistics(self) -> dict[str, Tensor]:
        """(n,) each: mean and standard deviation of x, norm of its gradient, shares of saturated outputs and of dead units."""
        self.collect()
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
