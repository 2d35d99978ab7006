"""What a network without ConvNeXt's formulas takes: counted in one pass on torch's meta device, whose tensors have no values.

An estimate beside the planner's formulas, which are calibrated: float32 whatever the precision, and no more than torch's autograd saves.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deepscale.config import ModelConfig
from deepscale.models import registry
from deepscale.models.convnext import count_parameters
from deepscale.models.registry import Images

VALUES = ("init", "init_std")  # settings that change no shape


@dataclass(frozen=True)
class Counted:
    """tensors: elements of each module's own parameters, in path order. kept: bytes that a forward pass leaves for backward, the images among
    them. largest: of the largest tensor of these."""

    tensors: tuple[tuple[int, ...], ...]
    kept: int
    largest: int

    @property
    def parameters(self) -> int:
        """Their number."""
        return sum(map(sum, self.tensors))


def counted(model: ModelConfig, images: Images, micro: int = 1) -> Counted:
    """The network on a batch of `micro` images, whatever the initial values."""
    return _counted(_shapes(model), images, micro)


def _shapes(model: ModelConfig) -> ModelConfig:
    """The settings with the usual initial values: studies have many networks that differ in these alone."""
    usual = registry.defaults(model.model)
    return dataclasses.replace(model, **{name: usual[name] for name in VALUES})


@functools.lru_cache(maxsize=64)
def _counted(model: ModelConfig, images: Images, micro: int) -> Counted:
    with torch.device("meta"), torch.enable_grad():
        network = registry.build(model, images)
        batch = torch.empty(micro, images.channels, images.side, images.side)
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        saved: dict[int, Tensor] = {}  # by storage; held, so that none is used again

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in weights:
                saved[storage] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = network(batch)  # held until all that it saved is counted
    sizes = [tensor.untyped_storage().nbytes() for tensor in saved.values()]
    tensors = (tuple(p.numel() for p in module.parameters(recurse=False)) for module in network.modules())
    return Counted(tuple(own for own in tensors if own), sum(sizes), max(sizes, default=logits.untyped_storage().nbytes()))


def counted_flops(model: ModelConfig, images: Images, micro: int) -> tuple[int, int]:
    """(forward, backward) FLOPs of a batch: `micro` times those of one image, whatever the initial values."""
    forward, backward = _flops_of_one(_shapes(model), images)
    return micro * forward, micro * backward


@functools.lru_cache(maxsize=64)
def _flops_of_one(model: ModelConfig, images: Images) -> tuple[int, int]:
    with torch.device("meta"), torch.enable_grad(), FlopCounterMode(display=False) as flops:
        logits = registry.build(model, images)(torch.empty(1, images.channels, images.side, images.side))
        forward = flops.get_total_flops()
        logits.sum().backward()
    return forward, flops.get_total_flops() - forward


def tensors_of(model: ModelConfig, images: Images | None = None) -> tuple[tuple[int, ...], ...]:
    """Elements of each module's own parameters; where images are not known, for CIFAR-10's."""
    return counted(model, images or Images()).tensors


def parameters_of(model: ModelConfig, images: Images | None = None) -> int:
    """Parameters of any network; where images are not known, for CIFAR-10's."""
    images = images or Images()
    if model.model == "convnext":
        return count_parameters(model, images.classes, images.channels)
    return counted(model, images).parameters
