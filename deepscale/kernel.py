"""Which kernel computes the blocks (--kernel): torch's operators, or the native one, made ready before anything is planned or timed."""

import torch

from deepscale import ops
from deepscale.config import AUTO, Config
from deepscale.errors import UsageError
from deepscale.ops.op import Say
from deepscale.world import World


def choose(asked: Config, place: World, say: Say, warn: Say) -> Config:
    """The settings with their kernel chosen, and the native one built and loaded where it is; the same on all ranks.

    Raises UsageError where `--kernel native` cannot be had.
    """
    kernel = asked.engine.kernel
    if kernel == "torch":
        return asked
    unfit = unfit_for_native(asked, place.device.type)
    reason = unfit or ops.ensure_ops(["block"], say, asked.engine.verbose)["block"]
    if not unfit and place.sum(torch.tensor(float(reason is not None), device=place.device)):
        reason = reason or "another rank does not have it"
    if reason is None:
        return asked.replace(kernel="native")
    if kernel != AUTO:
        raise UsageError(f"--kernel native cannot be had: {reason}; type --kernel torch, or leave it out")
    if not unfit:
        warn(f"{reason}; the blocks are computed by torch's operators instead")
    return asked.replace(kernel="torch")


def unfit_for_native(config: Config, device: str) -> str | None:
    """Why these settings have nothing that the native kernel computes, or None."""
    if device != "cpu":
        return "it is for the CPU, and this run is on a GPU"
    if config.model.model != "convnext":
        return f"it computes ConvNeXt's blocks, and this is --model {config.model.model}"
    if config.model.norm == "batchnorm":
        return "it does not know --norm batchnorm"
    if config.engine.precision not in (AUTO, "fp32"):
        return f"it does not compute in {config.engine.precision}"
    return None
