"""The MLP and the study's own parts against formulas written out, and against torch's modules."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from deepscale.config import ModelConfig, parse
from deepscale.errors import UsageError
from deepscale.models import registry
from deepscale.models.components import MODULES, commit_running_statistics
from deepscale.models.mlp import MLP, TensorNorm, normalised_gradient
from deepscale.models.registry import Images

IMAGES = Images(1, 28, 10)


def build(arguments: str = "", images: Images = IMAGES, seed: int = 0) -> MLP:
    model = registry.build(parse(f"--model mlp {arguments}".split()).model, images).initialise(seed)
    assert isinstance(model, MLP)
    return model


def batch(count: int = 6, images: Images = IMAGES) -> Tensor:
    return torch.randn(count, images.channels, images.side, images.side, generator=torch.Generator().manual_seed(1))


def written_out(model: MLP, x: Tensor, norm: Callable[[int, Tensor], Tensor], connections: dict[int, int]) -> Tensor:
    """The network of the study, layer by layer; `connections`: to a layer, from which one."""
    parameters = dict(model.named_parameters())
    outputs, y = [x.flatten(1)], x.flatten(1)
    for i in range(len(model.hidden)):
        y = norm(i, y @ parameters[f"hidden.{i}.linear.weight"].T + parameters[f"hidden.{i}.linear.bias"])
        y = MODULES[model.config.activation]()(y)
        if i + 1 in connections:
            y = y + outputs[connections[i + 1]]
        outputs.append(y)
    return y @ parameters["head.weight"].T + parameters["head.bias"]


def no_norm(i: int, y: Tensor) -> Tensor:
    return y


CASES: dict[str, tuple[str, Callable[[int, Tensor], Tensor], dict[int, int]]] = {
    "the baseline": ("", no_norm, {}),
    "relu": ("--activation relu --init normal --init-std 0.05", no_norm, {}),
    "colour, other sizes": ("--depth 4 --width 20 --activation tanh", no_norm, {}),
    "a linear classifier": ("--depth 1", no_norm, {}),
    "the study's skip connections": ("--init normal --init-std 0.05 --skip-pairs 1-3,4-7", no_norm, {3: 1, 7: 4}),
    "one layer's output twice": ("--skip-pairs 1-3,1-5,3-5", no_norm, {}),
    "a skip connection over every layer": ("--depth 5 --skip identity", no_norm, {2: 1, 3: 2, 4: 3}),
    "tensornorm": ("--norm tensornorm", lambda i, y: (y - y.mean()) / ((y - y.mean()).square().sum() / (y.numel() - 1)).sqrt(), {}),
    "batchnorm": ("--norm batchnorm", lambda i, y: (y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt(), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_network_is_its_formula(case: str) -> None:
    arguments, norm, connections = CASES[case]
    images = Images(3, 8, 5) if "colour" in case else IMAGES
    model, x = build(arguments, images).double(), batch(images=images).double()
    if "twice" in case:
        return check_two_into_one(model, x)
    torch.testing.assert_close(model(x), written_out(model, x, norm, connections))


def check_two_into_one(model: MLP, x: Tensor) -> None:
    """Layers 1 and 3 into 5, and 1 into 3."""
    y, outputs = x.flatten(1), [x]
    for i, layer in enumerate(model.hidden, start=1):
        y = layer(y)
        y = y + outputs[1] if i == 3 else y + outputs[1] + outputs[3] if i == 5 else y
        outputs.append(y)
    torch.testing.assert_close(model(x), model.head(y))


def test_sizes_and_initial_values() -> None:
    """784 -> 7 x 128 -> 10: 200,842 parameters; torch's default range, or one deviation and biases of 0."""
    model = build()
    assert sum(p.numel() for p in model.parameters()) == 784 * 128 + 128 + 6 * (128 * 128 + 128) + 128 * 10 + 10 == 200_842
    assert model.config.built_depth == 8
    first = model.hidden[0].linear
    assert 0.99 / 28 < float(first.weight.detach().abs().max()) < 1 / 28
    assert 0 < float(first.bias.detach().abs().max()) < 1 / 28
    for std in (0.05, 10.0):
        model = build(f"--init normal --init-std {std}")
        assert float(model.hidden[3].linear.weight.detach().std()) == pytest.approx(std, rel=0.02)
        assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    again, other = build(seed=0), build(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(build().parameters(), again.parameters(), strict=True))
    assert not torch.equal(again.head.weight, other.head.weight)


