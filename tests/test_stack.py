"""BlockStack by itself: against plain blocks, what it keeps, what it computes twice, how precise its stream is, and how it is misused."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from policies import in_segments
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deepscale.activations import Recompute
from deepscale.config import ModelConfig
from deepscale.models.block import BlockSpec
from deepscale.models.convnext import ConvNeXt, cross_entropy, smallest_segment
from deepscale.models.reference import PlainBlock
from deepscale.models.stack import BlockStack

C = 4


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter drawn from a normal of deviation 0.3, so that biases, norms and gammas count too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.3)
    return module


def stack_of(blocks: int, *, segment: int = 0, rates: tuple[float, ...] | None = None, dtype: torch.dtype = torch.float64, **spec: Any) -> BlockStack:
    settings = {"kernel_size": 3, "activation": "gelu", "norm": "layernorm", "skip": "identity", "gamma": "scalar", **spec}
    stack = BlockStack(BlockSpec(C, **settings), 0, blocks, rates).to(dtype)
    randomised(stack)
    return in_segments(segment).apply(stack)


def plain_blocks(stack: BlockStack) -> nn.Sequential:
    """The plain network's blocks with the values of a stack."""
    spec = stack.spec
    model = ModelConfig(
        width=C, patch_size=1, kernel_size=spec.kernel_size, activation=spec.activation, norm=spec.norm, skip=spec.skip,
        layerscale_init=None if spec.gamma == "none" else 1.0, layerscale_shape="channel" if spec.gamma == "channel" else "scalar",
    )  # fmt: skip
    blocks = nn.Sequential(*(PlainBlock(model, C, 0.0) for _ in range(stack.blocks))).to(stack.pwconv1_weight.dtype)
    with torch.no_grad():
        for i, block in enumerate(blocks):
            for name, parameter in block.named_parameters():
                parameter.copy_(stack.stacked()[name][i].view_as(parameter))
    return blocks


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


VARIANTS: list[dict[str, Any]] = [
    {"kernel_size": 5},
    {"kernel_size": 7, "gamma": "channel"},
    {"kernel_size": 1, "norm": "rmsnorm"},
    {"norm": "none", "skip": "none", "gamma": "none"},
    {"norm": "batchnorm", "kernel_size": 5, "activation": "relu"},
]


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: "-".join(map(str, spec.values())))
@pytest.mark.parametrize("segment", [0, 1, 2, 4, 9])
def test_a_stack_is_its_blocks_one_after_the_other(spec: dict[str, Any], segment: int) -> None:
    """Four blocks, images higher than wide, float64: outputs, gradients of the input and of all parameters against plain blocks, rtol 1e-9."""
    stack = stack_of(4, segment=segment, **spec)
    blocks = plain_blocks(stack)
    own, other = images(3, C, 7, 5).requires_grad_(), images(3, C, 7, 5).requires_grad_()
    out, expected = stack(own), blocks(other)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    out.backward(images(3, C, 7, 5, seed=2))
    expected.backward(images(3, C, 7, 5, seed=2))
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)
    for i, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            gradient = stack.stacked()[name].grad
            assert gradient is not None
            torch.testing.assert_close(gradient[i].view_as(parameter), parameter.grad, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_recomputation_changes_no_bit(precision: str) -> None:
    """Outputs and gradients with segments of 1, 2, 3, 7 and 100 blocks against keeping everything: the same operations in the same order."""
    reference: list[Tensor] | None = None
    for segment in (0, 1, 2, 3, 7, 100):
        stack = stack_of(7, segment=segment, rates=tuple(i / 10 for i in range(7)), dtype=torch.float32)
        torch.manual_seed(5)
        x = images(3, C, 6, 6, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "fp32"):
            out = stack(x)
        out.square().sum().backward()
        found = [out.detach(), x.grad, *(p.grad for p in stack.parameters())]
        reference = reference or found
        for ours, kept in zip(found, reference, strict=True):
            assert torch.equal(ours, kept), f"segment {segment}"


def test_a_stack_changes_neither_its_input_nor_the_gradient_it_is_given() -> None:
    """Both are the caller's memory, which the stack's in-place operations must not reach."""
    for spec in (*VARIANTS, {}, {"norm": "none"}, {"skip": "none"}):
        for segment in (0, 2):
            stack = stack_of(3, segment=segment, rates=(0.0, 0.2, 0.4), **spec)
            x, g = (images(2, C, 5, 5, seed=seed).contiguous(memory_format=torch.channels_last) for seed in (1, 2))
            x_before, g_before = x.clone(), g.clone()
            stack(x.requires_grad_()).backward(g)
            assert torch.equal(x, x_before), spec
            assert torch.equal(g, g_before), spec


def test_no_gradient_is_asked_of_what_needs_none() -> None:
    """An input without gradient, as after a frozen stem, against one with: the same gradients of the parameters."""
    first, second = stack_of(3), stack_of(3)
    x = images(2, C, 5, 5)
    first(x).sum().backward()
    second(x.clone().requires_grad_()).sum().backward()
    assert x.grad is None
    for ours, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad)


