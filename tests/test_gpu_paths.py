"""What differs on a GPU, as far as a CPU can show it: fewer launches, no waiting for the device, parameters filled where they are."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepscale import engine
from deepscale.activations import POLICIES, KeepAll, Policy, Recompute
from deepscale.bench import gpu_check
from deepscale.bench.networks import Training, random_batch
from deepscale.models.block import BlockSpec
from deepscale.models.components import LayerStandardise
from deepscale.models.convnext import ConvNeXt
from deepscale.models.stack import BlockStack
from deepscale.optim import parameter_groups
from deepscale.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SPEC = BlockSpec(8, 3, "gelu", "layernorm", "identity", "channel")
# Operators that make the host wait for a GPU: they read a value, or their result's size.
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique_dim", "aten._unique2", "aten.is_nonzero", "aten.equal"}


@pytest.fixture
def gpu_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """LayerNorm as on a GPU."""
    monkeypatch.setattr(LayerStandardise, "KERNEL", ("cuda", "cpu"))


def passes(policy: Policy, dtype: torch.dtype = torch.float64, low: bool = False) -> list[Tensor]:
    """Output, gradient of the input and gradients of the parameters of seven blocks; the branch in bf16 if `low`."""
    generator = torch.Generator().manual_seed(0)
    blocks = policy.apply(BlockStack(SPEC, 0, 7).to(dtype))
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.3)
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        y = blocks(x)
    y.backward(torch.randn(y.shape, dtype=torch.float64, generator=generator).to(dtype))
    return [y.detach(), *(p.grad for p in (x, *blocks.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("name", POLICIES)
def test_the_norms_kernel_computes_what_the_operators_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = POLICIES[name](2) if issubclass(POLICIES[name], Recompute) else POLICIES[name]()  # type: ignore[call-arg]
    expected = passes(policy)
    monkeypatch.setattr(LayerStandardise, "KERNEL", ("cuda", "cpu"))
    torch.testing.assert_close(passes(policy), expected, rtol=1e-10, atol=1e-12)


def test_the_norms_kernel_in_low_precision_is_as_near_to_float64_as_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU even its statistics are bf16, on a GPU they are float32; the stream's are float32 on both."""
    exact = passes(KeepAll())

    def errors() -> list[float]:
        found = passes(KeepAll(), torch.float32, low=True)
        assert all(value.dtype == torch.float32 for value in found)
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    operators = errors()
    monkeypatch.setattr(LayerStandardise, "KERNEL", ("cuda", "cpu"))
    kernel = errors()
    assert max(operators) < 0.03 and max(kernel) < 0.03
    assert kernel != operators  # it was used


class Operators(TorchDispatchMode):
    """Counts what becomes a kernel: not views, nor memory that is only taken."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name():
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def operators_per_block(policy: Policy) -> tuple[float, float]:
    """Of a forward and of a backward pass with a bf16 branch: what four more blocks add, a quarter."""
    counts = []
    for n in (4, 8):
        blocks = policy.apply(BlockStack(SPEC, 0, n))
        for parameter in blocks.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        with Operators() as forward, torch.autocast("cpu", dtype=torch.bfloat16):
            y = blocks(x)
        with Operators() as backward:
            y.backward(torch.ones_like(y))
        counts.append((len(forward.names), len(backward.names)))
    return (counts[1][0] - counts[0][0]) / 4, (counts[1][1] - counts[0][1]) / 4


@pytest.mark.usefixtures("gpu_norm")
def test_a_block_takes_few_launches() -> None:
    """At 3,333 blocks each launch more is some 17 ms of a step (5 us each): docs/findings.md, readiness for a GPU."""
    assert operators_per_block(KeepAll()) <= (7, 18)
    assert operators_per_block(Recompute(4)) <= (7, 24.5)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What copied values of a tensor to the host since; reading one value is an operator (`Operators`)."""
    found: list[str] = []

    def noted(name: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def read(*given: Any, **named: Any) -> Any:
            found.append(name)
            return true(*given, **named)

        return read

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, noted(name, getattr(Tensor, name)))
    monkeypatch.setattr(torch, "tensor", noted("tensor", torch.tensor))  # a copy from the host's ordinary memory waits too
    return found


@pytest.mark.parametrize("settings", [{}, {"drop_path": 0.2}, {"norm": "batchnorm"}, {"precision": "bf16"}, {"activations": "selective"}], ids=str)
def test_a_step_waits_for_the_device_once(settings: dict[str, Any], waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss is read. The optimiser is the one of a GPU, whose count of steps is on the device."""

    def fused(model: ConvNeXt, recipe: Any, cpu_adam: bool = False) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr, fused=True)

    monkeypatch.setattr(engine, "build_optimizer", fused)
    config = gpu_check.small("cpu", **settings)
    training = Training(engine.TorchEngine(gpu_check.network(config, ALONE), config, ALONE), ALONE, random_batch(gpu_check.IMAGES))
    training.step()
    waits.clear()
    with Operators() as operators:
        training.step()
    assert waits == ["tolist"]
    assert not WAITING & set(operators.names)
    assert len(operators.names) > 100


def test_reading_a_value_is_seen(waits: list[str]) -> None:
    """What the test above relies on."""
    values = torch.ones(3)
    with Operators() as operators:
        values[0].item(), bool(values[1] > 0), values.nonzero()
        torch.stack([*values]).tolist()
    assert operators.names.count("aten._local_scalar_dense") == 2 and "aten.nonzero" in operators.names
    assert waits == ["tolist"]


@pytest.fixture
def made_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The devices of a network's parameters when they are to be filled."""
    found: list[torch.device] = []
    monkeypatch.setattr(ConvNeXt, "initialise", lambda self, seed: found.extend({p.device for p in self.parameters()}) or self)
    yield found


def test_a_network_is_made_on_its_device(made_on: list[torch.device]) -> None:
    """No copy of 10,001 layers on the host, which may hold less than the device."""
    meta = World(0, 1, 0, 1, torch.device("meta"))
    model = gpu_check.network(gpu_check.small("cpu"), meta)
    assert made_on == [torch.device("meta")]
    assert {b.device for b in model.buffers()} <= {torch.device("meta")}
