"""The native kernel of a block: against torch's operators and against autograd through plain blocks; where it stands back; how it is chosen."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepscale import kernel, ops
from deepscale.activations import KeepAll, OffloadInputs, Policy, Recompute, Selective
from deepscale.config import ACTIVATION_NAMES, Config, ModelConfig
from deepscale.errors import UsageError
from deepscale.models import native
from deepscale.models.block import BlockSpec
from deepscale.models.components import ACTIVATIONS
from deepscale.models.observe import BlockObserver
from deepscale.models.reference import PlainBlock
from deepscale.models.stack import BlockStack
from deepscale.ops import op
from deepscale.ops.op import missing_compiler
from deepscale.world import World

NORMS = ("layernorm", "rmsnorm", "none")
SKIPS = ("identity", "none")
GAMMAS = ("none", "scalar", "channel")
KEEP = KeepAll()
POLICIES: tuple[Policy, ...] = (KEEP, Recompute(1), Recompute(2), Selective(), Recompute(5), OffloadInputs(2))
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The kernel, built once per clone."""
    reason = ops.ensure_ops(["block"], print)["block"]
    if reason and missing_compiler():
        pytest.skip(reason)
    assert reason is None


def stack_of(
    channels: int, blocks: int = 3, *, policy: Policy = KEEP, dtype: torch.dtype = torch.float64, rates: Any = None, **spec: Any
) -> BlockStack:
    settings = {"kernel_size": 3, "activation": "gelu", "norm": "layernorm", "skip": "identity", "gamma": "scalar", **spec}
    stack = policy.apply(BlockStack(BlockSpec(channels, **settings), 0, blocks, rates).to(dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.3)
    return stack


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def passed(module: nn.Module, x: Tensor, kernel: str | None = None, low: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and gradients of one pass, with a gradient that differs from element to element."""
    if kernel is not None:
        module.kernel = kernel
    module.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)  # of stochastic depth
    with torch.autocast("cpu", dtype=low, enabled=low is not None):
        out = module(x)
    out.backward(torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))
    return {"out": out.detach(), "x": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}


def plain_of(stack: BlockStack) -> nn.Sequential:
    """The plain network's blocks with the values of a stack."""
    spec = stack.spec
    model = ModelConfig(
        width=spec.channels, patch_size=1, kernel_size=spec.kernel_size, activation=spec.activation, norm=spec.norm, skip=spec.skip,
        layerscale_init=None if spec.gamma == "none" else 1.0, layerscale_shape="channel" if spec.gamma == "channel" else "scalar",
    )  # fmt: skip
    blocks = nn.Sequential(*(PlainBlock(model, spec.channels, 0.0) for _ in range(stack.blocks))).to(stack.pwconv1_weight.dtype)
    with torch.no_grad():
        for i, block in enumerate(blocks):
            for name, parameter in block.named_parameters():
                parameter.copy_(stack.stacked()[name][i].view_as(parameter))
    return blocks


def near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of the expected one's norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(found[name]).all() and value.norm() > 0, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), f"{name}: {((found[name] - value).norm() / value.norm()).item():.2g}"


# ------------------------------------------------------------------------------------------------------------ exactness


def variants() -> Iterator[tuple[dict[str, Any], int, Policy]]:
    """Every activation, norm, skip, gamma and kernel size together; numbers of channels and activation policies in turn."""
    combined = itertools.product(ACTIVATION_NAMES, NORMS, SKIPS, GAMMAS, (3, 5))
    for i, (activation, norm, skip, gamma, size) in enumerate(combined):
        spec = {"activation": activation, "norm": norm, "skip": skip, "gamma": gamma, "kernel_size": size}
        yield spec, (4, 5, 8, 16, 12)[i % 5], POLICIES[i % 6]


@pytest.mark.parametrize(("activation", "norm"), [*itertools.product(ACTIVATION_NAMES, NORMS)])
def test_float64_equals_autograd_through_plain_blocks(activation: str, norm: str) -> None:
    """Output and all gradients of three blocks, under every activation policy, for every skip, gamma and kernel size."""
    cases = [case for case in variants() if case[0]["activation"] == activation and case[0]["norm"] == norm]
    assert len(cases) == 12
    for spec, channels, policy in cases:
        stack, x = stack_of(channels, policy=policy, **spec), images(3, channels, 5, 4)
        expected = passed(plain_of(stack), x)
        found = passed(stack, x, "native")
        stacked = {"out": expected["out"], "x": expected["x"]}
        for name in stack.spec.shapes():
            stacked[name.replace(".", "_")] = torch.stack([expected[f"{i}.{name}"] for i in range(3)])
        near(found, {name: value.view_as(found[name]) for name, value in stacked.items()}, 1e-12)


SHAPES = [(1, 1, 4, 4), (2, 3, 1, 1), (5, 12, 7, 3), (1, 32, 9, 9), (7, 8, 16, 5), (2, 24, 2, 2), (3, 64, 6, 6), (4, 40, 3, 3), (9, 16, 12, 12)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_all_shapes_equal_torchs_operators(size: int, threads: int) -> None:
    """Channels that are and are not a multiple of a vector, images smaller than the kernel, fewer images than threads, tiles that end early.

    In float64 within 1e-12; in float32 the distance to float64 is at most three times that of torch's operators, and 1e-6.
    """
    torch.set_num_threads(threads)
    for batch, channels, *sides in SHAPES:
        spec = {"kernel_size": size, "norm": "layernorm" if channels > 1 else "none"}  # LayerNorm of one channel is 0
        x = images(batch, channels, *sides)
        exact, same = (passed(stack_of(channels, 2, **spec), x, kernel) for kernel in ("torch", "native"))
        near(same, exact, 1e-12)
        theirs, ours = (passed(stack_of(channels, 2, dtype=torch.float32, **spec), x.float(), kernel) for kernel in ("torch", "native"))
        for name, value in exact.items():
            assert (ours[name] - value).norm() <= 3 * (theirs[name] - value).norm() + 1e-6 * value.norm(), (name, batch, channels)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("skip", SKIPS)
def test_stochastic_depth_equals_torchs_operators(skip: str, policy: Policy) -> None:
    stack, x = stack_of(8, 4, policy=policy, skip=skip, rates=(0.0, 0.3, 0.5, 0.2)), images(6, 8, 4, 4)
    near(passed(stack, x, "native"), passed(stack, x, "torch"), 1e-12)


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_activations_in_float32_are_those_of_float64(activation: str) -> None:
    """f and f' of h from -30 to 30 through a block that is the activation alone: within 4e-7 of float64, or of the value where that is above 1."""
    h = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    stack = BlockStack(BlockSpec(1, 1, activation, "none", "none", "none"), 0, 1).float()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
        stack.dwconv_weight.fill_(1.0)
        stack.pwconv1_weight[0, 0] = stack.pwconv2_weight[0, 0, 0] = 1.0
    stack.kernel = "native"
    x = h.float()[None, None, None].requires_grad_()
    out = stack(x)
    out.sum().backward()
    own = h.float().double().requires_grad_()
    expected = ACTIVATIONS[activation].forward(own)
    (slope,) = torch.autograd.grad(expected.sum(), own)
    away = own.detach().abs() > 1e-6  # of the kink of ReLU
    for found, value in ((out[0, 0, 0].double(), expected.detach()), (x.grad[0, 0, 0].double(), slope)):
        difference = (found - value).abs() / value.abs().clamp(min=1.0)
        assert difference[away].max() <= 4e-7, difference.max()


def test_nan_and_infinity_come_through() -> None:
    """A non-finite value must reach the loss, which is what stops a run."""
    for bad in (float("nan"), float("inf")):
        for activation in ACTIVATION_NAMES:
            stack, x = stack_of(16, 1, dtype=torch.float32, activation=activation), images(1, 16, 4, 4, dtype=torch.float32)
            x[0, 3, 1, 1] = bad
            stack.kernel = "native"
            assert not torch.isfinite(stack(x)).all(), (bad, activation)


# --------------------------------------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pass_repeats_bit_for_bit(threads: int) -> None:
    """Twice the same, and under every activation policy; and whatever the memory of earlier calls holds."""
    torch.set_num_threads(threads)
    x = images(5, 16, 9, 7, dtype=torch.float32)
    results = []
    for policy in (KEEP, *POLICIES):
        results.append(passed(stack_of(16, 4, policy=policy, dtype=torch.float32), x, "native"))
        passed(stack_of(24, 2, dtype=torch.float32), images(3, 24, 11, 11, dtype=torch.float32), "native")
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("policy", "blocks"), [(KEEP, 3), (KEEP, 1), (Recompute(2), 3), (Selective(), 3)])
@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_an_observed_pass_is_an_unobserved_one_and_sees_what_torch_sees(activation: str, policy: Policy, blocks: int) -> None:
    x = images(5, 8, 6, 6, dtype=torch.float32)
    seen = []
    for name in ("native", "torch"):
        stack = stack_of(8, blocks, policy=policy, dtype=torch.float32, activation=activation, rates=(0.2,) * blocks)
        before = passed(stack, x, name)
        stack.observer = BlockObserver(blocks, 32, torch.device("cpu"))
        after = passed(stack, x, name)
        assert all(torch.equal(before[key], after[key]) for key in before)
        seen.append(stack.observer.statistics())
    for field, expected in seen[1].items():
        torch.testing.assert_close(seen[0][field], expected, rtol=1e-5, atol=1e-3 if field in ("saturated", "dead") else 1e-7)


# ------------------------------------------------------------------------------------------------------ torch's operators


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["batchnorm", "layernorm"])
def test_what_the_kernel_does_not_know_is_left_to_torch(norm: str, low: torch.dtype | None) -> None:
    stack, x = stack_of(8, dtype=torch.float32, norm=norm), images(4, 8, 4, 4, dtype=torch.float32)
    known = norm == "layernorm" and low is None
    assert native.computes(stack.spec, x.device, x.dtype, low or x.dtype) == known
    found, expected = passed(stack, x, "native", low), passed(stack, x, "torch", low)
    assert all(torch.equal(found[name], value) for name, value in expected.items()) != known


# --------------------------------------------------------------------------------------------------------- the setting


def test_auto_is_native_and_what_is_given_by_hand_stays() -> None:
    said: list[str] = []
    for asked, found in (("auto", "native"), ("native", "native"), ("torch", "torch")):
        assert kernel.choose(Config().replace(kernel=asked), ALONE, said.append, said.append).engine.kernel == found
    assert said == []


@pytest.mark.parametrize(
    ("settings", "device", "reason"),
    [({"norm": "batchnorm"}, "cpu", "batchnorm"), ({"precision": "fp16"}, "cpu", "fp16"), ({}, "cuda", "GPU")],
)
def test_auto_is_torch_where_there_is_nothing_native(settings: dict[str, Any], device: str, reason: str) -> None:
    place = World(0, 1, 0, 1, torch.device(device))
    said: list[str] = []
    asked = Config().replace(**settings)
    assert kernel.choose(asked, place, said.append, said.append).engine.kernel == "torch"
    assert said == []
    with pytest.raises(UsageError, match=f"--kernel native cannot be had: .*{reason}.*type --kernel torch"):
        kernel.choose(asked.replace(kernel="native"), place, said.append, said.append)


def test_without_a_compiler_torch_takes_over_with_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DEEPSCALE_OPS_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(native, "_library", None)
    said: list[str] = []
    assert kernel.choose(Config(), ALONE, print, said.append).engine.kernel == "torch"
    assert len(said) == 1 and "no C++ compiler (no-such-compiler)" in said[0] and "torch's operators instead" in said[0]
    with pytest.raises(UsageError, match=r"--kernel native cannot be had: no C\+\+ compiler"):
        kernel.choose(Config().replace(kernel="native"), ALONE, print, print)


def test_a_changed_source_is_another_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The finished library does not fit a source that differs in one character."""
    library, _ = ops._find("block", ops.ops_folders(), ops.note_of_this_machine("block"))
    assert library is not None
    changed = tmp_path / "block.cpp"
    changed.write_bytes(native.SOURCE.read_bytes() + b" ")
    monkeypatch.setattr(native, "SOURCE", changed)
    found, reason = ops._find("block", [library.parents[2]], ops.note_of_this_machine("block"))
    assert found is None and reason is not None and "was built for source" in reason


def test_a_kernel_that_computes_wrong_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check after a build sees an activation that is another's."""
    monkeypatch.setattr(native, "ACTIVATIONS", ("silu", "gelu", "relu", "tanh", "sigmoid"))
    with pytest.raises(RuntimeError, match="differs from torch's operators"):
        ops.check_op("block")


def test_the_compiler_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache c++ -pipe")
    assert op.compiler() == ["ccache", "c++", "-pipe"]


OUT_OF_MEMORY = """if True:
    import resource, sys
    from types import SimpleNamespace
    import torch
    from deepscale import ops
    from deepscale.models.block import BlockSpec
    from deepscale.models.native import NativeWork
    assert ops.ensure_ops(["block"], print)["block"] is None
    part = sys.argv[2]
    torch.set_num_threads(int(sys.argv[1]))

    def work(channels):
        shapes = {"dw": (channels, 3, 3), "dw_bias": channels, "w1": (4 * channels, channels), "b1": 4 * channels, "w2": (channels, 4 * channels)}
        weights = SimpleNamespace(stacked={name: torch.ones(shape) for name, shape in {**shapes, "b2": channels}.items()})
        x = torch.ones(2, channels, 2, 2).contiguous(memory_format=torch.channels_last)
        return NativeWork(BlockSpec(channels, 3, "gelu", "layernorm", "identity", "scalar"), weights, x, None, None), x, weights

    small, x, _ = work(8)
    small.forward(x, 0)  # starts the threads
    large, x, grads = work(512)
    saved, g = large.kept(x, 0)[1] if part == "backward" else None, torch.ones(8, 512)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, used + 2**20))
    try:
        large.forward(x, 0) if part == "forward" else large.backward(g, saved, 0, grads)
    except MemoryError as error:
        print("CAUGHT", error)
"""


@pytest.mark.parametrize(("threads", "part"), [(1, "backward"), (2, "forward")])
def test_memory_that_runs_out_is_an_error_and_not_the_end_of_the_process(threads: int, part: str) -> None:
    """The weights packed for a tile's products are 16 MB, and the address space has room for 1 more."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, str(threads), part], capture_output=True, text=True, timeout=120)
    assert "CAUGHT the native kernel" in done.stdout and done.returncode == 0, done.stdout + done.stderr
