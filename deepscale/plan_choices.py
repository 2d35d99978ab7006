"""What may be chosen to make a network fit: ZeRO stage, offload and activation policy, in the order of what they cost in time."""

import dataclasses
from dataclasses import dataclass

from deepscale import pipeline
from deepscale.activations import KINDS, POLICIES
from deepscale.config import AUTO, IN_SEGMENTS, REVERSIBLE_POLICIES, Config
from deepscale.depth import MAX_DEPTH, MIN_DEPTH, blocks_for_depth, depth_of_blocks
from deepscale.machine import Machine
from deepscale.models.convnext import default_stack_size, smallest_segment
from deepscale.plan_memory import Memory, memory_of
from deepscale.plan_network import data_ranks

FAST_SEGMENT = 4  # blocks recomputed together whose activations stay in a core's cache
FITS = 0.9  # of the memory that is free
# (ZeRO stage, offload) that can be worth their time: on one rank ZeRO saves nothing unless it offloads.
ALONE = ((0, "none"), (2, "cpu"), (3, "cpu"))
SEVERAL = ((1, "none"), (2, "none"), (3, "none"), (1, "cpu"), (2, "cpu"), (3, "cpu"))


@dataclass(frozen=True)
class Choice:
    """Where an engine's states rest, and what a forward pass leaves for backward. `segment` is None where no block is recomputed."""

    zero: int
    offload: str
    activations: str
    segment: int | None

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
    return [(stage, place) for place in ("none", "cpu") for stage in stages if offload in (AUTO, place) and (stage, place) != (0, "cpu")]


def policies(config: Config) -> list[tuple[str, int | None]]:
    """(activation policy, segment) of all that there is, the fastest first; a segment given by hand says whether blocks are recomputed."""
    engine, names = config.engine, list(REVERSIBLE_POLICIES if config.model.skip == "reversible" else POLICIES)
    if config.model.model != "convnext":
        return [("keep", None)]
    if engine.activations != AUTO:
        names = [engine.activations]
    elif engine.segment != AUTO:
        names = ["keep"] if engine.segment is None else ["recompute"]
    segments = [FAST_SEGMENT, smallest_segment(config.model.stage_blocks)] if engine.segment == AUTO else [engine.segment]
    return [(name, segment) for name in names for segment in (dict.fromkeys(segments) if name in IN_SEGMENTS else [None])]


def preferred(config: Config, machine: Machine) -> list[Choice]:
    """What the planner may take, the fastest first: recomputation costs less time than ZeRO-3's gathering, and offload more than both."""
    engine, cpu, order = config.engine, machine.device == "cpu", list(KINDS)
    worth = ALONE if data_ranks(config, machine.ranks) == 1 else SEVERAL
    choices = [Choice(*place, *policy) for place in placements(config) if engine.zero != AUTO or place in worth for policy in policies(config)]
    if cpu:  # there is nowhere else to offload to
        choices = [c for c in choices if engine.offload == "cpu" or c.offload == "none"]
        choices = [c for c in choices if engine.activations == "offload" or c.activations != "offload"]
    if config.model.skip == "reversible" and engine.activations == AUTO:  # which nobody types for speed
        choices = [c for c in choices if c.activations == "reconstruct"]
    return sorted(choices, key=lambda c: (c.offload == "cpu", c.zero == 3, order.index(c.activations), c.zero))


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether a step fits what is free, with a tenth left."""
    if machine.device == "cpu":
        return memory.total <= FITS * machine.host_bytes
    return memory.device <= FITS * machine.device_bytes and memory.host <= FITS * machine.host_bytes


def choose(config: Config, machine: Machine, **shape: int) -> Config:
    """The fastest choice that fits, else the smallest."""
    options = [choice.apply(config) for choice in preferred(config, machine)]
    sizes = {option: memory_of(option, machine.ranks, **shape) for option in options}
    fitting = next((option for option, memory in sizes.items() if fits(memory, machine)), None)
    return fitting or min(options, key=lambda option: sizes[option].total if machine.device == "cpu" else sizes[option].device)


def at_depth(config: Config, depth: int) -> Config:
    """The same settings at another depth, its stacks of the size that fits it."""
    blocks = blocks_for_depth(depth)
    return config.replace(depth=depth_of_blocks(blocks), blocks=blocks, stack_size=default_stack_size(blocks))


def deepest(config: Config, place: tuple[int, str], policy: str, machine: Machine, **shape: int) -> int | None:
    """Layers of the deepest network that a (ZeRO stage, offload) and an activation policy can train, by bisection; None where none fits."""

    def possible(depth: int) -> bool:
        own = at_depth(config, depth)
        options = [Choice(*place, name, segment).apply(own) for name, segment in policies(own) if name == policy]
        return any(fits(memory_of(option, machine.ranks, **shape), machine) for option in options)

    if not possible(MIN_DEPTH):
        return None
    low, high = MIN_DEPTH, MAX_DEPTH + 1  # low fits; high does not, or there is none
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return depth_of_blocks(blocks_for_depth(low))
