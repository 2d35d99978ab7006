"""The schedule of `--activations revolve` for the memory that there is: segments, and slots for their inputs, that run the fewest FLOPs again.

Of every stage as many inputs are held, forward and backward, as it has slots. Backward takes the stages from the last to the first, so that the slots
of the stages up to one, and what a segment of that one makes anew, are what must fit at a time. Within a stage the schedule is the best there is
(models/revolve.py); what is chosen here is how the stages share the bytes, for each of `SEGMENTS`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepscale.activations import Recompute, Revolve, policy_of
from deepscale.config import AUTO, Config
from deepscale.machine import Machine
from deepscale.models.revolve import fewest_slots, runs
from deepscale.plan_memory import fits, memory_of
from deepscale.plan_network import Stage, images_of, needs_of, stages_of

SEGMENTS = (1, 2, 4, 8, 16)
AGAIN = 2  # most runs forward of a block beside that of its segment: more saves little, since then a segment takes more than the slots
POINTS = 64  # numbers of slots that are tried beyond those of two levels
STEPS = 6  # of the bisection for the bytes that slots may take


@dataclass(frozen=True)
class Share:
    """A stage: its segments, bytes of an input, what else its backward takes at a time, FLOPs of a segment forward, fewest slots."""

    units: int
    input: int
    work: int
    flops: float
    fewest: int


def scheduled(config: Config, machine: Machine, **shape: int) -> Config:
    """The configuration with the segment and slots of its schedule, if those are open: of all that fit the fewest FLOPs, else the fewest bytes."""
    if not _is_open(config):
        return config
    shares = [_shares(own, machine.ranks, shape) for own in _in_segments(config)]
    found = [_with_slots(own, machine, shape, some) for own, some in zip(_in_segments(config), shares, strict=True)]
    sizes = [memory_of(settings, machine.ranks, **shape) for settings in found]
    fitting = [(settings, own) for settings, memory, own in zip(found, sizes, shares, strict=True) if fits(memory, machine)]
    if not fitting:
        return min(zip(found, sizes, strict=True), key=lambda pair: pair[1].total if machine.device == "cpu" else pair[1].device)[0]
    return min(fitting, key=lambda pair: _again(pair[0], pair[1], machine.ranks, shape))[0]


def leanest(config: Config, machine: Machine, **shape: int) -> list[Config]:
    """The configuration with the fewest slots that are considered, in every segment; itself, if its schedule is not open."""
    if not _is_open(config):
        return [config]
    return [_with_fewest(own, _shares(own, machine.ranks, shape)) for own in _in_segments(config)]


def _is_open(config: Config) -> bool:
    return config.engine.activations == "revolve" and AUTO in (config.engine.segment, config.engine.slots)


def _in_segments(config: Config) -> list[Config]:
    return [config.replace(segment=segment) for segment in SEGMENTS] if config.engine.segment == AUTO else [config]


def _with_fewest(config: Config, shares: Sequence[Share]) -> Config:
    return config.replace(slots=tuple(share.fewest for share in shares)) if config.engine.slots == AUTO else config


def _with_slots(config: Config, machine: Machine, shape: dict[str, int], shares: Sequence[Share]) -> Config:
    """The configuration, in segments that are given, with slots."""
    if config.engine.slots != AUTO:
        return config
    fewest = [share.fewest for share in shares]
    best = _with_fewest(config, shares)
    low, high = peak_of(shares, fewest), peak_of(shares, [share.units for share in shares])
    for step in range(STEPS if fits(memory_of(best, machine.ranks, **shape), machine) else 0):
        budget = (low + high) // 2 if step else high
        settings = config.replace(slots=best_slots(shares, budget))
        if fits(memory_of(settings, machine.ranks, **shape), machine):
            best, low = settings, budget
        else:
            high = budget
        if low == high:
            break
    return best


def _shares(config: Config, ranks: int, shape: dict[str, int]) -> list[Share]:
    images = images_of(config, ranks, **shape)
    stages = stages_of(config, images)
    needs = needs_of(config.replace(activations="recompute", slots=None), stages, images)
    return shares_of(stages, int(config.engine.segment or 1), [need.segment + need.work for need in needs])


def shares_of(stages: Sequence[Stage], segment: int, work: Sequence[int]) -> list[Share]:
    """The stages in segments, with what else their backward takes."""
    shares = []
    for stage, own in zip(stages, work, strict=True):
        units = Recompute(segment).segments(stage.stacks)
        shares.append(Share(units, stage.block.input, own, stage.block.forward * sum(stage.stacks) / units, fewest_slots(units, AGAIN)))
    return shares


def peak_of(shares: Sequence[Share], slots: Sequence[int]) -> int:
    """Bytes that these slots and the work on a stage take at a time."""
    held = 0
    return max((held := held + share.input * own) + share.work for share, own in zip(shares, slots, strict=True))


def best_slots(shares: Sequence[Share], budget: int) -> tuple[int, ...]:
    """Slots of each stage whose peak is within so many bytes, and that run the fewest FLOPs again; the fewest that there are where none is.

    By dynamic programming over stages and bytes: what stages up to one cost at least, within so many. Then what is left is filled.
    """
    fewest, grain = tuple(share.fewest for share in shares), math.gcd(*(share.input for share in shares))
    if peak_of(shares, fewest) >= budget or peak_of(shares, [share.units for share in shares]) <= budget:
        return fewest if peak_of(shares, fewest) >= budget else tuple(share.units for share in shares)
    least, chosen = torch.zeros(1, dtype=torch.float64), []
    for share in shares:
        size, room = share.input // grain, (budget - share.work) // grain
        before = torch.cat([least, least[-1:].expand(max(0, room + 1 - len(least)))])[: room + 1]
        least, slots = torch.full((room + 1,), math.inf, dtype=torch.float64), torch.zeros(room + 1, dtype=torch.int64)
        for own in _candidates(share):
            if own * size > room:
                break
            cost, rest = before[: room + 1 - own * size] + share.flops * runs(share.units, own), least[own * size :]
            slots[own * size :][cost < rest] = own
            torch.minimum(cost, rest, out=rest)
        chosen.append((size, slots))
    taken, room = list[int](), len(least) - 1
    for size, slots in reversed(chosen):
        room = min(room, len(slots) - 1)
        taken.insert(0, int(slots[room]))
        room -= size * taken[0]
    return _filled(shares, taken, budget)


def _candidates(share: Share) -> list[int]:
    """Numbers of slots: all with which blocks run forward more than once again, and then, where every slot saves one run, `POINTS`."""
    two = fewest_slots(share.units, 1)
    return sorted({*range(share.fewest, two), *(two + (share.units - two) * i // POINTS for i in range(POINTS + 1))})


def _filled(shares: Sequence[Share], slots: list[int], budget: int) -> tuple[int, ...]:
    """As many more slots as there is room for, from the last stage on, whose inputs are the smallest."""
    for s in reversed(range(len(shares))):
        left = budget - max(peak_of(shares[: i + 1], slots[: i + 1]) for i in range(s, len(shares)))
        slots[s] = min(shares[s].units, slots[s] + left // shares[s].input)
    return tuple(slots)


def _again(config: Config, shares: Sequence[Share], ranks: int, shape: dict[str, int]) -> float:
    """FLOPs that backward computes again, of segments of equal size."""
    policy, total, stages = policy_of(config), 0.0, stages_of(config, images_of(config, ranks, **shape))
    for s, (stage, share) in enumerate(zip(stages, shares, strict=True)):
        own = policy.at(s)
        assert isinstance(own, Revolve)
        total += Recompute.again(own, stage.block, stage.stacks) + share.flops * runs(share.units, own.slots_of(stage.stacks))
    return total
