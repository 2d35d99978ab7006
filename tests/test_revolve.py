"""Schedules of inputs in few slots: against the least of all schedules, found by search, and as networks run by them; and the planner's choice."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_stack import C, images, stack_of
from torch import Tensor, nn

from deepscale.activations import Block, KeepAll, Policy, Revolve
from deepscale.bench.kept import Alive
from deepscale.config import Config
from deepscale.machine import Machine
from deepscale.models.block import TorchWork
from deepscale.models.observe import BlockObserver
from deepscale.models.revolve import Schedule, fewest_slots, repeats, runs, spans
from deepscale.models.stack import BlockStack
from deepscale.plan import settled
from deepscale.plan_choices import choose, preferred
from deepscale.plan_memory import fits, memory_of
from deepscale.plan_network import flops_of
from deepscale.plan_revolve import Share, best_slots, peak_of

# ---------------------------------------------------------------------------------------------------------------- schedule


def every_choice(units: range, most: int) -> list[tuple[int, ...]]:
    return [own for size in range(most + 1) for own in itertools.combinations(units, size)]


@functools.cache
def least(held: tuple[int, ...], unit: int, slots: int) -> int:
    """Runs of units until backward had the inputs of `unit` and all before it: every set of inputs is tried, dropped ones too, on every way there."""
    if unit < 0:
        return 0
    if unit in held:
        return least(tuple(own for own in held if own < unit), unit - 1, slots)
    found = []
    for begin in held:
        for kept in every_choice(range(unit), slots):
            if 0 in kept and all(own in held or own > begin for own in kept):
                found.append(unit - begin + least(kept, unit - 1, slots))
    return min(found)


def test_no_schedule_runs_fewer_segments() -> None:
    """Every chain of up to seven units, with every number of slots, beside all that could be done with them."""
    for units in range(1, 8):
        for slots in range(1, units + 1):
            expected = min(least(held, units - 1, slots) for held in every_choice(range(units), slots) if 0 in held)
            assert runs(units, slots) == sum(unit - begin for begin, unit in spans(units, slots)) == expected, (units, slots)


def test_the_number_of_runs_is_that_of_the_schedule() -> None:
    for units in (*range(1, 60), 1000):
        for slots in {1, 2, 3, 5, 10, fewest_slots(units, 1), fewest_slots(units, 2), units} if units < 100 else {14, 50, 999}:
            own = min(slots, units)
            assert runs(units, own) == sum(unit - begin for begin, unit in spans(units, own)), (units, own)


def test_no_more_inputs_are_held_than_there_are_slots() -> None:
    for units, slots in itertools.product(range(1, 40), range(1, 12)):
        schedule = Schedule(units, min(slots, units))
        for unit in reversed(range(units)):
            assert len(schedule.held) <= slots and schedule.get(unit) <= unit
        assert not schedule.held


def test_slots_grow_as_the_roots_of_the_chain() -> None:
    """So that no unit runs more than once, or twice, again: about sqrt(2n), or the cube root of 6n."""
    for units in (10, 1000, 100_000):
        assert fewest_slots(units, 0) == units
        assert fewest_slots(units, 1) == pytest.approx(math.sqrt(2 * units), abs=3)
        assert fewest_slots(units, 2) == pytest.approx((6 * units) ** (1 / 3), abs=3)
        for again in (0, 1, 2):
            slots = fewest_slots(units, again)
            assert repeats(units + 1, slots) == again + 1 and repeats(units + 1, slots - 1) > again + 1


# ------------------------------------------------------------------------------------------------------------------ stacks

SIZES = (3, 4, 1, 3)
POLICIES = [Revolve(segment, slots) for segment, slots in itertools.product((1, 2, 4), (1, 2, 3, 5, None))]


def chain(policy: Policy, sizes: Sequence[int] = SIZES, dropped: bool = False, **spec: Any) -> nn.Sequential:
    """Stacks of these sizes that follow each other, in float32."""
    rates = iter(torch.linspace(0.0, 0.6, sum(sizes)).tolist())
    stacks = [stack_of(n, rates=tuple(itertools.islice(rates, n)) if dropped else None, dtype=torch.float32, **spec) for n in sizes]
    return policy.apply(nn.Sequential(*stacks))


def passes(stacks: nn.Sequential, low: torch.dtype | None = None, observed: bool = False) -> list[Tensor]:
    """Outputs, gradients, BatchNorm's statistics and observers' numbers of two passes, the first one's backward after the second one's forward."""
    torch.manual_seed(5)
    for stack in stacks if observed else ():
        stack.observer = BlockObserver(stack.blocks, 4 * C, torch.device("cpu"))
    given = [images(2, C, 6, 5, seed=seed, dtype=next(stacks.parameters()).dtype).requires_grad_() for seed in (1, 2)]
    found = []
    for x in given:
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            found.append(stacks(x))
    for out in found:
        out.square().sum().backward()
    found = [*(out.detach() for out in found), *(x.grad for x in given), *(p.grad for p in stacks.parameters()), *stacks.buffers()]
    return [*found, *(own for stack in stacks if observed for own in stack.observer.statistics().values())]


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(("norm", "mode"), [*itertools.product(["layernorm", "batchnorm"], ["none", "images"]), ("layernorm", "blocks")])
def test_stacks_run_again_within_others_compute_the_same_bits(norm: str, mode: str, observed: bool, low: torch.dtype | None) -> None:
    def found(policy: Policy) -> list[Tensor]:
        stacks = chain(policy, dropped=mode != "none", norm=norm)
        for stack in stacks:
            stack.drop_whole = mode == "blocks"
        return passes(stacks, low, observed)

    expected = found(KeepAll())
    for policy in POLICIES:
        for ours, kept in zip(found(policy), expected, strict=True):
            assert torch.equal(ours, kept), policy


def test_what_is_held_at_a_time_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes after the forward pass to the byte, and the most of any moment at which a block's backward begins, but for gradients and weights."""
    begin, seen = TorchWork.backward, list[int]()

    def backward(work: TorchWork, *given: Any) -> Tensor:
        seen.append(alive.bytes)
        return begin(work, *given)

    monkeypatch.setattr(TorchWork, "backward", backward)
    most, sizes = {}, (4, 8, 4, 4)
    for policy in POLICIES:
        stacks, x = chain(policy, sizes, norm="none"), images(64, C, 12, 12, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        block = Block(stacks[0].spec, 64 * 144)
        with Alive([*stacks.parameters(), x]) as alive:
            out = stacks(x)
            kept = alive.bytes - out.nbytes
            out.sum().backward()
        assert kept == policy.kept(block, sizes) - block.input  # the first one is the caller's
        most[policy] = max(seen) - policy.kept(block, sizes) - policy.working(block, sizes)
        seen.clear()
    weights = sum(p.nbytes for p in stacks.parameters())
    for policy in POLICIES:  # with few units not every slot is taken while a segment runs again
        assert abs(most[policy] - most[POLICIES[0]]) <= 2 * block.input + 4 * weights, policy


def test_an_input_that_was_changed_is_an_error() -> None:
    stacks = chain(Revolve(2, 1))
    x = images(2, C, 6, 5, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    out = stacks(x)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_abandoned_pass_leaves_nothing() -> None:
    stacks, x = chain(Revolve(1, 4)), images(2, C, 6, 5, dtype=torch.float32).requires_grad_()
    with Alive([*stacks.parameters(), x]) as alive:
        out = stacks(x)
        assert alive.bytes > 4 * x.nbytes
        del out
        assert alive.bytes == 0


def test_stacks_by_themselves_and_in_another_order() -> None:
    """A pass that begins at another stack, and passes whose stacks take turns: as with everything kept."""
    expected, stacks = chain(KeepAll()), chain(Revolve(1, 2))
    for some in ((2, 3), (1,), (0, 1)):
        found = []
        for own in (expected, stacks):
            parts = [own[i] for i in some]
            first, second = (images(2, C, 6, 5, seed=seed, dtype=torch.float32) for seed in (1, 2))
            for part in parts:  # two passes, stack by stack
                first, second = part(first), part(second)
            (first - second).square().sum().backward()
            found.append([p.grad for part in parts for p in part.parameters()])
        for ours, kept in zip(*found, strict=True):
            assert torch.equal(ours, kept)


def test_a_tuple_of_slots_is_one_number_for_each_stage() -> None:
    tree = Revolve(1, (1, 3)).apply(nn.ModuleList([nn.Sequential(stack_of(2), stack_of(2)), nn.Sequential(nn.Identity(), stack_of(5))]))
    found = [module.keeping.chain for module in tree.modules() if isinstance(module, BlockStack)]
    assert [own.slots for own in found if own is not None] == [1, 1, 3] and found[0] is found[1]
    assert Revolve(1, (1, 3)).at(1) == Revolve(1, 3)
    with pytest.raises(ValueError, match="0 slots hold no input"):
        Revolve(2, 0)


# ----------------------------------------------------------------------------------------------------------------- planner


def test_the_stages_share_the_bytes_at_the_least_cost() -> None:
    """Against every number of slots of every stage, for every budget."""
    shares = [Share(7, 8, 30, 11.0, 3), Share(6, 4, 20, 10.5, 3), Share(9, 2, 15, 10.0, 3)]
    every = list(itertools.product(*(range(share.fewest, share.units + 1) for share in shares)))

    def cost(slots: tuple[int, ...]) -> float:
        return sum(share.flops * runs(share.units, own) for share, own in zip(shares, slots, strict=True))

    for budget in range(peak_of(shares, (3, 3, 3)), peak_of(shares, (7, 6, 9)) + 3):
        found = best_slots(shares, budget)
        assert peak_of(shares, found) <= budget
        assert cost(found) == min(cost(slots) for slots in every if peak_of(shares, slots) <= budget)
    assert best_slots(shares, 10) == (3, 3, 3)


def test_it_is_chosen_where_nothing_faster_fits() -> None:
    """With less and less memory of a CPU: it is never taken where another fits, always where it alone fits, and then runs more and more again."""
    asked = Config().replace(depth=10_001, width=8, patch_size=1, batch_size=64, engine="torch", kernel="native", device="cpu", eval_images=8)
    shape, again = {"channels": 3, "image_size": 32, "classes": 10}, []
    for gb in (40.0, 10.0, 2.0, 1.3, 1.1, 1.0, 0.95, 0.9, 0.85, 0.8, 0.3):
        machine = Machine("cpu", int(gb * 1e9), int(gb * 1e9), False, 1)
        settings = settled(asked, machine)
        found = choose(settings, machine, **shape)
        others = [choice.apply(settings) for choice in preferred(settings, machine) if choice.activations != "revolve"]
        faster = [other for other in others if fits(memory_of(other, 1, **shape), machine)]
        assert (found.engine.activations == "revolve") is not bool(faster)
        if not faster and fits(memory_of(found, 1, **shape), machine):
            again.append(flops_of(found, 1, **shape).again)
    assert len(again) > 2 and again == sorted(again) and again[0] < again[-1]
