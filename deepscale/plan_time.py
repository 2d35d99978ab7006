"""Seconds of an optimiser step before it runs: each part of it timed for a moment on this machine, and multiplied out.

Parts: a stack of blocks of each stage; stem, downsamplings and head; clipping and AdamW for every parameter; what DeepSpeed does for
every parameter and every tensor.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepscale.activations import Policy, Recompute, Revolve, policy_of
from deepscale.config import Config
from deepscale.models import registry
from deepscale.models.components import LOW_PRECISION
from deepscale.models.convnext import Convolution, Head, block_spec, count_parameters, outer_norm
from deepscale.models.stack import BlockStack
from deepscale.nvme.traffic import disk_s
from deepscale.optim import build_optimizer
from deepscale.plan_counted import counted_flops
from deepscale.plan_network import Images, Stage, data_ranks, stages_of
from deepscale.plan_pipeline import shares
from deepscale.world import World

MEASURE_S = 0.1  # of each part
MANY_RUNS = 5  # of a stack, which takes about as long
LONG_S = 5.0  # a network of which one pass takes that long is run once, on a CPU on fewer images
CORE_FLOPS = 150e9  # no core runs faster than this in float32
RATE_ELEMENTS = 2**23  # 32 MiB of float32: no cache holds them, and malloc gives them back each time, as it does the engine's buffers
# What DeepSpeed adds to a step, by (ZeRO stage, offload): copies into fresh memory for every parameter (buckets, the share's gradients, the
# flat gradient, weights from their master copy), and seconds of Python for every parameter tensor. From steps of 1,004 layers in 190 tensors
# and 10,001 in 551 against plain torch's (docs/findings.md).
ENGINE = {
    (0, "none"): (1.4, 0.5e-4), (1, "none"): (1.0, 5e-4), (2, "none"): (1.0, 5.5e-4), (3, "none"): (1.8, 3.5e-4),
    (1, "cpu"): (0.0, 7e-4), (2, "cpu"): (0.0, 7e-4), (3, "cpu"): (1.4, 6e-4), (3, "nvme"): (1.4, 6e-4),
}  # fmt: skip
CPU_ADAM = 0.5  # of the time of ours: DeepSpeed's own optimiser, which steps what is offloaded, is compiled
# Seconds for every parameter that averaging gradients and gathering weights take on CPU ranks of one machine, by ZeRO stage: two ranks over gloo.
SENDING = {0: 9e-9, 1: 9e-9, 2: 17e-9, 3: 29e-9}


def measure_step_s(config: Config, world: World, images: Images) -> float:
    """Seconds of one optimiser step, measured in a few seconds. Every rank measures on its own."""
    if config.model.model != "convnext":
        return _whole_s(config, world, images)
    stages = stages_of(config, images)
    blocks = sum(_stage_s(config, world, stage, images.micro, policy_of(config).at(s)) for s, stage in enumerate(stages))
    passes = blocks + _outside_s(config, world, stages, images)
    parameters, stacks = count_parameters(config.model, images.classes, images.channels), sum(len(stage.stacks) for stage in stages)
    cut, micro_batches = config.engine.pipeline_stages, config.recipe.accumulation
    if cut == 1:
        return micro_batches * passes + _update_s(config, world, parameters, stacks)
    # As many turns as micro batches, and the first one's way to the last stage; the slowest stage decides how long a turn takes.
    turns = (micro_batches + cut - 1) * passes * max(shares(config, images))
    return turns + _update_s(config, world, parameters // cut, stacks // cut)


def _whole_s(config: Config, world: World, images: Images) -> float:
    """Seconds of a step of a network that has no stages: all of it is run, on as many of the images as do not take long."""
    shape = registry.Images(images.channels, images.side, images.classes)
    micro = images.micro
    if world.device.type == "cpu":
        micro = max(1, min(micro, int(LONG_S * CORE_FLOPS / sum(counted_flops(config.model, shape, 1)))))
    with world.device:
        network = registry.build(dataclasses.replace(config.model, sync_batchnorm=False), shape)
    x = torch.randn(micro, images.channels, images.side, images.side, device=world.device)
    modules = [own for own in network.modules() if next(own.parameters(recurse=False), None) is not None]
    passes = config.recipe.accumulation * images.micro / micro * _passes_s(config, world, network, x)
    return passes + _update_s(config, world, sum(p.numel() for p in network.parameters()), len(modules) // 4)


def _stage_s(config: Config, world: World, stage: Stage, micro: int, policy: Policy) -> float:
    """All blocks of a stage, forward and backward: a stack of them, as long as that does not take long; and those that run forward once more."""
    # Ranks measure on their own, and not equally often: nothing may wait for another.
    spec = dataclasses.replace(block_spec(config.model, stage.channels), sync_batchnorm=False)

    again = policy.advanced(stage.stacks)[0] if isinstance(policy, Revolve) else 0
    policy = Recompute(policy.segment) if isinstance(policy, Revolve) else policy

    def seconds(n: int, runs: int = 1, backward: bool = True) -> float:
        stack = policy.apply(BlockStack(spec, 0, n))
        stack.kernel = config.engine.kernel
        return _passes_s(config, world, stack, _input(world, stage, micro), runs, backward)

    one = seconds(1)
    blocks = sum(stage.stacks)
    many = max(1, min(max(stage.stacks), int(MEASURE_S / one)))
    passes = blocks * one if many < 2 else blocks / many * seconds(many, MANY_RUNS)
    return passes + (again / many * seconds(many, MANY_RUNS, backward=False) if again else 0.0)


def _outside_s(config: Config, world: World, stages: list[Stage], images: Images) -> float:
    """Stem, downsamplings and head, forward and backward."""
    kind, total = outer_norm(config.model), 0.0
    side = images.side
    for stage in stages:
        first = stage is stages[0]
        x = torch.randn(images.micro, stage.before, side, side, device=world.device).contiguous(memory_format=torch.channels_last)
        convolution = Convolution(kind, False, (stage.before, stage.channels), stage.kernel, norm_first=not first)
        total += _passes_s(config, world, convolution, x if first else x.requires_grad_())
        side //= stage.kernel
    head = Head(kind, False, stages[-1].channels, images.classes)
    return total + _passes_s(config, world, head, _input(world, stages[-1], images.micro))


def _input(world: World, stage: Stage, micro: int) -> Tensor:
    """A random input of a stage's blocks."""
    side = round((stage.rows / micro) ** 0.5)
    return torch.randn(micro, stage.channels, side, side, device=world.device).contiguous(memory_format=torch.channels_last).requires_grad_()


