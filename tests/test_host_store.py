"""The store of offloaded inputs: buffers are used again, passes may be abandoned or overlap, and what comes back is what was put."""

import itertools
from collections.abc import Callable

import pytest
import torch
from test_stack import C, images, stack_of
from torch import Tensor

from deepscale.activations import KeepAll, OffloadInputs, Policy
from deepscale.host_store import HostStore
from deepscale.models.block import TorchWork
from deepscale.models.stack import BlockStack

BLOCKS, SEGMENT = 5, 2
INPUT = 2 * C * 6 * 5 * 8  # bytes of a kept input, float64; a pass keeps three


def offloading(policy: Policy | None = None) -> tuple[BlockStack, HostStore]:
    stack = (policy or OffloadInputs(SEGMENT)).apply(stack_of(BLOCKS))
    return stack, stack.keeping.store  # type: ignore[return-value]


def x_of(seed: int, batch: int = 2) -> Tensor:
    return images(batch, C, 6, 5, seed=seed).contiguous(memory_format=torch.channels_last).requires_grad_()


def gradients(stack: BlockStack, *order: int) -> list[Tensor]:
    """Two forward passes, then their backward passes in this order."""
    inputs = [x_of(1), x_of(2, batch=3)]
    losses = [stack(x).square().sum() for x in inputs]
    for i in order:
        losses[i].backward()
    found = [*(x.grad for x in inputs), *(p.grad for p in stack.parameters())]
    stack.zero_grad()
    return found  # type: ignore[return-value]


def test_what_is_got_is_what_was_put_in_memory_of_its_own() -> None:
    store = HostStore()
    put = [x_of(seed).detach() for seed in (1, 2)]
    resting = [store.put(x) for x in put]
    copies = [x.clone() for x in put]
    for x in put:
        x.zero_()
    for i in (1, 0):
        found = store.get(resting[i])
        assert torch.equal(found, copies[i]) and found.stride() == copies[i].stride()
        assert found.data_ptr() != resting[i].buffer.data_ptr()


def test_getting_one_begins_to_fetch_the_one_before() -> None:
    store = HostStore()
    first, abandoned, last = (store.put(x_of(seed)) for seed in (1, 2, 3))
    del abandoned
    store.get(last)
    assert first.fetched is None  # between them was one that nobody wants any more
    second = store.put(x_of(4))
    third = store.put(x_of(5))
    store.get(third)
    assert torch.equal(second.fetched, x_of(4))
    store.get(second)
    assert second.fetched is None  # handed over, not held


def test_buffers_are_used_again_from_step_to_step() -> None:
    stack, store = offloading()
    for seed in range(4):
        stack(x_of(seed)).sum().backward()
        assert store.bytes == 3 * INPUT
        assert sum(map(len, store.free.values())) == 3


def test_a_pass_without_gradients_puts_nothing() -> None:
    stack, store = offloading()
    with torch.no_grad():
        stack(x_of(1))
    stack.eval()(x_of(1)).detach()
    assert store.bytes == 3 * INPUT  # a forward pass of evaluation with gradients on is one like any other ...
    assert sum(map(len, store.free.values())) == 3  # ... and has left its buffers


def failing(real: Callable[..., Tensor], time: int) -> Callable[..., Tensor]:
    """A function that does what the real one does, but for the so many-th time."""
    times = itertools.count(1)

    def fail(*given: object) -> Tensor:
        if next(times) == time:
            raise MemoryError
        return real(*given)

    return fail


def test_an_abandoned_pass_gives_its_buffers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward without backward; and an exception within forward, and within backward. The next step is as ever."""
    expected = gradients(offloading(KeepAll())[0], 1, 0)
    stack, store = offloading()
    stack(x_of(1))
    assert sum(map(len, store.free.values())) == 3
    for name in ("output", "backward"):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(TorchWork, name, failing(getattr(TorchWork, name), 4))
            stack(x_of(1)).sum().backward()
        stack.zero_grad()
        assert sum(map(len, store.free.values())) == 3, name
        assert store.bytes == 3 * INPUT
    for ours, kept in zip(gradients(stack, 1, 0), expected, strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_two_passes_may_be_open_at_once(order: tuple[int, int]) -> None:
    """Of different batches, backward in either order, twice: gradients as those of keeping all; as many buffers as both need."""
    expected = gradients(offloading(KeepAll())[0], *order)
    stack, store = offloading()
    for _ in range(2):
        for ours, kept in zip(gradients(stack, *order), expected, strict=True):
            assert torch.equal(ours, kept)
        assert store.bytes == 3 * INPUT + 3 * INPUT * 3 // 2


def test_the_stacks_of_a_model_share_a_store() -> None:
    model = OffloadInputs(1).apply(torch.nn.Sequential(stack_of(2), stack_of(3)))
    store = model[0].keeping.store
    model(x_of(1)).sum().backward()
    assert model[1].keeping.store is store
    assert store.bytes == 5 * INPUT