# ------------------------------------------------------------------------------------------------------------ the stream

BLOCKS = 3_333


def test_a_bf16_stream_would_stand_still() -> None:
    """Why the stream is float32: 3,333 additions of 1/3,333 to 1.0 in bfloat16 leave 1.0, where the sum is 2."""
    total = torch.ones((), dtype=torch.bfloat16)
    for _ in range(BLOCKS):
        total += torch.tensor(1 / BLOCKS, dtype=torch.bfloat16)
    assert total.item() == 1.0


def zero_stack(gamma: str) -> BlockStack:
    """3,333 blocks whose branch is 0 everywhere."""
    stack = Recompute(18).apply(BlockStack(BlockSpec(C, 3, "relu", "none", "identity", gamma), 0, BLOCKS))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    return stack


def test_3333_blocks_of_a_3333rd_of_the_stream_sum_up_in_bf16() -> None:
    """Each branch is its last bias, 1/3,333, computed in bfloat16: against float64's 1 + 3,333 * 1/3,333 = 2, within 1 %."""
    stack = zero_stack("none")
    with torch.no_grad():
        stack.pwconv2_bias.fill_(1 / BLOCKS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = stack(torch.ones(1, C, 1, 1))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), torch.full((1, C, 1, 1), 2.0, dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize(("dtype", "gamma"), [(torch.bfloat16, "scalar"), (torch.float16, "none")], ids=["bf16-gamma", "fp16"])
def test_3333_blocks_that_add_a_3333rd_of_the_stream_grow_it_and_its_gradient(dtype: torch.dtype, gamma: str) -> None:
    """Each branch is the stream itself times 1/3,333: output and gradient against float64's (1 + 1/3,333)^3,333 = 2.718, within 1 %.

    A stream or a gradient in the branch's precision would stay at 1.0, and in half precision at 2 for fp16.
    """
    stack, expected = zero_stack(gamma), (1 + 1 / BLOCKS) ** BLOCKS
    with torch.no_grad():
        stack.dwconv_weight[:, :, 0, 1, 1] = 1.0
        stack.pwconv1_weight[:, :C] = torch.eye(C)
        stack.pwconv2_weight[:, :, :C] = torch.eye(C) / (1 if gamma == "scalar" else BLOCKS)
        if gamma == "scalar":
            stack.gamma.fill_(1 / BLOCKS)
    x = torch.ones(1, C, 1, 1, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = stack(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.float32
    for value in (out.detach(), x.grad):
        torch.testing.assert_close(value.double(), torch.full((1, C, 1, 1), expected, dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_stay_float32_and_near_those_of_float32(dtype: torch.dtype) -> None:
    """All gradients of five blocks under autocast against float32's, within 4 % of each tensor's norm (bfloat16 keeps 8 bits: 0.4 % a value)."""
    grads = []
    for enabled in (False, True):
        stack = stack_of(5, segment=2, dtype=torch.float32)
        x = images(3, C, 6, 6, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = stack(x)
        assert out.dtype == torch.float32
        out.square().sum().backward()
        grads.append({"x": x.grad, **{name: p.grad for name, p in stack.named_parameters()}})
    for name, full in grads[0].items():
        low = grads[1][name]
        assert low.dtype == torch.float32
        assert (low - full).norm() <= 0.04 * full.norm(), name


def test_a_small_gamma_does_not_underflow_in_fp16() -> None:
    """gamma 1e-6 times weights of 0.02 is below fp16's smallest number: the branch against float32's, within 1 %."""
    branches = []
    for enabled in (False, True):
        stack = stack_of(1, dtype=torch.float32, skip="none")
        with torch.no_grad():
            stack.gamma.fill_(1e-6)
            stack.pwconv2_weight.mul_(0.02 / 0.3)
            with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
                branches.append(stack(images(3, C, 6, 6, dtype=torch.float32)))
    assert (branches[1] - branches[0]).norm() <= 0.01 * branches[0].norm()


# ------------------------------------------------------------------------------------------------------ stochastic depth


def test_evaluation_ignores_stochastic_depth() -> None:
    with_rates, without = stack_of(4, rates=(0.5,) * 4).eval(), stack_of(4).eval()
    assert torch.equal(with_rates(images(3, C, 5, 5)), without(images(3, C, 5, 5)))


def test_rates_of_zero_drop_nothing() -> None:
    assert torch.equal(stack_of(4, rates=(0.0,) * 4)(images(3, C, 5, 5)), stack_of(4)(images(3, C, 5, 5)))


@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_a_kept_branch_is_scaled_by_the_chance_to_be_kept(rate: float) -> None:
    """One block, 2,000 images: out - x is 0 or branch / (1 - rate), whole images at a time, and as often as the rate says (5 sigma)."""
    stack, n = stack_of(1, rates=(rate,)), 2_000
    x = images(1, C, 2, 1).expand(n, C, 2, 1)
    branch = stack.eval()(x) - x
    dropped = stack.train()(x) - x
    ratio = dropped / branch
    kept = ratio[:, 0, 0, 0] > 0.5
    factor = kept.double() / (1 - rate)
    torch.testing.assert_close(ratio, factor[:, None, None, None].expand_as(ratio), rtol=1e-9, atol=1e-12)
    assert abs(kept.sum().item() - n * (1 - rate)) <= 5 * math.sqrt(n * rate * (1 - rate))


def test_blocks_drop_images_independently() -> None:
    """Two blocks of rate 0.5: all four outcomes occur about 500 times in 2,000 images (5 sigma)."""
    n = 2_000
    masks = stack_of(2, rates=(0.5, 0.5))._masks(torch.ones(n, C, 1, 1, dtype=torch.float64))
    assert masks is not None and masks.shape == (2, n, 1)
    outcomes = torch.bincount((masks[0, :, 0] > 0).long() * 2 + (masks[1, :, 0] > 0).long(), minlength=4)
    assert ((outcomes - n / 4).abs() <= 5 * math.sqrt(n * 3 / 16)).all(), outcomes


# ------------------------------------------------------------------------------------------------- what is kept, and twice


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made under this mode that are still alive, whoever holds them; and the most there ever were."""

    def __init__(self, without: Iterator[Tensor]) -> None:
        super().__init__()
        self.without = {t.untyped_storage()._cdata for t in without}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.without:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if function is torch.ops.aten.convolution_backward.default:  # once a block, when its backward holds most
            self.most = max(self.most, self.now())
        return out

    def now(self) -> int:
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        return sum(size for _, size in self.storages.values())


DEEP = ModelConfig(blocks=(28, 28, 250, 28), width=4, patch_size=1)
SHALLOWER = ModelConfig(blocks=(6, 6, 54, 6), width=4, patch_size=1)


def network(model: ModelConfig, segment: int) -> ConvNeXt:
    return in_segments(segment).apply(ConvNeXt(model)).initialise(0)


def test_live_bytes_sees_what_autograd_holds() -> None:
    """The measure itself against a count by hand: a chain of three exponentials keeps its three results, 4 kB each, until the backward pass."""
    x = torch.ones(1_000, requires_grad=True)
    with LiveBytes(iter([x])) as live:
        out = x.exp().exp().exp()
        assert live.now() == 3 * 4_000
        out.sum().backward()
        del out
        assert live.now() == 4_000, "the gradient of x"


def test_recomputation_keeps_a_twentieth() -> None:
    """1,004 layers: bytes alive after the forward pass, recomputed at the segment that holds least against keeping all; and the most in backward."""
    kept, most = {}, {}
    segment = smallest_segment(DEEP.stage_blocks)
    for size in (0, segment):
        model = network(DEEP, size)
        with LiveBytes(model.parameters()) as live:
            loss = cross_entropy(model(images(2, 3, 32, 32, dtype=torch.float32)), torch.tensor([0, 1]))
            kept[size] = live.now()
            loss.backward()
        most[size] = live.most - sum(p.numel() * p.element_size() for p in model.parameters())  # without the gradients themselves
    assert kept[segment] <= kept[0] / 20
    assert most[segment] <= most[0] / 10


def test_nothing_is_kept_without_gradients() -> None:
    model = network(SHALLOWER, 0)
    with torch.no_grad(), LiveBytes(model.parameters()) as live:
        logits = model(images(2, 3, 32, 32, dtype=torch.float32))
        assert live.now() == logits.numel() * 4


def test_activations_are_freed_by_the_backward_pass() -> None:
    """What is alive after backward is the gradients, the loss and nothing else."""
    model = network(SHALLOWER, 0)
    with LiveBytes(model.parameters()) as live:
        loss = cross_entropy(model(images(2, 3, 32, 32, dtype=torch.float32)), torch.tensor([0, 1]))
        loss.backward()
        assert live.now() == sum(p.numel() for p in model.parameters()) * 4 + 4


def matrix_flops(segment: int) -> int:
    """Of one step's matrix products in the stacks (torch's FLOP counter)."""
    model = network(SHALLOWER, segment)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(images(2, 3, 32, 32, dtype=torch.float32)), torch.tensor([0, 1])).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if "mm" in str(operator))


def test_recomputation_computes_the_forward_pass_once_more() -> None:
    """Matrix products, segments of 6 against keeping all: 4/3 (forward 1, backward 2), less the last output of each segment, which nobody needs."""
    ratio = matrix_flops(6) / matrix_flops(0)
    assert 1.28 < ratio <= 4 / 3


# -------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_a_second_backward_is_an_error(segment: int) -> None:
    """With retain_graph, which torch would allow: the stack has freed its activations and says so; the gradients stay those of the first."""
    stack = stack_of(3, segment=segment)
    loss = stack(images(2, C, 5, 5)).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in stack.parameters()]
    with pytest.raises(RuntimeError, match=r"second backward .* run the forward pass again"):
        loss.backward()
    for parameter, gradient in zip(stack.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_gradient_of_a_gradient_is_an_error() -> None:
    """The hand-written backward is no part of a graph: torch says so instead of giving zeros."""
    stack, x = stack_of(2), images(2, C, 5, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_changed_input_is_an_error() -> None:
    """An input overwritten between forward and backward would give wrong gradients: torch's version check sees it."""
    stack, x = stack_of(2), images(2, C, 5, 5).contiguous(memory_format=torch.channels_last)
    loss = stack(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_changed_parameter_is_an_error() -> None:
    """An optimiser step between forward and backward, likewise."""
    stack = stack_of(2, segment=1)
    loss = stack(images(2, C, 5, 5)).sum()
    with torch.no_grad():
        stack.pwconv1_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
