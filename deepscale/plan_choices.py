"""What may be chosen to make a network fit: ZeRO stage, offload and activation policy, in the order of what they cost in time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from deepscale import pipeline
from deepscale.activations import KINDS, POLICIES
from deepscale.config import AUTO, REVERSIBLE_POLICIES, Auto, Config, StackSize
from deepscale.depth import MAX_DEPTH, MIN_DEPTH, blocks_for_depth, depth_of_blocks
from deepscale.machine import Machine
from deepscale.models.convnext import default_stack_size, smallest_segment
from deepscale.plan_memory import fits, memory_of
from deepscale.plan_network import data_ranks
from deepscale.plan_revolve import leanest, scheduled

FAST_SEGMENT = 4  # blocks recomputed together whose activations stay in a core's cache
# (ZeRO stage, offload) that can be worth their time: on one rank ZeRO saves nothing unless it offloads.
ALONE = ((0, "none"), (2, "cpu"), (3, "cpu"))
SEVERAL = ((1, "none"), (2, "none"), (3, "none"), (1, "cpu"), (2, "cpu"), (3, "cpu"))


@dataclass(frozen=True)
class Choice:
    """Where an engine's states rest, and what a forward pass leaves for backward. `segment` is None where no block is recomputed, and `slots` where
    all inputs of segments are kept; of `revolve` both are `auto` until memory says them (plan_revolve.py)."""

    zero: int
    offload: str
    activations: str
    segment: int | None | Auto
    slots: StackSize | None | Auto = None

    def apply(self, config: Config) -> Config:
        """The configuration with this choice."""
        return config.replace(**dataclasses.asdict(self))


def placements(config: Config) -> list[tuple[int, str]]:
    """(ZeRO stage, offload) of all that there is for the configuration's engine; a value given by hand stands alone."""
    zero, offload = config.engine.zero, config.engine.offload
    possible = (0,) if config.engine.engine == "torch" else pipeline.ZERO if config.engine.pipeline_stages > 1 else range(4)
    stages = [stage for stage in possible if zero in (AUTO, stage)]
    if config.engine.pipeline_stages > 1:
        return [(stage, "none") for stage in stages]
    if offload == "nvme":  # which nobody is given who has not asked for it
        return [(3, "nvme")]
    return [(stage, place) for place in ("none", "cpu") for stage in stages if offload in (AUTO, place) and (stage, place) != (0, "cpu")]


def policies(config: Config) -> list[tuple[Any, ...]]:
    """(activation policy, segment, slots) of all that there is, the fastest first; a segment given by hand says whether blocks are recomputed, and
    slots, how."""
    engine, names = config.engine, list(REVERSIBLE_POLICIES if config.model.skip == "reversible" else POLICIES)
    if config.model.model != "convnext":
        return [("keep", None, None)]
    if engine.pipeline_stages > 1 and "revolve" in names:
        names.remove("revolve")
    if engine.activations != AUTO:
        names = [engine.activations]
    elif engine.slots not in (AUTO, None):
        names = ["revolve"]
    elif engine.segment != AUTO:
        names = ["keep"] if engine.segment is None else ["recompute"]
    elif engine.slots is None:
        names.remove("revolve")
    segments = [FAST_SEGMENT, smallest_segment(config.model.stage_blocks)] if engine.segment == AUTO else [engine.segment]
    own = {"revolve": [engine.segment], **dict.fromkeys(("recompute", "offload"), dict.fromkeys(segments))}
    return [(name, segment, engine.slots if name == "revolve" else None) for name in names for segment in own.get(name, [None])]


def preferred(config: Config, machine: Machine) -> list[Choice]:
    """What the planner may take, the fastest first: recomputation costs less time than ZeRO-3's gathering, and offload more than both."""
    engine, cpu, order = config.engine, machine.device == "cpu", list(KINDS)
    worth = ALONE if data_ranks(config, machine.ranks) == 1 else SEVERAL
    choices = [Choice(*place, *policy) for place in placements(config) if engine.zero != AUTO or place in worth for policy in policies(config)]
    if cpu:  # there is nowhere else to offload to
        choices = [c for c in choices if c.offload in ("none", engine.offload)]
        choices = [c for c in choices if engine.activations == "offload" or c.activations != "offload"]
    if config.model.skip == "reversible" and engine.activations == AUTO:  # which nobody types for speed
        choices = [c for c in choices if c.activations == "reconstruct"]
    return sorted(choices, key=lambda c: (c.offload == "cpu", c.zero == 3, order.index(c.activations), c.zero))


def resolved(choice: Choice, config: Config, machine: Machine, **shape: int) -> Choice:
    """The choice with its schedule, for a configuration that is open in nothing else."""
    engine = scheduled(choice.apply(config), machine, **shape).engine
    return dataclasses.replace(choice, segment=engine.segment, slots=engine.slots)


def choose(config: Config, machine: Machine, **shape: int) -> Config:
    """The fastest choice that fits, else the smallest."""
    sizes = {}
    for choice in preferred(config, machine):
        option = scheduled(choice.apply(config), machine, **shape)
        sizes[option] = memory_of(option, machine.ranks, **shape)
        if fits(sizes[option], machine):
            return option
    return min(sizes, key=lambda option: sizes[option].total if machine.device == "cpu" else sizes[option].device)


def at_depth(config: Config, depth: int) -> Config:
    """The same settings at another depth, its stacks of the size that fits it."""
    blocks = blocks_for_depth(depth)
    return config.replace(depth=depth_of_blocks(blocks), blocks=blocks, stack_size=default_stack_size(blocks))


def deepest(config: Config, place: tuple[int, str], policy: str, machine: Machine, **shape: int) -> int | None:
    """Layers of the deepest network that a (ZeRO stage, offload) and an activation policy can train, by bisection; None where none fits."""

    def possible(depth: int) -> bool:
        own = at_depth(config, depth)
        options = [leanest(Choice(*place, *given).apply(own), machine, **shape) for given in policies(own) if given[0] == policy]
        return any(fits(memory_of(option, machine.ranks, **shape), machine) for some in options for option in some)

    if not possible(MIN_DEPTH):
        return None
    low, high = MIN_DEPTH, MAX_DEPTH + 1  # low fits; high does not, or there is none
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return depth_of_blocks(blocks_for_depth(low))
