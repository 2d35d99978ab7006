"""Elements of weights that ZeRO-3 gathers in one forward and backward pass: DeepSpeed's rules followed over the order of the modules.

Read in DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py). Every module's weights are gathered for its forward pass and again
for its backward pass, but for those that are still there: what is used again soon (`stage3_max_reuse_distance`), and what was there as the
weights of the modules after it were fetched ahead. Those are the last modules before forward turns into backward; of a deep network a few.
"""

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from deepscale.activations import Revolve, policy_of
from deepscale.config import Config, ModelConfig
from deepscale.depth import STAGES
from deepscale.engine_config import zero_section
from deepscale.models import registry
from deepscale.models.convnext import ConvNeXt, Convolution, Head, stack_blocks, stack_tensors
from deepscale.plan_counted import tensors_of

Tensors = tuple[int, ...]  # elements of each of a module's own tensors


@dataclass(frozen=True)
class Sizes:
    """Elements: how much is fetched ahead, how much may be there, how soon a use must come for which weights stay, and of tensors never cut up."""

    ahead: int
    live: int
    reuse: int
    persistent: int


def padded_elements(config: Config, ranks: int, channels: int, classes: int) -> int:
    """Elements of the network where every tensor is filled up to divide by the ranks."""
    return sum(_padded(n, ranks) for group in _groups(config, channels, classes) for module in group for n in module)


def _padded(elements: int, ranks: int) -> int:
    return -(-elements // ranks) * ranks


def gathered_elements(config: Config, ranks: int, channels: int, classes: int) -> int:
    """Elements gathered in one pass of one micro batch, every tensor filled up to divide by the ranks."""
    zero = zero_section(config)
    names = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
    groups = list(_groups(config, channels, classes))
    # A module is entered before those inside it, forward and backward; backward these come in the opposite order.
    forward: list[Tensors] = [(), *(module for group in groups for module in group)]
    numbers = iter(range(1, len(forward)))
    numbered = [[next(numbers) for _ in group] for group in groups]
    called = _called(config, [group[0] for group in numbered if len(group) == 1])
    backward = [0, *(i for group in reversed(numbered) for i in (group[0], *reversed(group[1:]), *called.get(group[0], ())))]
    return _follow(forward, [*range(len(forward)), *backward], Sizes(*(int(zero[f"stage3_{name}"]) for name in names)), ranks)


def _called(config: Config, stacks: Sequence[int]) -> dict[int, list[int]]:
    """By its number, the stacks that a stack's backward runs forward again."""
    if config.engine.activations != "revolve":
        return {}
    left = iter(stacks)
    called: dict[int, list[int]] = {}
    for s, sizes in enumerate(stack_blocks(config.model.stage_blocks, config.engine.stack_size)):
        numbers, policy = [next(left) for _ in sizes], policy_of(config).at(s)
        assert isinstance(policy, Revolve)
        called |= {number: [numbers[own] for own in found] for number, found in zip(numbers, policy.called(sizes), strict=True)}
    return called


def _groups(config: Config, channels: int, classes: int) -> Iterator[tuple[Tensors, ...]]:
    """The modules that forward calls, in order: each with its own tensors, and after it those inside it."""
    if config.model.model != "convnext":
        yield from ((own,) for own in tensors_of(config.model, registry.Images(channels, classes=classes)))
        return
    size = config.engine.stack_size
    stacks = iter(stack_tensors(config.model, size))
    first, *rest = _outside(dataclasses.replace(config.model, blocks=(1,) * STAGES), channels, classes)
    *downsamplings, head = rest
    yield first
    for s, sizes in enumerate(stack_blocks(config.model.stage_blocks, size)):
        if s:
            yield downsamplings[s - 1]
        yield from ((tuple(next(stacks)),) for _ in sizes)
    yield head


@functools.lru_cache
def _outside(model: ModelConfig, channels: int, classes: int) -> tuple[tuple[Tensors, ...], ...]:
    """Stem, downsamplings and head, from a network on the meta device."""
    with torch.device("meta"):
        network = ConvNeXt(model, classes=classes, channels=channels)
    return tuple(
        ((), *(tuple(p.numel() for p in inside.parameters(recurse=False)) for inside in module.children()))
        for module in network.modules()
        if isinstance(module, Convolution | Head)
    )


def _follow(modules: Sequence[Tensors], entered: Sequence[int], sizes: Sizes, ranks: int) -> int:
    """What is gathered while modules are entered in this order, by their numbers."""
    queue = deque((step, (module, i)) for step, module in enumerate(entered) for i in range(len(modules[module])))
    numel = {(m, i): n for m, tensors in enumerate(modules) for i, n in enumerate(tensors)}
    there = {tensor for tensor, n in numel.items() if n <= sizes.persistent}
    persistent, gathered, live, fetched_for = set(there), sum(_padded(numel[t], ranks) for t in there), 0, dict.fromkeys(numel, -1)

    def gather(tensors: Sequence[tuple[int, int]]) -> None:
        nonlocal gathered, live
        there.update(tensors)
        gathered += sum(_padded(numel[t], ranks) for t in tensors)
        live += sum(numel[t] for t in tensors)

    for step, module in enumerate(entered):
        own = [(module, i) for i in range(len(modules[module]))]
        gather([t for t in own if t not in there])
        left = sum(fetched_for[t] < step for t in own)
        while left and queue:  # they are here: nothing of them is to be fetched ahead
            use, tensor = queue.popleft()
            fetched_for[tensor] = use
            left -= 1
        most, ahead, amount = min(sizes.live - live, sizes.ahead), list[tuple[int, int]](), 0
        while queue and amount < most:
            use, tensor = queue.popleft()
            fetched_for[tensor] = max(fetched_for[tensor], use)
            if tensor not in there and tensor not in ahead:
                ahead.append(tensor)
                amount += numel[tensor]
        gather(ahead)
        kept = module in _soon(modules, entered, step + 1, sizes.reuse)
        freed = [t for t in own if not kept and t not in persistent and fetched_for[t] <= step + 1]
        there.difference_update(freed)
        live -= sum(numel[t] for t in freed)
    return gathered


def _soon(modules: Sequence[Tensors], entered: Sequence[int], step: int, reuse: int) -> Iterator[int]:
    """The modules entered from a step on, until `reuse` elements have passed."""
    passed = 0
    for module in itertools.islice(entered, step, None):
        if passed >= reuse:
            return
        yield module
        passed += sum(modules[module])
