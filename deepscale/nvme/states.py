"""What DeepSpeed's ZeRO-3 rests on a disk, brought into memory between two steps: for checkpoints, and for what a record reads of weights.

ZeRO-3 steps parameters in sub-groups. Of one that rests on a disk it has a file for the master weights and one for each moment.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_disk(parameter: Any) -> bool:
    """Whether this rank's part of a parameter that ZeRO-3 has cut up rests on a disk."""
    return bool(getattr(parameter.ds_tensor, "final_location", None) == "nvme")


def weight(parameter: Any, numel: int) -> Tensor:
    """A copy of this rank's part of such a parameter (numel,), without padding."""
    part = parameter.ds_tensor
    if part.numel() == part.ds_numel:  # it is there, for a forward or a backward pass
        return part.detach().reshape(-1)[:numel].clone()
    read = torch.empty(part.ds_numel, dtype=torch.float32)
    parameter.nvme_swapper.swap_into_buffer(parameter, read)
    return read[:numel]


def gradient(parameter: Any) -> Tensor:
    """This rank's part of a step's gradient, which DeepSpeed keeps in memory though it writes it to the disk, too."""
    kept: dict[int, Tensor] = parameter._z3_optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    return kept[parameter.ds_id].float()


class Swapped:
    """The sub-group of the optimiser's states that is in memory, one at a time, of those that rest on a disk."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.group: int | None = None
        self.written = False

    def bring(self, parameter: Any) -> Callable[[], None] | None:
        """Brings the states of this parameter into memory, until the next is asked for; what is to be called when they are changed.

        None for a parameter that has none, or whose sub-group is so small that it stays in memory.
        """
        if not parameter.requires_grad:
            return None
        group, _, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        if not self.zero._swappable_optimizer_subgroup(group):
            return None
        if group != self.group:
            self.leave()
            self.zero._optimizer_states_and_gradient_swap_in(group)
            self.group = group
        return self._mark

    def leave(self) -> None:
        """Gives the memory back, and writes what was changed, also to the weights that forward passes read."""
        if self.group is None:
            return
        if self.written:
            self.zero._reassign_or_swap_out_partitioned_parameters(self.group)
            self.zero._optimizer_states_and_gradient_swap_out(self.group)
        else:
            self.zero._release_swap_buffers(self.group)
        self.group, self.written = None, False

    def whole_gradient(self, parameter: Any) -> Tensor | None:
        """The step's gradient of the whole parameter. Every rank must ask."""
        return self.zero._fp32_state_allgather(parameter, gradient(parameter)) if parameter.requires_grad else None

    def _mark(self) -> None:
        self.written = True
