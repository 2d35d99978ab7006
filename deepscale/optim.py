"""Optimisers with weight decay by role, and the learning rate over a run.

AdamW (arXiv:1711.05101) decays weights apart from the gradient; Adam (arXiv:1412.6980) and SGD add the decay to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from deepscale.config import RecipeConfig
from deepscale.models.convnext import parameter_groups

# torch's OneCycleLR starts at lr / 25: the calibration steps of a time budget run at this rate.
DIV_FACTOR = 25.0
LEAP = 2**30  # a step that no run is near
PIECE = 2**16  # elements whose weight, gradient and moments stay in a core's cache


class AdamWInPieces(AdamW):
    """torch's AdamW on a CPU, one cache-sized piece of a tensor after the other: same values, no temporaries of a tensor's size.

    Not torch's fused one: it rounds the last numel % 16 elements of a tensor differently, so ZeRO's flat tensors and the plain
    ones would part. 30 million parameters, one thread, CPU seconds a step: 0.06 in pieces, 0.17 as torch does it, 0.02 fused.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        assert closure is None
        _step_in_pieces(self, adamw)


class AdamInPieces(Adam):
    """torch's Adam in the same pieces."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        assert closure is None
        _step_in_pieces(self, adam)


def _step_in_pieces(optimizer: Optimizer, update: Callable[..., None]) -> None:
    for group in optimizer.param_groups:
        columns: list[list[Tensor]] = [[], [], [], [], []]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            flat = all(t.is_contiguous() for t in tensors)
            pieces = [t.view(-1).split(PIECE) if flat else (t,) for t in tensors]
            for column, part in zip(columns, pieces, strict=False):
                column.extend(part)
            columns[4].extend(state["step"].clone() for _ in pieces[0])
            state["step"] += 1
        beta1, beta2 = group["betas"]
        update(
            columns[0], columns[1], columns[2], columns[3], [], columns[4], foreach=False, fused=False, amsgrad=False, maximize=False,
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


def build_optimizer(model: nn.Module, recipe: RecipeConfig, cpu_adam: bool = False) -> Optimizer:
    """The recipe's optimiser over the model's parameters; DeepSpeed's CPU version of Adam where that is offloaded."""
    groups, cuda = parameter_groups(model, recipe.weight_decay), next(model.parameters()).is_cuda
    if recipe.optimizer == "sgd":
        return SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    decoupled = recipe.optimizer == "adamw"
    settings: dict[str, Any] = {"lr": recipe.lr, "betas": (recipe.beta1, recipe.beta2), "eps": recipe.eps}
    if cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: Optimizer = DeepSpeedCPUAdam(groups, **settings, adamw_mode=decoupled)
        optimizer.register_step_pre_hook(_forget_products)
        return optimizer
    if cuda:
        return (AdamW if decoupled else Adam)(groups, **settings, fused=True)
    return (AdamWInPieces if decoupled else AdamInPieces)(groups, **settings)


def _forget_products(optimizer: Any, *_: Any) -> None:
    """DeepSpeed's op multiplies its powers of the betas on from step to step, which a resumed run could not: after a leap it takes them anew."""
    one = [torch.zeros(1) for _ in range(4)]
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, LEAP, 0.0, *optimizer.param_groups[0]["betas"], 1.0, 0.0, True, *one)


def start(optimizer: Optimizer, recipe: RecipeConfig) -> None:
    """Sets the rate of the first step, for steps taken before the length of the run is known."""
    first = recipe.lr / DIV_FACTOR if recipe.schedule == "onecycle" else recipe.lr
    for group in optimizer.param_groups:
        group["lr"] = first


class Schedule:
    """The learning rate over a run: `step` is called after every optimiser step but the last, and every so many of them move the rate."""

    def __init__(self, inner: LRScheduler, every: int) -> None:
        self.inner, self.every, self.done = inner, every, 0

    def step(self) -> None:
        """After an optimiser step."""
        self.done += 1
        if self.done % self.every == 0:
            self.inner.step()


def build_schedule(optimizer: Optimizer, recipe: RecipeConfig, steps: int, epoch_steps: int = 1) -> Schedule:
    """The schedule over `steps` optimiser steps, at its first step; `epoch_steps` of them are an epoch.

    onecycle is torch's with its defaults (pct_start 0.3, cosine, div_factor 25, final_div_factor 1e4, beta1 or momentum cycled
    0.95 -> 0.85 -> 0.95); cosine (arXiv:1608.03983, without restarts) falls to the recipe's min_lr; constant stays. Where it moves
    every epoch, epoch e (from 0) of E has the rate at e / E of the way, as of torch's scheduler called after every epoch.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr
    every = epoch_steps if recipe.schedule_every == "epoch" else 1
    moves = -(-steps // every)
    if recipe.schedule == "onecycle":
        cycled = recipe.optimizer != "sgd" or recipe.momentum > 0
        inner: LRScheduler = OneCycleLR(optimizer, recipe.lr, total_steps=max(2, moves), div_factor=DIV_FACTOR, cycle_momentum=cycled)
    elif recipe.schedule == "cosine":
        inner = CosineAnnealingLR(optimizer, T_max=moves, eta_min=recipe.min_lr)
    else:
        inner = LambdaLR(optimizer, lambda step: 1.0)
    return Schedule(inner, every)
