"""Policies: each against keeping everything, in what is computed, in the bytes it keeps and in the FLOPs it takes; and the host store by itself."""

import itertools
from typing import Any

import pytest
import torch
from test_stack import C, images, stack_of
from torch import Tensor, nn

from deepscale.activations import POLICIES, ROW_MEANS, Block, KeepAll, OffloadInputs, Policy, Recompute, Revolve, Selective, policy_of
from deepscale.bench.flops import counted_flops
from deepscale.bench.kept import Alive
from deepscale.config import ACTIVATION_NAMES, ACTIVATION_POLICIES, IN_SEGMENTS, NORM_NAMES, Config
from deepscale.engine import TorchEngine
from deepscale.loop import train_step
from deepscale.models.block import TorchWork
from deepscale.models.convnext import ConvNeXt
from deepscale.models.observe import BlockObserver
from deepscale.models.stack import BlockStack
from deepscale.world import World

OTHERS: list[Policy] = [Selective(), Recompute(1), Recompute(2), Recompute(9), OffloadInputs(1), OffloadInputs(2)]
OTHERS += [Revolve(1, slots) for slots in (1, 2, 3, 5)] + [Revolve(2, slots) for slots in (None, 1, 2)]
BLOCKS = 5
RATES = tuple(i / 10 for i in range(BLOCKS))


def test_the_table_holds_every_policy_of_the_setting() -> None:
    assert tuple(POLICIES) == ACTIVATION_POLICIES
    assert {name for name, kind in POLICIES.items() if issubclass(kind, Recompute)} == set(IN_SEGMENTS)
    found = [policy_of(Config().replace(activations=name, segment=3 if name in IN_SEGMENTS else None)) for name in POLICIES]
    assert found == [KeepAll(), Selective(), Recompute(3), OffloadInputs(3), Revolve(3)]
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


COMBINATIONS = list(itertools.product(ACTIVATION_NAMES, NORM_NAMES, ("identity", "none")))


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


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_every_policy_computes_the_same_bits_in_low_precision(low: torch.dtype, norm: str) -> None:
    """Under autocast: what is recomputed is recomputed in the branch's precision, from a stream kept in float32."""
    expected = passes(KeepAll(), torch.float32, low, norm=norm)
    for policy in OTHERS:
        for ours, kept in zip(passes(policy, torch.float32, low, norm=norm), expected, strict=True):
            assert torch.equal(ours, kept), policy


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_an_observer_sees_the_same_under_every_policy(low: torch.dtype | None) -> None:
    """All statistics of all blocks, and the values of an observed pass against those of one that nobody watches."""
    expected = passes(KeepAll(), torch.float32, low, observed=True, activation="relu")
    for policy in OTHERS:
        found = passes(policy, torch.float32, low, observed=True, activation="relu")
        for ours, kept in zip(found, expected, strict=True):
            assert torch.equal(ours, kept), policy
        for ours, unseen in zip(found, passes(policy, torch.float32, low, activation="relu"), strict=False):
            assert torch.equal(ours, unseen), policy


