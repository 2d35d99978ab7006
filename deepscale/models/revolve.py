"""Inputs of segments that rest in few slots, the others computed again from the nearest one before them (Revolve).

Backward wants the inputs of a chain's n segments from the last to the first. c of them are held; to get another, the chain runs forward from the
nearest one before it, and on the way holds some in the slots that have become free. Where they lie follows from binomial numbers, and no other
places need fewer runs of segments (Griewank and Walther 2000, doi:10.1145/347837.347846). That no segment runs forward more than r times, the first
pass counted, takes C(c + r, r) > n: all inputs for r = 1, about sqrt(2n) of them for r = 2, the cube root of 6n for r = 3.

r = 2 is recomputation on two levels, of segments and of their inputs: n blocks in segments of s take sqrt(2n / s) inputs, and all that the
backward of s blocks needs, which together grow as the cube root of n. A chain is all stacks of a stage. What lies in another stack than the one
whose backward runs is computed by calling that stack, so that hooks which gather its weights (ZeRO-3) see it.
"""

import itertools
import math
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepscale.models.stack import BlockStack
    from deepscale.models.work import Run

# ---------------------------------------------------------------------------------------------------------------- schedule


def repeats(units: int, slots: int) -> int:
    """r: how often a unit runs forward at most until backward has had all inputs, the last one's from the first run."""
    r = 0
    while math.comb(slots + r, r) < units:
        r += 1
    return r


def runs(units: int, slots: int) -> int:
    """Forward runs of units again, after a first one that kept `slots` inputs, until backward had every input; the least that there is."""
    units += 1  # what follows the chain is as good as a unit, to whose input the first run leads
    r = repeats(units, slots)
    return r * units - math.comb(slots + r, r - 1) - (units - 1) if r else 0


def fewest_slots(units: int, again: int) -> int:
    """Slots with which no unit runs forward more than `again` times after the first."""
    return bisect_left(range(1, units), units + 1, key=lambda slots: math.comb(slots + again + 1, again + 1)) + 1


def places(units: int, slots: int) -> Iterator[int]:
    """The units whose inputs are held on the way from the first, which is one of them, to the last."""
    place = 0
    yield place
    while slots > 1 and units > 2:
        r = repeats(units, slots)
        step = min(math.comb(slots + r - 1, slots), units - math.comb(slots + r - 2, slots - 1))
        place, units, slots = place + step, units - step, slots - 1
        yield place


class Schedule:
    """Which units' inputs are held, from after the first run on."""

    def __init__(self, units: int, slots: int) -> None:
        self.slots = slots
        self.held = list(places(units + 1, slots))

    def get(self, unit: int) -> int:
        """The unit to run forward from for the input of `unit`, which is wanted now, the last one first; what is then held lies before it."""
        while self.held[-1] > unit:  # of units that were not run
            self.held.pop()
        begin = self.held[-1]
        if begin < unit:
            free = self.slots - len(self.held)
            self.held += [begin + place for place in list(places(unit - begin + 1, free + 1))[1:]]
        else:
            self.held.pop()
        return begin


