"""Policies: each against keeping everything, in what is computed, in the bytes it keeps and in the FLOPs it takes; and the host store by itself."""

import itertools
from typing import Any

import pytest
import torch
from test_stack import C, images, stack_of
from torch import Tensor, nn

from deepscale.activations import POLICIES, KeepAll, OffloadInputs, Policy, Recompute, Selective, policy_of
from deepscale.config import ACTIVATION_NAMES, ACTIVATION_POLICIES, IN_SEGMENTS, NORM_NAMES, SKIP_NAMES, Config
from deepscale.models.observe import BlockObserver
from deepscale.models.stack import BlockStack

OTHERS: list[Policy] = [Selective(), Recompute(1), Recompute(2), Recompute(9), OffloadInputs(1), OffloadInputs(2)]
BLOCKS = 5
RATES = tuple(i / 10 for i in range(BLOCKS))


def test_the_table_holds_every_policy_of_the_setting() -> None:
    assert tuple(POLICIES) == ACTIVATION_POLICIES
    assert {name for name, kind in POLICIES.items() if issubclass(kind, Recompute)} == set(IN_SEGMENTS)
    found = [policy_of(Config().replace(activations=name, segment=3 if name in IN_SEGMENTS else None)) for name in POLICIES]
    assert found == [KeepAll(), Selective(), Recompute(3), OffloadInputs(3)]
    with pytest.raises(ValueError, match="no segment"):
        Recompute(0)


def test_a_policy_reaches_every_stack_of_a_tree_and_nothing_else() -> None:
    tree = nn.Sequential(nn.Conv2d(3, C, 1), nn.ModuleDict({"a": stack_of(2), "b": nn.Sequential(stack_of(1))})["a"], stack_of(3))
    before = {name: value.clone() for name, value in tree.state_dict().items()}
    assert Recompute(2).apply(tree) is tree
    assert {m.keeping.segment for m in tree.modules() if isinstance(m, BlockStack)} == {2}
    assert not hasattr(tree[0], "keeping")
    assert all(torch.equal(value, before[name]) for name, value in tree.state_dict().items())
    assert BlockStack.keeping == KeepAll().keeping() == KeepAll().apply(tree)[2].keeping


# ----------------------------------------------------------------------------------------------------------------- equality


def passes(policy: Policy, dtype: torch.dtype, low: torch.dtype | None = None, observed: bool = False, **spec: Any) -> list[Tensor]:
    """Output, gradients of the input and all parameters, BatchNorm's statistics and an observer's sums, of two passes one after the other."""
    stack = policy.apply(stack_of(BLOCKS, rates=RATES, dtype=dtype, **spec))
    if observed:
        stack.observer = BlockObserver(BLOCKS, 4 * C, torch.device("cpu"))
    torch.manual_seed(5)
    found = []
    for seed in (1, 2):
        x = images(3, C, 6, 5, seed=seed, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            out = stack(x)
        out.square().sum().backward()
        found += [out.detach(), x.grad]
    found += [p.grad for p in stack.parameters()] + [b.clone() for b in stack.buffers()]
    if stack.observer is not None:
        found += stack.observer.statistics().values()
    return found


COMBINATIONS = list(itertools.product(ACTIVATION_NAMES, NORM_NAMES, SKIP_NAMES))


@pytest.mark.parametrize(("activation", "norm", "skip"), COMBINATIONS)
def test_every_policy_computes_the_same_bits(activation: str, norm: str, skip: str) -> None:
    """float32 and float64, under stochastic depth: the same operations on the same numbers."""
    spec = {
        "activation": activation,
        "norm": norm,
        "skip": skip,
        "gamma": ("none", "scalar", "channel")[COMBINATIONS.index((activation, norm, skip)) % 3],
    }
    for dtype in (torch.float32, torch.float64):
        expected = passes(KeepAll(), dtype, **spec)
        for policy in OTHERS:
            for ours, kept in zip(passes(policy, dtype, **spec), expected, strict=True):
                assert torch.equal(ours, kept), policy
