"""Reversible blocks: against the plain network, against keeping everything in every bit, at depth, in memory, and where they are misused."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepscale import ops
from deepscale.activations import Block, KeepAll, Policy, Recompute, Reconstruct
from deepscale.bench.kept import Alive, kept_bytes
from deepscale.config import NORM_NAMES, ModelConfig, parse
from deepscale.errors import UsageError
from deepscale.models.block import BlockSpec, rounded
from deepscale.models.convnext import ConvNeXt, cross_entropy, use_kernel
from deepscale.models.naming import load_plain, to_plain
from deepscale.models.observe import BlockObserver
from deepscale.models.reference import PlainConvNeXt
from deepscale.models.reversible import inverse
from deepscale.models.stack import BlockStack

BLOCKS = (2, 1, 5, 2)
WIDTH = 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def native() -> None:
    """The compiled kernel, built once per clone."""
    if reason := ops.ensure_ops(["block"], print)["block"]:
        pytest.skip(reason)


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"blocks": BLOCKS, "width": WIDTH, "patch_size": 1, "skip": "reversible", "layerscale_init": 0.7, **settings})


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomised(module: nn.Module, deviation: float = 0.3) -> nn.Module:
    """Every parameter counts: biases, norms and gammas, too."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed) * deviation)
    return module


def network(model: ModelConfig, policy: Policy, dtype: torch.dtype = torch.float32, kernel: str = "torch") -> ConvNeXt:
    built = policy.apply(ConvNeXt(model, stack_size=2)).to(dtype)
    randomised(built)
    use_kernel(built, kernel)
    return built


def passed(model: nn.Module, low: torch.dtype | None = None, images: int = 3) -> dict[str, Tensor]:
    """Logits and gradients of a pass."""
    dtype = next(model.parameters()).dtype
    torch.manual_seed(5)  # of stochastic depth
    with torch.autocast("cpu", dtype=low, enabled=low is not None):
        logits = model(drawn(images, 3, 16, 16, dtype=dtype))
    cross_entropy(logits, torch.arange(images)).backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(value).all() and value.norm() > 0, name
        assert torch.equal(found[name], value), name


# ------------------------------------------------------------------------------------------------- the plain network's values


COMBINATIONS = list(itertools.product(("gelu", "tanh"), NORM_NAMES, ({}, {"layerscale_shape": "channel"}, {"layerscale_init": None})))


@pytest.mark.parametrize("policy", [Reconstruct(), KeepAll()], ids=lambda policy: policy.name)
@pytest.mark.parametrize(("activation", "norm", "gamma"), COMBINATIONS)
def test_stacked_is_plain(activation: str, norm: str, gamma: dict[str, Any], policy: Policy) -> None:
    """Logits and the gradient of every block against autograd's, float64: within 1e-9 of its norm, or 1e-4 of that of the largest."""
    model = config(activation=activation, norm=norm, norm_scope="blocks", **gamma)
    stacked = network(model, policy, torch.float64)
    plain = PlainConvNeXt(model).double()
    plain.load_state_dict(to_plain(stacked))
    ours, expected = passed(stacked), passed(plain)
    ours = {"logits": ours.pop("logits"), **to_plain(stacked, ours)}
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= 1e-9 * max(value.norm(), 1e-4 * largest), name


def test_a_block_passes_one_half_on_and_adds_its_branch_to_the_other() -> None:
    """By hand, of one block, in float32: (x1, x2) -> (x2, x1 + f(x2)), f being the same block without a skip connection on half of the channels."""
    stack, branch = (BlockStack(BlockSpec(4, 3, "gelu", "layernorm", skip, "scalar"), 0, 1) for skip in ("reversible", "none"))
    randomised(stack)
    branch.load_state_dict(stack.state_dict())
    x = drawn(2, 8, 5, 5, dtype=torch.float32)
    y = stack(x)
    assert y.dtype == torch.float64
    assert torch.equal(y[:, :4].float(), x[:, 4:])
    torch.testing.assert_close(y[:, 4:].float(), x[:, :4] + branch(x[:, 4:]))


def test_a_plain_networks_state_is_loaded_and_given_back() -> None:
    plain = randomised(PlainConvNeXt(config()))
    stacked = ConvNeXt(config(), stack_size=3)
    load_plain(stacked, plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in to_plain(stacked).items())