def spans(units: int, slots: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the units that run forward again for each input that backward wants, in order."""
    schedule = Schedule(units, slots)
    for unit in reversed(range(units)):
        yield schedule.get(unit), unit


# ------------------------------------------------------------------------------------------------------------------ stacks


class Chain:
    """Stacks that follow each other, in segments that end with a stack, and the slots for their inputs."""

    def __init__(self, stacks: Sequence["BlockStack"], segment: int, slots: int) -> None:
        self.stacks, self.segment = tuple(stacks), segment
        *self.firsts, self.units = itertools.accumulate((-(-stack.blocks // segment) for stack in stacks), initial=0)
        self.slots = min(slots, self.units)
        self.last: weakref.ref[Pass] | None = None

    def enter(self, stack: "BlockStack", run: "Run", x: Tensor) -> "SomeInputs":
        """Where a stack's forward pass puts the inputs of its segments. A pass goes on where its last stack's output comes in."""
        own = self.stacks.index(stack)
        entered = None if self.last is None else self.last()
        if entered is None or not entered.goes_on(own, x):
            entered = Pass(self, own)
            self.last = weakref.ref(entered)
        entered.runs[own] = run
        return SomeInputs(entered, own)


class Pass:
    """One forward pass through a chain from stack `begin` on: the inputs that are held, and how each stack ran."""

    def __init__(self, chain: Chain, begin: int) -> None:
        self.chain, self.first = chain, chain.firsts[begin]
        self.schedule = Schedule(chain.units - self.first, chain.slots)
        self.wanted = set(self.schedule.held)
        self.held: dict[int, tuple[Tensor, int]] = {}
        self.runs: dict[int, Run] = {}
        self.end = 0  # address of the last stack's output

    def goes_on(self, own: int, x: Tensor) -> bool:
        """Whether x, which comes into a stack, is the output of the one before it in this pass."""
        return own not in self.runs and own - 1 in self.runs and self.end == x.data_ptr()

    def reached(self, unit: int, x: Tensor) -> None:
        """Holds x, if the schedule does; without its history, which would hold this pass for good."""
        if unit - self.first in self.wanted:
            self.held[unit] = (x.detach(), x._version)

    def get(self, own: int, unit: int, work: Any) -> Tensor:
        """The input of a unit of stack `own`, whose blocks `work` computes."""
        while next(reversed(self.held)) > unit:
            self.held.popitem()
        begin = self.schedule.get(unit - self.first) + self.first
        x, version = self.held[begin] if begin < unit else self.held.pop(begin)
        if x._version != version:
            raise RuntimeError("the input of recomputed blocks, which backward needs, has been modified by an inplace operation")
        self.wanted = set(self.schedule.held)
        firsts = self.chain.firsts
        for at in range(bisect_right(firsts, begin) - 1, own):
            stack = self.chain.stacks[at]
            size = min(unit, firsts[at + 1]) - firsts[at]
            x = stack(x, again=partial(self._again, at, max(begin - firsts[at], 0), size))
        return self._forward(own, max(begin - firsts[own], 0), unit - firsts[own], x, work, 0)

    def _again(self, at: int, begin: int, end: int, stack: "BlockStack", x: Tensor) -> Tensor:
        """Segments `begin` ... `end` - 1 of another stack, whose weights are whole while it is called."""
        first = begin * self.chain.segment
        blocks = slice(first, end * self.chain.segment)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            named = {name: value[blocks] for name, value in stack.stacked().items()}
            _, work = self.runs[at].part(blocks).begin(named, x.dtype, x, None)
            return self._forward(at, begin, end, x, work, first)

    def _forward(self, at: int, begin: int, end: int, x: Tensor, work: Any, first: int) -> Tensor:
        """Segments `begin` ... `end` - 1 of stack `at` by what computes its blocks from `first` on."""
        segment, passing = self.chain.segment, self.runs[at].passing
        for i in range(begin * segment, min(end * segment, self.chain.stacks[at].blocks)):
            if i % segment == 0:
                self.reached(self.chain.firsts[at] + i // segment, x)
            if passing is None or passing[i]:
                x = work.forward(x, i - first)
        return x


class SomeInputs:
    """The inputs of one stack's segments in a pass (stack.Inputs)."""

    all_stay = False

    def __init__(self, entered: Pass, own: int) -> None:
        self.entered, self.own, self.segment = entered, own, entered.chain.segment

    def put(self, unit: int, x: Tensor) -> None:
        """Of the stack's segments each, in order."""
        self.entered.reached(self.entered.chain.firsts[self.own] + unit, x)

    def ends(self, x: Tensor) -> None:
        """The stack's output."""
        self.entered.end = x.data_ptr()

    def take(self, unit: int, work: Any) -> Tensor:
        """Of the stack's segments each, the last one first."""
        return self.entered.get(self.own, self.entered.chain.firsts[self.own] + unit, work)
