"""The plain network of convolutions and activations alone: against its unstacked form, and what its initial values are for."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from policies import in_segments
from torch import Tensor

from deepscale.config import ACTIVATION_NAMES, ModelConfig, parse
from deepscale.errors import UsageError
from deepscale.gradflow import Recorder
from deepscale.gradflow.flow import read
from deepscale.gradflow.jacobian import singular_values
from deepscale.models.components import ACTIVATIONS, Activation
from deepscale.models.convnext import cross_entropy
from deepscale.models.initial import CRITICAL, sigmas
from deepscale.models.naming import load_plain, to_plain
from deepscale.models.observe import BlockObserver
from deepscale.models.plain import LayerStack, Plain, UnstackedPlain
from deepscale.models.registry import MODELS
from deepscale.models.stack import Keeping
from deepscale.train import main


def config(**settings: object) -> ModelConfig:
    return ModelConfig(**({"depth": 14, "width": 4, "patch_size": 4, "model": "plain", "activation": "tanh", "init": "delta-orthogonal"} | settings))


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """tanh, replaced by the identity."""
    monkeypatch.setitem(ACTIVATIONS, "tanh", Activation(torch.clone, lambda g, h, a: g.clone()))
    yield


# ----------------------------------------------------------------------------------------------- against its unstacked form


@pytest.mark.parametrize(
    ("activation", "segment", "stack_size"), [*itertools.product(ACTIVATION_NAMES, [0], [5]), *itertools.product(["tanh", "gelu"], [1, 2, 100], [4])]
)
def test_loss_and_gradients_are_those_of_the_unstacked_network(activation: str, segment: int, stack_size: int) -> None:
    """float64, 14 layers, images higher than wide: loss and every gradient, by name, rtol 1e-9."""
    torch.set_default_dtype(torch.float64)
    model = config(activation=activation, sigma_w=1.1, sigma_b=0.1)
    ours, plain = Plain(model, stack_size=stack_size).initialise(3), UnstackedPlain(model).initialise(3)
    in_segments(segment).apply(ours)
    x, labels = images(3, 3, 28, 20), torch.tensor([1, 0, 7])
    losses = [cross_entropy(network(x), labels) for network in (ours, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    own, expected = dict(ours.named_parameters()), dict(plain.named_parameters())
    names = dict(ours.plain_names())
    assert names.keys() == expected.keys()
    for name, where in names.items():
        value, gradient = own[where.name], own[where.name].grad
        assert gradient is not None
        if where.index is not None:
            value, gradient = value[where.index], gradient[where.index]
        assert torch.equal(value, expected[name]), name
        assert expected[name].grad is not None and expected[name].grad.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-9, atol=1e-15, msg=lambda text, n=name: f"{n}: {text}")


def test_a_stack_computes_each_layer_once_more_at_most_and_keeps_what_it_says() -> None:
    """Kept per stack: its input alone at first, all layers' with segment 0, the store's copies with a store; a second backward is refused."""

    class Store:
        def __init__(self) -> None:
            self.resting: list[Tensor] = []

        def put(self, x: Tensor) -> int:
            self.resting.append(x.clone())
            return len(self.resting) - 1

        def get(self, resting: int) -> Tensor:
            assert resting == len(self.resting) - 1
            return self.resting.pop()

    model = config(depth=11 + 2 + 1, activation="gelu")
    found = []
    for keeping in (Keeping(12), Keeping(0), Keeping(3), Keeping(5, store=Store())):
        network = Plain(model, stack_size=12).initialise(0)
        network.path[0].keeping = keeping
        counted = Mock(side_effect=torch.nn.functional.conv2d)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "conv2d", counted)
            out = network(images(2, 3, 8, 8).float())
            loss = cross_entropy(out, torch.tensor([1, 2]))
            loss.backward(retain_graph=True)
        assert counted.call_count == 1 + (24 if keeping.segment else 12)  # the stem, too
        found.append([loss.detach(), *(p.grad for p in network.parameters())])
        with pytest.raises(RuntimeError, match="second backward"):
            loss.backward()
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True)), "recomputation changes no bit"


def test_low_precision_is_of_all_layers_and_gradients_are_float32() -> None:
    """Under autocast in bfloat16: near float32's loss, gradients within 5 % in norm, in the parameters' dtype."""
    model, found = config(width=8), []
    for enabled in (False, True):
        network = Plain(model).initialise(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = cross_entropy(network(images(4, 3, 16, 16).float()), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        found.append((loss.item(), [p.grad for p in network.parameters()]))
    assert found[0][0] != found[1][0] == pytest.approx(found[0][0], rel=0.02)
    for full, low in zip(found[0][1], found[1][1], strict=True):
        assert low.dtype == torch.float32
        assert (full - low).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("segment", [0, 3])
def test_observers_see_every_layer(segment: int) -> None:
    """Output's mean and deviation, its gradient's norm and saturation of every layer, against autograd on the unstacked network."""
    model = config(sigma_w=3.0, sigma_b=0.5)
    network, plain = Plain(model, stack_size=5).initialise(0), UnstackedPlain(model).initialise(0)
    in_segments(segment).apply(network)
    observers = []
    for stack in network.path:
        stack.observer = BlockObserver(stack.blocks, 4, torch.device("cpu"))
        observers.append(stack.observer)
    x, labels = images(3, 3, 16, 16).float(), torch.tensor([1, 0, 7])
    cross_entropy(network(x), labels).backward()
    seen = [observer.statistics() for observer in observers]
    outputs = []
    y = plain.f(plain.stem["conv"](x))
    for layer in plain.layers:
        y = plain.f(layer(y))
        y.retain_grad()
        outputs.append(y)
    cross_entropy(plain.head["linear"](y.mean((2, 3))), labels).backward()
    expected = {
        "output_mean": [y.mean() for y in outputs],
        "output_std": [y.std(correction=0) for y in outputs],
        "output_grad_l2": [y.grad.norm() for y in outputs if y.grad is not None],
        "saturated": [((1 - y.square()) < 0.01).double().mean() for y in outputs],
    }
    for name, values in expected.items():
        torch.testing.assert_close(torch.cat([s[name] for s in seen]), torch.stack(values).detach().double(), rtol=1e-4, atol=1e-7)
    assert max(expected["saturated"]) > 0


# ------------------------------------------------------------------------------------------------------------ initial values


def test_singular_values_of_the_linear_network_are_one_at_1000_layers(linear: None) -> None:
    """Input-output Jacobian, 4 channels on 3x3 pixels, float64: all within 1e-5 (float32 weights) of 1; and of a normal init all are 0."""
    torch.set_default_dtype(torch.float64)
    x = images(1, 4, 3, 3)
    found = {}
    for init in ("delta-orthogonal", "normal"):
        network = Plain(config(depth=1_002, init=init, sigma_w=1.0, sigma_b=0.0)).initialise(0)
        found[init] = singular_values(network.body, x)
    assert (found["delta-orthogonal"] - 1).abs().max() < 1e-5
    assert found["normal"].max() < 1e-30


def test_tanhs_critical_point_is_critical() -> None:
    """At (sigma_w^2, sigma_b^2) the signal's variance q has a fixed point where E[f'^2] sigma_w^2 is 1: Gauss-Hermite, to 3 digits."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    for activation, (w, b) in CRITICAL.items():
        f, slope = (np.tanh, lambda h: 1 - np.tanh(h) ** 2) if activation == "tanh" else (lambda h: np.maximum(h, 0), lambda h: h > 0)
        q = 0.5
        for _ in range(20_000):
            q = w * float(weights @ f(math.sqrt(q) * nodes) ** 2) + b
        assert w * float(weights @ slope(math.sqrt(q) * nodes) ** 2) == pytest.approx(1.0, abs=1e-3), activation
        assert q > 0.01
    assert sigmas(config()) == (math.sqrt(1.05), math.sqrt(2.01e-5))
    assert sigmas(config(sigma_w=1.0)) == (1.0, math.sqrt(2.01e-5))
    assert sigmas(config(init="normal")) == (1.0, 0.0)