SMALL = {"patch_size": 4, "width": 4, "batch_size": 8, "depth": 26, "zero": 0, "offload": "none", "lr": 1e-2, "engine": "torch"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("accumulation", "norm"), [(1, "batchnorm"), (2, "batchnorm"), (2, "layernorm")])
def test_policies_train_alike(precision: str, accumulation: int, norm: str) -> None:
    """Three steps of the whole network with stochastic depth, an evaluation and an abandoned pass between: weights and statistics bit for bit."""
    settings = Config().replace(**SMALL, precision=precision, accumulation=accumulation, norm=norm, drop_path=0.3, layerscale_init=0.5)
    place = World(0, 1, 0, 1, torch.device("cpu"))
    trained = []
    for policy in (KeepAll(), Selective(), Recompute(2), OffloadInputs(2), Revolve(1), Revolve(2, 1)):
        model = policy.apply(ConvNeXt(settings.model, stack_size=3)).initialise(0)
        engine = TorchEngine(model, settings, place)
        torch.manual_seed(0)
        losses: list[Tensor] = []
        batch = images(8 // accumulation, 3, 32, 32, dtype=torch.float32), torch.arange(8 // accumulation)
        for _ in range(3):
            train_step(engine, itertools.repeat(batch), accumulation, place, lambda totals, seen=losses: seen.append(totals.clone()))
            with torch.random.fork_rng(), torch.no_grad():
                engine.forward(batch[0])
        trained.append([*losses, *model.state_dict().values()])
    for found in trained[1:]:
        for ours, kept in zip(found, trained[0], strict=True):
            assert torch.equal(ours, kept)


@pytest.mark.parametrize("policy", [KeepAll(), Selective(), Recompute(2), OffloadInputs(2), Revolve(2, 1)], ids=lambda policy: policy.name)
def test_a_second_backward_is_an_error_under_every_policy(policy: Policy) -> None:
    stack = policy.apply(stack_of(3))
    loss = stack(images(2, C, 5, 5)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward .* run the forward pass again"):
        loss.backward()


# -------------------------------------------------------------------------------------------------------------------- bytes

SHAPES: list[dict[str, Any]] = [
    {},
    {"norm": "rmsnorm", "kernel_size": 5},
    {"norm": "batchnorm", "gamma": "channel", "skip": "none"},
    {"norm": "none", "activation": "relu"},
]
BATCH, HIGH, WIDE = 3, 6, 5


def block_of(stack: BlockStack, rates: bool, low: bool) -> Block:
    return Block(stack.spec, BATCH * HIGH * WIDE, 4, 2 if low else 4, rates)


def alive_after_forward(policy: Policy, low: bool, rates: bool, **spec: Any) -> tuple[int, Policy, Block]:
    """Bytes that a stack's forward pass leaves, but for its output."""
    stack = policy.apply(stack_of(BLOCKS, rates=RATES if rates else None, dtype=torch.float32, **spec))
    x = images(BATCH, C, HIGH, WIDE, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        stack(x)  # what a stack makes once and for all, as its drop rates on the device, is there
    with Alive([*stack.parameters(), *stack.buffers(), x]) as alive, torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        out = stack(x)
        kept = alive.bytes - out.nbytes
        out.sum().backward()
    return kept, policy, block_of(stack, rates, low)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("rates", [False, True])
@pytest.mark.parametrize("spec", SHAPES, ids=lambda spec: spec.get("norm", "layernorm"))
def test_what_is_kept_is_the_formula_to_the_byte(spec: dict[str, Any], rates: bool, low: bool) -> None:
    """Counted by the tensors that are alive after a forward pass. The stack's own input is the caller's, and counted where it is copied."""
    for policy in (KeepAll(), *OTHERS):
        kept, _, block = alive_after_forward(policy, low, rates, **spec)
        own = 0 if isinstance(policy, OffloadInputs) else block.input
        assert kept == policy.kept(block, [BLOCKS]) + policy.host(block, [BLOCKS]) - own, policy


def alive_in_backward(policy: Policy, low: bool, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> tuple[int, Block]:
    """Bytes alive when the backward of the last of 6 blocks begins: all that is kept, and all that its segment has made anew."""
    stack, begin, seen = policy.apply(stack_of(6, dtype=torch.float32, **spec)), TorchWork.backward, []

    def backward(work: TorchWork, *given: Any) -> Tensor:
        seen.append(alive.bytes)
        return begin(work, *given)

    with monkeypatch.context() as patch, Alive([*stack.parameters(), *stack.buffers()]) as alive:
        patch.setattr(TorchWork, "backward", backward)
        x = images(BATCH, C, HIGH, WIDE, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            out = stack(x)
        del x
        out.sum().backward()
    return seen[0], block_of(stack, False, low)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_what_backward_makes_anew_is_the_formula_to_the_byte(norm: str, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More or less than keeping all takes at that point, where gradients and folded weights are the same."""
    base, block = alive_in_backward(KeepAll(), low, monkeypatch, norm=norm)
    base -= KeepAll().kept(block, [6])
    for policy in (Selective(), *map(Recompute, (1, 2, 3, 6)), *map(OffloadInputs, (1, 2, 3, 6))):
        found, _ = alive_in_backward(policy, low, monkeypatch, norm=norm)
        expected = policy.kept(block, [6]) + policy.host(block, [6]) + policy.working(block, [6])
        if isinstance(policy, Recompute) and norm in ROW_MEANS:
            expected += 4 * C  # the vector that row means are products with, once a stack
        if policy == OffloadInputs(6):
            expected -= block.input  # nothing is left to be fetched ahead
        assert found - base == expected, policy


# -------------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("spec", SHAPES, ids=lambda spec: spec.get("norm", "layernorm"))
def test_flops_are_the_formula_exactly(spec: dict[str, Any]) -> None:
    """Counted by torch, operator by operator, forward and backward."""
    for policy in (KeepAll(), *OTHERS):
        stack = policy.apply(stack_of(BLOCKS, dtype=torch.float32, **spec))
        x = images(BATCH, C, HIGH, WIDE, dtype=torch.float32).requires_grad_()
        counted = counted_flops(lambda stack=stack, x=x: stack(x).sum().backward())
        assert counted == policy.flops(block_of(stack, False, False), [BLOCKS]), policy