def _passes_s(config: Config, world: World, module: nn.Module, x: Tensor, runs: int = 1, backward: bool = True) -> float:
    """One forward pass, and `backward`, of a module with random weights."""
    module.to(world.device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    low = LOW_PRECISION.get(config.engine.precision)

    def run() -> None:
        module.zero_grad()  # no step adds to gradients that are there
        with torch.autocast(world.device.type, dtype=low, enabled=low is not None), torch.set_grad_enabled(backward):
            y = module(x)
        if backward:
            y.backward(y.detach())

    return _median_s(run, world, runs)


def _update_s(config: Config, world: World, parameters: int, stacks: int) -> float:
    """Clipping, AdamW and what DeepSpeed does with gradients and weights."""
    update, copy = _rates(world, torch.get_num_threads())
    ranks = data_ranks(config, world.size)
    share = parameters / ranks if config.engine.zero != 0 else parameters
    seconds = update * share * (CPU_ADAM if config.engine.offload != "none" else 1.0)
    if ranks > 1 and world.device.type == "cpu":
        seconds += SENDING[int(config.engine.zero)] * parameters
    if config.engine.engine == "deepspeed":
        tensors = 9 * stacks + 20
        copies, tensor_s = ENGINE[int(config.engine.zero), config.engine.offload]
        copies = 0.0 if config.engine.zero == 0 and ranks == 1 else copies
        seconds += copies * copy * share + tensor_s * tensors + disk_s(config, world.size, parameters)
    return seconds


@functools.lru_cache
def _rates(world: World, threads: int) -> tuple[float, float]:
    """Seconds for one parameter: of clipping and AdamW, and of a copy into fresh memory."""
    module = nn.ParameterList([torch.zeros(RATE_ELEMENTS, device=world.device)])
    weight = module[0]
    weight.grad = torch.zeros_like(weight)
    optimizer = build_optimizer(module, Config().recipe)

    def update() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    updated = _median_s(update, world, 3)
    return updated / RATE_ELEMENTS, _median_s(weight.grad.clone, world, 3) / RATE_ELEMENTS


def _median_s(run: Callable[[], object], world: World, runs: int = 1) -> float:
    """The median of at least `runs` and of `MEASURE_S`, not the best: on a busy machine threads that wait for each other are what a step costs."""
    first = _seconds(run, world)
    if first > LONG_S:
        return first
    taken: list[float] = []  # without the first, which allocates
    while len(taken) < runs or (sum(taken) < MEASURE_S and len(taken) < 50):
        taken.append(_seconds(run, world))
    return statistics.median(taken)


def _seconds(run: Callable[[], object], world: World) -> float:
    _synchronise(world)
    begin = time.perf_counter()
    run()
    _synchronise(world)
    return time.perf_counter() - begin


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