@pytest.mark.parametrize("init", MODELS["plain"].values["init"])
def test_every_init_fills_the_plain_network(init: str) -> None:
    """Stacked and unstacked alike, bit for bit; biases as asked."""
    model = config(init=init, sigma_b=0.5)
    ours, plain = Plain(model, stack_size=5).initialise(1), dict(UnstackedPlain(model).initialise(1).named_parameters())
    own = dict(ours.named_parameters())
    assert "norm" not in " ".join(plain)
    biases = []
    for name, where in ours.plain_names():
        value = own[where.name] if where.index is None else own[where.name][where.index]
        assert torch.equal(value, plain[name]), name
        biases.append(value.flatten()) if name.endswith("bias") else None
    if init != "torch":
        assert torch.cat(biases).std().item() == pytest.approx(0.5, rel=0.3)


def test_the_default_stacks_hold_about_the_root_of_the_layers() -> None:
    network = Plain(config(depth=10_000, width=1, patch_size=16))
    assert {stack.blocks for stack in network.path} == {99, 100} and len(network.path) == 100
    assert [stack.first for stack in network.path][:2] == [0, 99]
    assert sum(isinstance(m, LayerStack) for m in network.modules()) == 100


# ---------------------------------------------------------------------------------------------------- as any other network


def test_a_recorder_has_the_gradient_of_every_layer() -> None:
    """By the unstacked network's names: its own gradients' means, 30 layers in stacks of 5, and outputs of the 28 in the middle."""
    model = config(depth=30)
    network, plain = Plain(model, stack_size=5).initialise(0), UnstackedPlain(model).initialise(0)
    x, labels = images(3, 3, 16, 16).float(), torch.tensor([1, 0, 7])
    recorder = Recorder(network)
    recorder.begin(1)
    cross_entropy(network(x), labels).backward()
    recorder.gradients()
    flow = recorder.flow()
    cross_entropy(plain(x), labels).backward()
    expected = {name: p.grad.abs().mean().item() for name, p in plain.named_parameters() if name.endswith("weight") and p.grad is not None}
    assert flow.layer_names.tolist() == list(expected) and flow.depth == 30
    np.testing.assert_allclose(flow.mean_abs[0], list(expected.values()), rtol=1e-4)
    assert flow.block_names.tolist() == [f"layers.{i}" for i in range(28)]
    assert np.isfinite(flow.output_grad_l2[0]).all() and np.isfinite(flow.saturated[0]).all()


