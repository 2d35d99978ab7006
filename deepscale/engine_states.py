"""Where an engine keeps what an optimiser step changes: the memory that a checkpoint is copied out of, and into."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Held(NamedTuple):
    """What this rank holds of a parameter: elements `start` and following of its flat master weight and of what the optimiser remembers of
    it (`kinds_of`), float32 (k,).

    `forward` is what forward passes read, (start, elements), where that is other memory. `everywhere`: every rank holds the same.
    `changed`: where the state rests on a disk, and is in memory until the next part is asked for: call it once weight or moments are written.
    """

    start: int
    weight: Tensor
    moments: dict[str, Tensor]
    forward: tuple[int, Tensor] | None = None
    everywhere: bool = False
    changed: Callable[[], None] | None = None


def kinds_of(optimizer: Optimizer) -> tuple[str, ...]:
    """What the optimiser remembers of every weight: Adam its two moments, SGD what has momentum."""
    if "betas" in optimizer.defaults:
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults.get("momentum") else ()


def moments(optimizer: Optimizer, master: Tensor) -> dict[str, Tensor]:
    """What the optimiser remembers of the tensor that it steps, flat; made here where no step has made it yet."""
    state, kinds = optimizer.state[master], kinds_of(optimizer)
    if "exp_avg" in kinds and not state:
        if type(optimizer).__name__ == "DeepSpeedCPUAdam":
            state["step"] = 0
        else:  # torch's fused step counts on the device
            fused = bool(optimizer.defaults.get("fused"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
    for kind in kinds:
        if state.get(kind) is None:  # a momentum of 0 gives the same first step as none
            state[kind] = torch.zeros_like(master, requires_grad=False)
    return {kind: state[kind].view(-1) for kind in kinds}


def steps_of(optimizer: Optimizer) -> int:
    """Steps that Adam has counted: those whose gradients did not overflow. 0 for what does not count."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def set_steps(optimizer: Optimizer, steps: int) -> None:
    """Makes Adam count on from `steps`, for every tensor that has moments."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(steps)
        elif "step" in state:
            state["step"] = steps


def replicated(parameter: nn.Parameter, optimizer: Optimizer) -> Held:
    """A parameter that every rank holds whole, with its moments."""
    weight = parameter.detach().view(-1)
    own = moments(optimizer, parameter) if parameter.requires_grad else _frozen(weight, optimizer)
    return Held(0, weight, own, everywhere=True)


def _frozen(weight: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    """A frozen parameter's moments."""
    return {kind: torch.zeros_like(weight) for kind in kinds_of(optimizer)}


def zero12(parameter: Any, zero: Any) -> Held:
    """The fragment of a parameter whose optimiser state ZeRO 1 or 2 (`zero`) has put on this rank; forward passes read the whole parameter."""
    whole, mapping = parameter.detach().view(-1), parameter._hp_mapping
    if mapping is None:
        return Held(0, whole[:0], dict.fromkeys(kinds_of(zero.optimizer), whole[:0]), (0, whole))
    master = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    place = mapping.hp_fragment_address
    weight, own = _narrowed(zero.optimizer, master, place.start, place.numel)
    return Held(mapping.lp_fragment_address.start, weight, own, forward=(0, whole))


def zero3(parameter: Any, rank: int, changed: Callable[[], None] | None = None) -> Held:
    """This rank's partition of a parameter that ZeRO-3 has cut up, without the padding of the last one; `changed` as in Held."""
    zero, piece = parameter._z3_optimizer, parameter.ds_tensor.ds_numel
    start = min(rank * piece, parameter.ds_numel)
    numel = min(piece, parameter.ds_numel - start)
    if not parameter.requires_grad:
        part = parameter.ds_tensor.detach().view(-1)[:numel]
        return Held(start, part, _frozen(part, zero.optimizer))
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    master = zero.fp32_partitioned_groups_flat[group]
    weight, own = _narrowed(zero.optimizer, master, offset, numel)
    forward = None if changed else (start, parameter.ds_tensor.detach().view(-1)[:numel])
    return Held(start, weight, own, forward, changed=changed)


def _narrowed(optimizer: Optimizer, master: Tensor, start: int, numel: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A part of a flat master weight, and of what the optimiser remembers of it."""
    parts = {kind: moment.detach().narrow(0, start, numel) for kind, moment in moments(optimizer, master).items()}
    return master.detach().narrow(0, start, numel), parts
