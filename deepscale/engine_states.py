"""Where an engine keeps what an optimiser step changes: the memory that a checkpoint is copied out of, and into."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Held(NamedTuple):
    """What this rank holds of a parameter: elements `start` and following of its flat master weight and of Adam's two moments, float32 (k,).

    `forward` is what forward passes read, (start, elements), where that is other memory. `everywhere`: every rank holds the same.
    """

    start: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    forward: tuple[int, Tensor] | None = None
    everywhere: bool = False


def moments(optimizer: Optimizer, master: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's moments of the tensor that it steps, flat; made here where no step has made them yet."""
    state = optimizer.state[master]
    if not state:
        if type(optimizer).__name__ == "DeepSpeedCPUAdam":
            state["step"] = 0
        else:  # torch's fused step counts on the device
            fused = bool(optimizer.defaults.get("fused"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(master, requires_grad=False) for _ in range(2))
    return state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)


def steps_of(optimizer: Optimizer) -> int:
    """Steps that Adam has counted: those whose gradients did not overflow."""
    return max((int(state["step"]) for state in optimizer.state.values() if state), default=0)


def set_steps(optimizer: Optimizer, steps: int) -> None:
    """Makes Adam count on from `steps`, for every tensor that has moments."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(steps)
        elif state:
            state["step"] = steps


def replicated(parameter: nn.Parameter, optimizer: Optimizer) -> Held:
    """A parameter that every rank holds whole, with its moments."""
    weight = parameter.detach().view(-1)
    exp_avg, exp_avg_sq = moments(optimizer, parameter) if parameter.requires_grad else _none(weight)
    return Held(0, weight, exp_avg, exp_avg_sq, everywhere=True)


def _none(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A frozen parameter's moments."""
    return torch.zeros_like(weight), torch.zeros_like(weight)


def zero12(parameter: Any, zero: Any) -> Held:
    """The fragment of a parameter whose optimiser state ZeRO 1 or 2 (`zero`) has put on this rank; forward passes read the whole parameter."""
    whole, mapping = parameter.detach().view(-1), parameter._hp_mapping
    if mapping is None:
        return Held(0, whole[:0], whole[:0], whole[:0], (0, whole))
    master = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    place = mapping.hp_fragment_address
    weight, exp_avg, exp_avg_sq = (t.detach().narrow(0, place.start, place.numel) for t in (master, *moments(zero.optimizer, master)))
    return Held(mapping.lp_fragment_address.start, weight, exp_avg, exp_avg_sq, forward=(0, whole))


def zero3(parameter: Any, rank: int) -> Held:
    """This rank's partition of a parameter that ZeRO-3 has cut up, without the padding of the last one."""
    zero, piece = parameter._z3_optimizer, parameter.ds_tensor.ds_numel
    start = min(rank * piece, parameter.ds_numel)
    numel = min(piece, parameter.ds_numel - start)
    if not parameter.requires_grad:
        part = parameter.ds_tensor.detach().view(-1)[:numel]
        return Held(start, part, *_none(part))
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    master = zero.fp32_partitioned_groups_flat[group]
    weight, exp_avg, exp_avg_sq = (t.detach().narrow(0, offset, numel) for t in (master, *moments(zero.optimizer, master)))
    return Held(start, weight, exp_avg, exp_avg_sq, forward=(start, parameter.ds_tensor.detach().view(-1)[:numel]))
