"""Stochastic depth of whole blocks: what is dropped is computed neither forward nor backward, and all else is the plain network's."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deepscale import ops
from deepscale.activations import KeepAll, OffloadInputs, Policy, Recompute, Reconstruct, Revolve, Selective
from deepscale.config import Config, ModelConfig
from deepscale.errors import UsageError
from deepscale.gradflow.health import NEVER, Thresholds, verdict
from deepscale.models.convnext import ConvNeXt, block_spec, cross_entropy, use_kernel
from deepscale.models.naming import load_plain, to_plain
from deepscale.models.observe import BlockObserver
from deepscale.models.reference import PlainConvNeXt
from deepscale.models.stack import BlockStack
from deepscale.ops.op import missing_compiler
from tests.flows import made_up_flow

BLOCKS = (2, 3, 8, 2)
POLICIES: tuple[Policy, ...] = (KeepAll(), Selective(), Recompute(1), Recompute(3), OffloadInputs(2), Revolve(2, 3))


def network(policy: Policy = POLICIES[0], kernel: str = "torch", **settings: Any) -> tuple[ConvNeXt, PlainConvNeXt]:
    """A stacked and a plain network of the same random values, in float64."""
    if kernel == "native" and (reason := ops.ensure_ops(["block"], print)["block"]):
        assert missing_compiler(), reason
        pytest.skip(reason)
    model = ModelConfig(blocks=BLOCKS, patch_size=2, **{"width": 4, "drop_path": 0.8, "drop_path_mode": "batch", "layerscale_init": 0.5, **settings})
    plain = PlainConvNeXt(model).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.3)
    stacked = policy.apply(ConvNeXt(model, stack_size=3)).double()
    load_plain(stacked, plain.state_dict())
    use_kernel(stacked, kernel)
    return stacked, plain


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(3)


def given(draws: Iterator[float]) -> Callable[..., Tensor]:
    def rand(*shape: Any, device: Any = None) -> Tensor:
        assert device == "cpu"
        return torch.tensor([next(draws) for _ in range(shape[0])]) if isinstance(shape[0], int) else torch.tensor(next(draws))

    return rand


ADDING: tuple[dict[str, Any], ...] = ({}, {"skip": "deepnorm", "layerscale_init": None, "norm": "none"})
COUPLED = {"skip": "reversible", "width": 8}
CASES = [*itertools.product(ADDING, POLICIES), (COUPLED, KeepAll()), (COUPLED, Reconstruct())]


@pytest.mark.parametrize("kernel", ["torch", "native"])
@pytest.mark.parametrize(("settings", "policy"), CASES, ids=str)
def test_stacked_is_plain_given_the_same_draws(settings: dict[str, Any], policy: Policy, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and all gradients; a dropped block's are exactly 0 here and absent there. Blocks are dropped at the ends of stacks and inside."""
    stacked, plain = network(policy, kernel, **settings)
    draws = torch.rand(sum(BLOCKS), generator=torch.Generator().manual_seed(4)).tolist()
    rates = [0.8 * i / 14 for i in range(15)]
    dropped = [draw < rate for draw, rate in zip(draws, rates, strict=True)]
    assert 4 <= sum(dropped) <= 9
    images, labels = batch()
    monkeypatch.setattr(torch, "rand", given(iter(draws)))
    ours = stacked(images)
    monkeypatch.setattr(torch, "rand", given(iter(draws[1:])))  # the first block's rate is 0: the plain one draws nothing for it
    expected = plain(images)
    assert (ours - expected).norm() <= 1e-11 * expected.norm()
    cross_entropy(ours, labels).backward()
    cross_entropy(expected, labels).backward()
    own = to_plain(stacked, {name: p.grad for name, p in stacked.named_parameters()})
    zero = {f"stages.{s}.blocks.{b}." for (s, b), gone in zip(((s, b) for s in range(4) for b in range(BLOCKS[s])), dropped, strict=True) if gone}
    largest = max(p.grad.norm() for p in plain.parameters() if p.grad is not None)
    for name, parameter in plain.named_parameters():
        if any(name.startswith(block) for block in zero):
            assert parameter.grad is None and not own[name].any(), name
        else:
            assert (own[name] - parameter.grad).norm() <= 1e-9 * max(parameter.grad.norm(), 1e-3 * largest), name