# ------------------------------------------------------------------------------------------------------- exact reconstruction

DROPPED = [{}, {"drop_path": 0.5}, {"drop_path": 0.5, "drop_path_mode": "batch"}]


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_reconstruction_changes_no_bit(norm: str, low: torch.dtype | None) -> None:
    """Float32 and branches in low precision, with stochastic depth of images and of blocks, over stacks of two: against keeping everything."""
    for dropped in DROPPED if norm != "batchnorm" else DROPPED[:2]:
        model = config(norm=norm, norm_scope="blocks", **dropped)
        assert_equal(passed(network(model, Reconstruct()), low), passed(network(model, KeepAll()), low))


@pytest.mark.parametrize("dropped", DROPPED, ids=str)
def test_reconstruction_changes_no_bit_of_the_native_kernel(native: None, dropped: dict[str, Any]) -> None:
    """And the native kernel's values are near those of torch's operators."""
    model = config(**dropped)
    found = passed(network(model, Reconstruct(), kernel="native"))
    assert_equal(found, passed(network(model, KeepAll(), kernel="native")))
    for name, value in passed(network(model, Reconstruct())).items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


DEEP = 3_333


def deep(policy: Policy, exact: bool, low: torch.dtype | None) -> dict[str, Tensor]:
    """Gradients of the blocks of 10,001 layers in one stage, in three stacks, on images of 1 x 2 pixels."""
    stacks = nn.Sequential(*(BlockStack(BlockSpec(4, 3, "gelu", "layernorm", "reversible", "scalar"), 0, DEEP // 3) for _ in range(3)))
    for stack in policy.apply(randomised(stacks, 0.2)):
        stack.exact, stack.kernel = exact, "native"
        with torch.no_grad():
            stack.gamma.fill_(DEEP**-0.5)  # at which the stream and its gradient change, and neither explodes
    x = drawn(1, 8, 1, 2, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=low, enabled=low is not None):
        stacks(x).square().sum().backward()
    return {"x": x.grad, **{name: parameter.grad for name, parameter in stacks.named_parameters()}}


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_3333_blocks_are_reconstructed_in_every_bit(native: None, low: torch.dtype | None) -> None:
    assert_equal(deep(Reconstruct(), True, low), deep(KeepAll(), True, low))


def test_a_float32_stream_loses_bits(native: None) -> None:
    """Which RevNet has: x + f - f is not x, so that the test above can fail."""
    assert not torch.equal(deep(Reconstruct(), False, None)["x"], deep(KeepAll(), False, None)["x"])


def test_beyond_the_grid_gradients_are_still_right() -> None:
    """A stream of 1e9 does not fit the multiples of 2^-32 that a float64 holds: within 1e-6 of keeping everything, whose sums are the same."""
    found = []
    for policy in (KeepAll(), Reconstruct()):
        stack = policy.apply(randomised(BlockStack(BlockSpec(4, 3, "gelu", "layernorm", "reversible", "scalar"), 0, 30)))
        x = (1e9 * drawn(2, 8, 4, 4, dtype=torch.float32)).requires_grad_()
        stack(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in stack.parameters())])
    for kept, ours in zip(*found, strict=True):
        assert (ours - kept).norm() <= 1e-6 * kept.norm()


@pytest.mark.parametrize(("low", "kernel"), [(None, "torch"), (None, "native"), (torch.bfloat16, "torch")])
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_an_inverse_gives_the_input_back(native: None, norm: str, low: torch.dtype | None, kernel: str) -> None:
    """Rounded to the grid, in every bit; also where large branches follow on tiny ones, whose last bits a float64 without a grid would lose."""
    stack = randomised(BlockStack(BlockSpec(4, 3, "gelu", norm, "reversible", "scalar"), 0, 7)).eval()
    stack.kernel = kernel
    x = drawn(2, 8, 5, 5, dtype=torch.float32)
    for gamma in (torch.ones(7), torch.tensor([1e-7, 1e-7, 1e-7, 3.0, 3.0, 3.0, 3.0])):
        with torch.no_grad(), torch.autocast("cpu", dtype=low, enabled=low is not None):
            stack.gamma.copy_(gamma[:, None])
            y = stack(x)
            assert torch.equal(inverse(stack, y), rounded(x))
        assert (y - rounded(x)).norm() > 0.1 * x.norm()


# ------------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("norm", ["layernorm", "none"])
def test_what_is_kept_does_not_depend_on_the_depth(norm: str) -> None:
    """Bytes alive after a forward pass of 26, 110 and 302 layers in stacks of a few blocks: the same. Keeping all grows with them."""
    images, kept = drawn(2, 3, 16, 16, dtype=torch.float32), {}
    for policy, thirds in itertools.product((Reconstruct(), KeepAll()), (5, 33, 97)):
        model = config(blocks=(1, 1, thirds, 1), norm=norm)
        kept[policy.name, thirds] = kept_bytes(network(model, policy), images)
    assert kept["reconstruct", 5] == kept["reconstruct", 33] == kept["reconstruct", 97]
    assert kept["keep", 97] > 5 * kept["keep", 5] > 10 * kept["reconstruct", 97]


@pytest.mark.parametrize("policy", [Reconstruct(), KeepAll()], ids=lambda policy: policy.name)
def test_the_policy_knows_what_is_kept(policy: Policy) -> None:
    """Bytes after a pass of two stacks, of which the second one's output is among them: as planned."""
    stacks = policy.apply(nn.Sequential(*(BlockStack(BlockSpec(4, 3, "gelu", "batchnorm", "reversible", "scalar"), 0, 3) for _ in range(2))))
    x = drawn(2, 8, 6, 6, dtype=torch.float32).requires_grad_()
    block = Block(stacks[0].spec, 2 * 36)
    with Alive([*stacks.parameters(), *stacks.buffers(), x]) as alive:
        output = stacks(x)
        held = alive.bytes
    beside = 0 if policy == Reconstruct() else output.nbytes  # which nobody but this test holds
    assert held == policy.kept(block, [3, 3]) + beside


# --------------------------------------------------------------------------------------------------- passes in another order


def stacks_of(policy: Policy | None = None) -> nn.Sequential:
    built = nn.Sequential(*(BlockStack(BlockSpec(4, 3, "gelu", "layernorm", "reversible", "scalar"), 0, 2) for _ in range(3)))
    randomised(built)
    return (policy or Reconstruct()).apply(built)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forward_passes_before_their_backward_passes(order: tuple[int, int]) -> None:
    """Of the same stacks: the sums of gradients are those of one pass after the other."""
    first, second = stacks_of(), stacks_of()
    inputs = [drawn(2, 8, 5, 5, seed=seed, dtype=torch.float32).requires_grad_() for seed in (1, 2)]
    losses = [first(x).square().sum() for x in inputs]
    for i in order:
        losses[i].backward()
    ours = [x.grad.clone() for x in inputs]
    for i, x in enumerate(inputs):
        again = x.detach().clone().requires_grad_()
        second(again).square().sum().backward()
        assert torch.equal(again.grad, ours[i])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_stacks_in_turn_of_two_passes() -> None:
    """Each stack sees both inputs before the next one does, as in a pipeline."""
    stacks, alone = stacks_of(), stacks_of()
    inputs = [drawn(2, 8, 5, 5, seed=seed, dtype=torch.float32) for seed in (1, 2)]
    outputs = list(inputs)
    for stack in stacks:
        outputs = [stack(x) for x in outputs]
    sum(x.square().sum() for x in outputs).backward()
    for x in inputs:
        alone(x).square().sum().backward()
    for a, b in zip(stacks.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_pass_whose_backward_is_never_run_leaves_nothing_behind() -> None:
    stacks, alone = stacks_of(), stacks_of()
    x = drawn(2, 8, 5, 5, dtype=torch.float32)
    stacks(x)  # with gradients, and forgotten
    with torch.no_grad():
        stacks(x)
    for own in (stacks, alone):
        own(x).square().sum().backward()
    for a, b in zip(stacks.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_an_output_that_is_used_twice() -> None:
    """By the next stack and by the loss itself: as where everything is kept."""
    grads = []
    for policy in (Reconstruct(), KeepAll()):
        stacks, x = stacks_of(policy), drawn(2, 8, 5, 5, dtype=torch.float32).requires_grad_()
        between = stacks[0](x)
        (stacks[1](between).square().sum() + between.sum()).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_what_lies_between_two_stacks_is_not_taken_for_the_first_ones_output() -> None:
    """Of the same shape, and made of it."""
    grads = []
    for policy in (Reconstruct(), KeepAll()):
        stacks, x = stacks_of(policy), drawn(2, 8, 5, 5, dtype=torch.float32).requires_grad_()
        stacks[1](stacks[0](x) * 2.0).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_backward_pass_that_leaves_the_next_stack_out_is_an_error() -> None:
    """The first stack's output is the second one's to give back."""
    stacks, x = stacks_of(), drawn(2, 8, 5, 5, dtype=torch.float32).requires_grad_()
    between = stacks[0](x)
    after = stacks[1](between)
    with pytest.raises(RuntimeError, match=r"left to those that follow.*--activations keep"):
        between.sum().backward()
    assert x.grad is None and after.requires_grad


def test_a_second_backward_and_a_changed_output_are_errors() -> None:
    stacks, x = stacks_of(), drawn(2, 8, 5, 5, dtype=torch.float32)
    loss = stacks(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    output = stacks(x)
    loss = output.sum()
    output.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_neither_the_input_nor_the_gradient_given_is_changed() -> None:
    for shape in ((2, 8, 5, 5), (1, 8, 1, 1)):
        stacks = stacks_of()
        x, g = (drawn(*shape, seed=seed).contiguous(memory_format=torch.channels_last) for seed in (1, 2))
        x_before, g_before = x.clone(), g.clone()
        stacks(x.requires_grad_()).backward(g)
        assert torch.equal(x, x_before) and torch.equal(g, g_before)


# ------------------------------------------------------------------------------------------------------------------ observers


@pytest.mark.parametrize("kernel", ["torch", "native"])
def test_an_observer_sees_whole_blocks(native: None, kernel: str) -> None:
    """Mean and deviation of outputs and the norm of their gradients are those of hooks on the plain network's blocks, float64; the same under
    both policies."""
    plain = randomised(PlainConvNeXt(config())).double()
    outputs: list[Tensor] = []
    for stage in plain.path:
        for block in stage.blocks:
            block.register_forward_hook(lambda module, x, y: (y.retain_grad(), outputs.append(y))[0])
    passed(plain)
    expected = {
        "output_mean": [y.mean() for y in outputs],
        "output_std": [y.std(unbiased=False) for y in outputs],
        "output_grad_l2": [y.grad.norm() for y in outputs],
    }
    for policy in (Reconstruct(), KeepAll()):
        model = policy.apply(ConvNeXt(config(), stack_size=2)).double()
        load_plain(model, plain.state_dict())
        use_kernel(model, kernel)
        for _, stack in model.stacks():
            stack.observer = BlockObserver(stack.blocks, stack.units, CPU)
        passed(model)
        found = [stack.observer.statistics() for _, stack in model.stacks()]
        for name, values in expected.items():
            torch.testing.assert_close(torch.cat([own[name] for own in found]), torch.stack(values).detach(), rtol=1e-8, atol=1e-12)
        assert all(torch.isfinite(own["saturated"]).all() for own in found)


# ------------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--skip reversible --width 7", ["--width 7 is odd", "type an even --width"]),
        ("--skip reversible --recompute", ["--activations recompute", "--skip reversible", "type --activations reconstruct or keep"]),
        ("--skip reversible --activations selective", ["--activations selective"]),
        ("--skip reversible --activations offload", ["--activations offload"]),
        ("--skip reversible --segment 4", ["--segment 4"]),
        ("--skip reversible --activations reconstruct --segment 4", ["--segment 4"]),
        ("--activations reconstruct", ["--skip identity", "type --skip reversible, too, or --activations recompute"]),
        ("--skip reversible --model vgg", ["--skip reversible is not possible with --model vgg"]),
        ("--skip reversible --model plain", ["--skip is no setting of --model plain"]),
    ],
)
def test_what_does_not_go_together_is_refused(line: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        parse(line.split())
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_policies_that_other_blocks_have_are_refused() -> None:
    reversible, other = (BlockStack(BlockSpec(4, 3, "gelu", "layernorm", skip, "scalar"), 0, 2) for skip in ("reversible", "identity"))
    with pytest.raises(ValueError, match="KeepAll"):
        Recompute(2).apply(reversible)(torch.zeros(1, 8, 2, 2))
    with pytest.raises(ValueError, match="Reconstruct"):
        Reconstruct().apply(other)(torch.zeros(1, 4, 2, 2))