def test_batchnorm_is_torchs() -> None:
    """Three training steps' worth of statistics, then evaluation, against nn.BatchNorm1d in its place."""
    model = build("--norm batchnorm --depth 3 --width 16")
    norms = [nn.BatchNorm1d(16), nn.BatchNorm1d(16)]

    def expected(x: Tensor) -> Tensor:
        y = x.flatten(1)
        for layer, norm in zip(model.hidden, norms, strict=True):
            y = torch.sigmoid(norm(layer.linear(y)))
        return model.head(y)

    for step in range(3):
        x = batch(6 + step)
        torch.testing.assert_close(model(x), expected(x))
        commit_running_statistics(model)
    model.eval()
    for norm in norms:
        norm.eval()
    torch.testing.assert_close(model(batch()), expected(batch()))


def test_the_gradient_is_normalised_by_the_formula() -> None:
    """(g - mean g) / (std g + 1e-6), the sample's deviation, also where g is tiny; forward nothing changes."""
    for scale in (1.0, 1e-6, 1e-12):
        x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        g = torch.randn(4, 5, dtype=torch.float64) * scale + 3 * scale
        y = normalised_gradient(x)
        assert torch.equal(y, x)
        y.backward(g)
        mean = g.sum() / 20
        deviation = ((g - mean).square().sum() / 19).sqrt()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, (g - mean) / (deviation + 1e-6), rtol=1e-12, atol=0.0)


def test_every_hidden_layer_normalises_its_gradient() -> None:
    """Autograd's weight gradients against a backward pass written out: each layer gets the normalised gradient of the next one."""
    model, x = build("--gradient-normalisation --init normal --init-std 0.05 --depth 4 --width 12").double(), batch().double()
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    nn.functional.cross_entropy(model(x), labels).backward()
    outputs = [x.flatten(1)]
    for layer in model.hidden:
        outputs.append(torch.sigmoid(layer.linear(outputs[-1])))
    probabilities = torch.softmax(model.head(outputs[-1]), 1)
    g = (probabilities - nn.functional.one_hot(labels, 10)) / len(labels) @ model.head.weight
    for i, layer in reversed(list(enumerate(model.hidden))):
        g = (g - g.mean()) / (g.std() + 1e-6)
        before = g * outputs[i + 1] * (1 - outputs[i + 1])
        torch.testing.assert_close(layer.linear.weight.grad, before.T @ outputs[i])
        torch.testing.assert_close(layer.linear.bias.grad, before.sum(0))
        g = before @ layer.linear.weight


def test_tensornorm_has_no_parameters_and_takes_the_batch_that_is_there() -> None:
    norm, x = TensorNorm(), torch.randn(7, 3) * 5 + 2
    assert list(norm.parameters()) == [] and list(norm.buffers()) == []
    for y in (norm(x), norm.eval()(x)):
        assert float(y.mean()) == pytest.approx(0, abs=1e-6) and float(y.std()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model mlp --depth 0", ["--depth 0 is out of range", "type for example --depth 8"]),
        ("--model mlp --patch-size 2", ["--patch-size is no setting of --model mlp", "--skip-pairs"]),
        ("--skip-pairs 1-3", ["--skip-pairs is no setting of --model convnext"]),
        ("--gradient-normalisation", ["--gradient-normalisation is no setting of --model convnext"]),
        ("--norm tensornorm", ["--norm tensornorm is not possible with --model convnext", "rmsnorm, none"]),
        ("--model vgg --norm tensornorm", ["possible: none, batchnorm"]),
        ("--model mlp --skip-pairs 3-1", ["'3-1' is no list of connections", "type for example 1-3,4-7"]),
        ("--model mlp --skip-pairs 1-3,", ["is no list of connections"]),
        ("--model mlp --skip-pairs 1-8", ["leads to hidden layer 8", "--depth 8 has 7 hidden layers"]),
        ("--model mlp --skip-pairs 1-3 --skip identity", ["leave one of them out"]),
        ("--model mlp --gradient-normalisation --accumulation 2", ["--accumulation 2", "--gradient-normalisation"]),
        ("--model mlp --gradient-normalisation --precision fp16", ["--precision fp16", "--gradient-normalisation"]),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        registry.build(parse(arguments.split()).model, IMAGES)
    assert [word for word in words if word not in str(refused.value)] == [], refused.value


def test_the_usual_network_is_the_studys() -> None:
    """What --model mlp is by itself."""
    usual = parse(["--model", "mlp"]).model
    expected = {"depth": 8, "width": 128, "activation": "sigmoid", "norm": "none", "skip": "none", "init": "torch", "skip_pairs": None}
    assert {name: getattr(usual, name) for name in expected} == expected
    assert ModelConfig().model == "convnext"