def stack_of(rates: tuple[float, ...], policy: Policy = POLICIES[0]) -> BlockStack:
    stack = policy.apply(BlockStack(block_spec(ModelConfig(width=4, layerscale_init=0.5), 4), 0, len(rates), rates, drop_whole=True).double())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.3)
    return stack


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_dropped_block_is_not_computed(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs of forward and backward of six blocks of which two are dropped, a whole segment of two, against those of four."""
    counted = []
    for draws in ([0.9, 0.9, 0.1, 0.1, 0.9, 0.9], [0.9] * 4):
        monkeypatch.setattr(torch, "rand", given(iter(draws)))
        stack = stack_of((0.5,) * len(draws), policy)
        folding = FlopCounterMode(display=False)
        with folding:
            stack(torch.randn(2, 4, 6, 6, dtype=torch.float64).requires_grad_()).sum().backward()
        matrices = sum(flops for function, flops in folding.get_flop_counts()["Global"].items() if "bmm" not in str(function))
        counted.append(matrices)  # without what is folded once for all blocks of a stack
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("policy", (*POLICIES, Revolve(1, 2)), ids=str)
def test_all_blocks_dropped_is_the_identity(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", given(itertools.repeat(0.0)))
    stack = stack_of((0.5, 0.5, 0.5), policy)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64).requires_grad_()
    out = stack(x)
    assert torch.equal(out, x)
    out.backward(2 * torch.ones_like(out))
    assert torch.equal(x.grad, 2 * torch.ones_like(x))
    assert all(p.grad is not None and not p.grad.any() for p in stack.parameters())


@pytest.mark.parametrize("kernel", ["torch", "native"])
@pytest.mark.parametrize("policy", (*POLICIES, Revolve(1, 2)), ids=str)
@pytest.mark.parametrize("dropped", [(0,), (4,), (0, 1), (3, 4), (1, 3), (0, 1, 2, 3, 4)], ids=str)
def test_an_observer_sees_every_block(dropped: tuple[int, ...], policy: Policy, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradient of five blocks, a dropped one's those of the block before and after it, against a chain of single blocks under autograd."""
    if kernel == "native" and (reason := ops.ensure_ops(["block"], print)["block"]):
        assert missing_compiler(), reason
        pytest.skip(reason)
    draws = [0.0 if i in dropped else 0.9 for i in range(5)]
    monkeypatch.setattr(torch, "rand", given(iter(draws)))
    stack = stack_of((0.5,) * 5, policy)
    stack.kernel, stack.observer = kernel, BlockObserver(5, 16, torch.device("cpu"))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    stack(x.clone().requires_grad_()).pow(3).sum().backward()
    outputs: list[Tensor] = []
    x.requires_grad_()
    for i in range(5):
        if i not in dropped:
            one = BlockStack(stack.spec, 0, 1).double()
            with torch.no_grad():
                for name, parameter in one.named_parameters():
                    parameter.copy_(getattr(stack, name)[i : i + 1])
                one.gamma.mul_(2.0)  # a kept block's branch is scaled by the chance to be kept
            x = one(x)
        x = x * 1.0
        x.retain_grad()
        outputs.append(x)
    x.pow(3).sum().backward()
    found = stack.observer.statistics()
    for name, expected in (
        ("output_mean", [o.mean() for o in outputs]),
        ("output_std", [o.std(correction=0) for o in outputs]),
        ("output_grad_l2", [o.grad.norm() for o in outputs]),
    ):
        torch.testing.assert_close(found[name], torch.stack(expected).detach(), rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def test_what_is_dropped_follows_the_rate() -> None:
    """1,000 draws of a stack: each block is left out as often as its rate says, within 5 sigma, and a kept one is scaled by 1 / (1 - rate)."""
    rates = (0.0, 0.2, 0.7)
    stack = stack_of(rates)
    drawn = torch.tensor([stack._passing() for _ in range(1_000)], dtype=torch.float64)
    for i, rate in enumerate(rates):
        gone = int((drawn[:, i] == 0).sum())
        assert abs(gone - 1_000 * rate) <= 5 * (1_000 * rate * (1 - rate)) ** 0.5
        assert torch.allclose(drawn[:, i][drawn[:, i] > 0], torch.tensor(1 / (1 - rate), dtype=torch.float64))
    assert stack.eval()._passing() is None


def test_a_dropped_block_is_no_dead_layer() -> None:
    """The verdict of a record in which a block's weights have only zeros, with and without stochastic depth of whole blocks."""
    flow = made_up_flow(26)
    inside = [name.startswith("stages.2.blocks.1.") for name in flow.layer_names.tolist()]
    flow.mean_abs[-1, inside], flow.zeros[-1, inside] = 0.0, 1.0
    settings = {"vanishing_ratio": "1e-4", "exploding_ratio": "1e3", "drop_path": "0.5"}
    for mode, label in (("sample", "dead layers"), ("batch", "healthy")):
        flow.meta["settings"] = settings | {"drop_path_mode": mode}
        assert verdict(flow).label == label
    assert Thresholds.of(flow).dead_layers == NEVER


def test_where_it_is_not_possible_it_is_refused() -> None:
    for settings, words in (({"skip": "none", "layerscale_init": None}, "--skip none: a dropped block"), ({"norm": "batchnorm"}, "--norm batchnorm")):
        with pytest.raises(UsageError, match=words):
            Config().replace(drop_path=0.1, drop_path_mode="batch", **settings)