def test_its_state_goes_to_the_unstacked_network_and_back() -> None:
    model = config(depth=13)
    network, other = Plain(model).initialise(1), Plain(model, stack_size=2).initialise(2)
    state = to_plain(network)
    plain = UnstackedPlain(model)
    plain.load_state_dict(state)
    load_plain(other, state)
    x = images(2, 3, 8, 8).float()
    for one in (plain, other):
        torch.testing.assert_close(one(x), network(x), rtol=0, atol=1e-6)


def test_settings_that_it_does_not_know_are_refused() -> None:
    for typed in (["--norm", "rmsnorm"], ["--skip", "none"], ["--init", "paired"], ["--depth", "2"], ["--layerscale-init", "1"]):
        with pytest.raises(UsageError, match="--model plain"):
            parse(["--model", "plain", *typed])
    assert parse(["--model", "plain", "--depth", "10_000"]).model.built_depth == 10_000


def test_it_is_planned_and_trained_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """40 layers by train.py: what is built is said, and every layer's gradient is in the record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    arguments = "--model plain --depth 40 --width 4 --patch-size 8 --dataset synthetic --feed tensors --batch-size 16 --max-steps 2 --eval-images 20"
    main([*arguments.split(), "--engine", "torch", "--threads", "1", "--record-every", "1"])
    said = capsys.readouterr()
    assert f"40 layers: stem, 38 convolutions of width 4, head, {3 * 64 * 4 + 4 + 38 * (4 * 36 + 4) + 50:,} parameters" in said.out + said.err
    assert "a stack's input kept, its layers recomputed" in said.out + said.err
    (record,) = (tmp_path / "runs").rglob("gradflow.npz")
    flow = read(record)
    assert len(flow.layer_names) == 40 and (flow.mean_abs > 0).all()
