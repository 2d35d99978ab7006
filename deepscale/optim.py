"""AdamW (arXiv:1711.05101) with decay by role, and the learning rate over a run."""

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from deepscale.config import RecipeConfig
from deepscale.models.convnext import parameter_groups

# torch's OneCycleLR starts at lr / 25: the calibration steps of a time budget run at this rate.
DIV_FACTOR = 25.0


def build_optimizer(model: nn.Module, recipe: RecipeConfig, cpu_adam: bool = False) -> Optimizer:
    """AdamW over the model's parameters; DeepSpeed's CPU version for an offloaded optimiser."""
    groups = parameter_groups(model, recipe.weight_decay)
    betas = (recipe.beta1, recipe.beta2)
    if cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, adamw_mode=True)  # type: ignore[no-any-return]
    return AdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)


def start(optimizer: Optimizer, recipe: RecipeConfig) -> None:
    """Sets the rate of the first step, for steps taken before the length of the run is known."""
    first = recipe.lr / DIV_FACTOR if recipe.schedule == "onecycle" else recipe.lr
    for group in optimizer.param_groups:
        group["lr"] = first


def build_schedule(optimizer: Optimizer, recipe: RecipeConfig, steps: int) -> LRScheduler:
    """The schedule over `steps` optimiser steps, at its first step.

    onecycle is torch's with its defaults (pct_start 0.3, cosine, div_factor 25, final_div_factor 1e4, beta1 cycled
    0.95 -> 0.85 -> 0.95); cosine falls to 0; constant stays.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr
    if recipe.schedule == "onecycle":
        return OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=max(2, steps), div_factor=DIV_FACTOR)
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    return LambdaLR(optimizer, lambda step: 1.0)
