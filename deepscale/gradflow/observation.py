"""The blocks of a model while they run on a recorded step: the observers that are attached to them, and what they come to."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepscale.gradflow.flow import BLOCK_FIELDS
from deepscale.models.network import Network
from deepscale.models.observe import BlockObserver


class Observer(Protocol):
    """What one or more blocks do in the passes of an optimiser step."""

    activations: bool  # whether saturation is counted
    sums: Tensor  # these two add up over ranks
    saturated: Tensor

    def collect(self) -> None:
        """Makes the sums of what passes have shown."""
        ...

    def statistics(self) -> dict[str, Tensor]:
        """(n,) of each of `BLOCK_FIELDS`, of its n blocks, from the sums."""
        ...


class Observation(Protocol):
    """Observers of all blocks of a model, in path order."""

    def attach(self, activations: bool) -> None:
        """Begins to observe every pass; `activations` says whether saturation is counted."""
        ...

    def detach(self) -> Sequence[Observer]:
        """Ends it, and gives the observers; none where nothing was attached."""
        ...


class StackObservation:
    """The blocks of a network's stacks: one observer per stack, which its hand-written backward shows every block (models/stack.py)."""

    def __init__(self, model: Network, device: torch.device) -> None:
        self.stacks = [stack for _, stack in model.stacks()]
        self.observers = [BlockObserver(stack.blocks, stack.units, device) for stack in self.stacks]

    def attach(self, activations: bool) -> None:
        for stack, observer in zip(self.stacks, self.observers, strict=True):
            observer.reset(activations)
            stack.observer = observer

    def detach(self) -> list[BlockObserver]:
        attached = [stack.observer for stack in self.stacks if stack.observer is not None]
        for stack in self.stacks:
            stack.observer = None
        return attached


def statistics(observers: Sequence[Observer], spread: bool, loss_scale: float, data_size: int = 1) -> dict[str, Tensor]:
    """(N,) each, over the passes of all ranks if they are `spread` over ranks, of which `data_size` share out the images: one message.

    Empty without observers."""
    if not observers:
        return {}
    for observer in observers:
        observer.collect()
    if spread:
        tensors = [o.sums for o in observers] + [o.saturated for o in observers if o.activations]
        joined = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(joined)
        for tensor, values in zip(tensors, joined.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))
    found = [observer.statistics() for observer in observers]
    fields = {name: torch.cat([f[name] for f in found]) for name in BLOCK_FIELDS}
    # A rank's loss is the mean over its own images; the step's is the mean over all ranks that share out the images.
    fields["output_grad_l2"] /= loss_scale * data_size
    return fields
