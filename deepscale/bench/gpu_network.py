"""The network of a GPU bench: made on the device without the time that true initial values take, within a memory limit."""

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deepscale.activations import policy_of
from deepscale.bench.networks import CHANNELS, CLASSES, random_batch
from deepscale.config import Config
from deepscale.models.components import LOW_PRECISION, RunningStatistics
from deepscale.models.convnext import ConvNeXt, cross_entropy
from deepscale.models.initial import STD
from deepscale.models.reference import PlainConvNeXt


def build(settings: Config, device: torch.device, plain: bool = False) -> nn.Module:
    """The planned network on the device, filled there; `plain` as published.

    Values do not matter to time, but that they are no zeros does: a multiplier that multiplies zeros draws less power.
    """
    with torch.device("meta"):
        model: nn.Module = PlainConvNeXt(settings.model, classes=CLASSES, channels=CHANNELS)
        if not plain:
            model = ConvNeXt(settings.model, classes=CLASSES, channels=CHANNELS, stack_size=settings.engine.stack_size)
    model.to_empty(device=device)
    fill(model, settings.model.gamma_init or 0.0)
    return policy_of(settings).apply(model)


@torch.no_grad()
def fill(model: nn.Module, gamma: float) -> None:
    """Random weights, whole tensors at a time; norms, biases and gamma as they begin."""
    for name, parameter in model.named_parameters():
        owner, _, kind = name.replace("_weight", ".weight").replace("_bias", ".bias").rpartition(".")
        if kind == "gamma":
            parameter.fill_(gamma)
        elif kind == "bias":
            parameter.zero_()
        elif owner.endswith("norm"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, STD)
    for module in model.modules():
        if isinstance(module, RunningStatistics):
            module.reset_parameters()


def batch_on(images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels on the device, as the feeds give them."""
    pixels, labels = random_batch(images)
    return pixels.to(device), labels.to(device)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """The loss in the run's precision. Without autocast's cache, whose casts would live in one pass and not in the next that replays it."""
    low = LOW_PRECISION.get(precision)
    with torch.autocast(images.device.type, dtype=low, enabled=low is not None, cache_enabled=False):
        logits = model(images)
    return cross_entropy(logits, labels)


def limit_memory(device: torch.device, limit: int) -> None:
    """Lets torch's allocator take no more than `limit` bytes of the device; 0 for no limit. CUDA's own context is not counted by it."""
    if limit and device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        if "deepspeed" in sys.modules:  # which looks at the device's memory to decide where it may make its copies
            from deepspeed.accelerator import get_accelerator

            get_accelerator().available_memory = lambda device_index=None: max(0, limit - torch.cuda.memory_allocated(device))


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """float32 products in float32: no TF32, which has 10 bits. torch lets convolutions use it by default."""
    matmul, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolutions
