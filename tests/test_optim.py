"""Weight decay by role, AdamW in pieces against torch's, and the learning rate over a run."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from deepscale import ops, optim
from deepscale.config import NORM_NAMES, ModelConfig, RecipeConfig
from deepscale.models.convnext import ConvNeXt, parameter_groups
from deepscale.models.reference import PlainConvNeXt
from deepscale.optim import DIV_FACTOR, PIECE, AdamWInPieces, build_optimizer, build_schedule, start

STEPS = 20


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"blocks": (1, 1, 2, 1), "width": 4, "patch_size": 1, **settings})


def grouped_names(network: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the decayed and of the other parameters, each of which is in one group, once."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, rest = parameter_groups(network, 0.01)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    listed = [[names[id(parameter)] for parameter in group["params"]] for group in (decayed, rest)]  # type: ignore[attr-defined]
    assert sorted(listed[0] + listed[1]) == sorted(names.values())
    return set(listed[0]), set(listed[1])


def test_weight_decay_goes_to_convolution_and_linear_weights_alone() -> None:
    """The published network in stacks: both groups, listed by hand. Stacked biases, norms and gammas have two dimensions and do not decay."""
    decayed, rest = grouped_names(ConvNeXt(config(), stack_size=3))
    stages = range(4)
    assert decayed == {
        "stem.conv.weight",
        "head.linear.weight",
        *(f"stages.{s}.downsample.conv.weight" for s in stages[1:]),
        *(f"stages.{s}.stacks.0.{name}_weight" for s in stages for name in ("dwconv", "pwconv1", "pwconv2")),
    }
    assert rest == {
        *("stem.conv.bias", "stem.norm.weight", "stem.norm.bias", "head.linear.bias", "head.norm.weight", "head.norm.bias"),
        *(f"stages.{s}.downsample.{name}" for s in stages[1:] for name in ("conv.bias", "norm.weight", "norm.bias")),
        *(
            f"stages.{s}.stacks.0.{name}"
            for s in stages
            for name in ("dwconv_bias", "pwconv1_bias", "pwconv2_bias", "norm_weight", "norm_bias", "gamma")
        ),
    }


@pytest.mark.parametrize("norm", NORM_NAMES)
@pytest.mark.parametrize("shape", ["scalar", "channel", "none"])
def test_roles_are_the_same_stacked_and_plain(norm: str, shape: str) -> None:
    """Decayed plain parameters against a rule over modules (every convolution's and linear's weight), and as many values decay in stacks."""
    gamma = {"layerscale_init": None} if shape == "none" else {"layerscale_init": 0.5, "layerscale_shape": shape}
    plain, stacked = PlainConvNeXt(config(norm=norm, **gamma)), ConvNeXt(config(norm=norm, **gamma), stack_size=2)
    expected = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert grouped_names(plain)[0] == expected
    own, other = (dict(network.named_parameters()) for network in (stacked, plain))
    assert sum(own[name].numel() for name in grouped_names(stacked)[0]) == sum(other[name].numel() for name in expected)


def test_decay_shrinks_the_weights_and_nothing_else() -> None:
    """A step with all gradients 0 against p * (1 - lr * decay) for decayed and p for other parameters, exactly."""
    network = ConvNeXt(config(), stack_size=2).initialise(0)
    optimizer = build_optimizer(network, RecipeConfig(lr=0.1, weight_decay=0.5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer.step()
    decayed, rest = grouped_names(network)
    now = dict(network.named_parameters())
    for name in decayed:
        torch.testing.assert_close(now[name], before[name] * (1 - 0.1 * 0.5))
    for name in rest:
        assert torch.equal(now[name], before[name]), name


def test_two_steps_are_adamws_formula() -> None:
    """float64 against the paper's formula (arXiv:1711.05101) written out: moments, bias correction, epsilon outside the root, decoupled decay."""
    lr, decay, beta1, beta2, eps = 0.1, 0.3, 0.8, 0.99, 1e-3
    linear = nn.Linear(3, 2).double()
    optimizer = build_optimizer(linear, RecipeConfig(lr=lr, weight_decay=decay, beta1=beta1, beta2=beta2, eps=eps))
    p, m, v = linear.weight.detach().clone(), 0.0, 0.0
    for t in (1, 2):
        g = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        linear.weight.grad, linear.bias.grad = g.clone(), torch.zeros(2, dtype=torch.float64)
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p = p * (1 - lr * decay) - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        torch.testing.assert_close(linear.weight.detach(), p, rtol=1e-12, atol=1e-14)


SIZES = [1, 15, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5]


def parameters_of_many_sizes() -> list[nn.Parameter]:
    """Around the edges of a piece, of several dimensions, and one whose memory is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(size, generator=generator) for size in SIZES]
    folded = torch.randn(7, 3, PIECE // 4, generator=generator)
    return [nn.Parameter(value) for value in (*flat, folded, torch.randn(300, 700, generator=generator).t())]


def fill_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """The third parameter has none in every second step, as where a part of a network did not take part."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if i == 2 and step % 2 else gradient


def as_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2], "weight_decay": 0.0}]


def test_pieces_give_the_values_of_torchs_adamw() -> None:
    """Four steps at changing rates and beta1 against torch.optim.AdamW (its plain loop), bit for bit."""
    ours, torchs = parameters_of_many_sizes(), parameters_of_many_sizes()
    optimizers = AdamWInPieces(as_groups(ours), lr=1e-3), AdamW(as_groups(torchs), lr=1e-3, foreach=False)
    for step in range(4):
        for parameters, optimizer in zip((ours, torchs), optimizers, strict=True):
            fill_gradients(parameters, step)
            for group in optimizer.param_groups:
                group["lr"], group["betas"] = 1e-3 * (step + 1), (0.95 - 0.02 * step, 0.999)
            optimizer.step()
    for own, other in zip(ours, torchs, strict=True):
        assert torch.equal(own, other), tuple(own.shape)
    for own, other in zip(ours, torchs, strict=True):
        for name, value in optimizers[1].state[other].items():
            assert torch.equal(optimizers[0].state[own][name], value), name


def test_the_optimisers_state_goes_on_where_it_was_saved() -> None:
    """Two steps, the state into a new optimiser, two more: against four steps without interruption."""
    once, twice = parameters_of_many_sizes(), parameters_of_many_sizes()
    optimizer = AdamWInPieces(as_groups(once), lr=1e-2)
    for step in range(4):
        fill_gradients(once, step)
        optimizer.step()
    optimizer = AdamWInPieces(as_groups(twice), lr=1e-2)
    for step in range(4):
        if step == 2:
            state = optimizer.state_dict()
            optimizer = AdamWInPieces(as_groups(twice), lr=1e-2)
            optimizer.load_state_dict(state)
        fill_gradients(twice, step)
        optimizer.step()
    for own, other in zip(once, twice, strict=True):
        assert torch.equal(own, other)


def rates(recipe: RecipeConfig, steps: int) -> tuple[list[float], list[float]]:
    """Learning rate and beta1 of each of the run's steps."""
    network = nn.Linear(2, 2)
    optimizer = build_optimizer(network, recipe)
    start(optimizer, recipe)
    schedule = build_schedule(optimizer, recipe, steps)
    lrs, beta1s = [], []
    for _ in range(steps):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1, "one rate for both groups"
        lrs.append(optimizer.param_groups[0]["lr"])
        beta1s.append(optimizer.param_groups[0]["betas"][0])
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()
    return lrs, beta1s


def test_onecycle_is_torchs_with_its_defaults() -> None:
    """Rate and beta1 of every step against OneCycleLR(max_lr, total_steps) on torch's AdamW, and the published landmarks of both."""
    reference = AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = OneCycleLR(reference, max_lr=3e-3, total_steps=STEPS)
    expected: tuple[list[float], list[float]] = [], []
    for _ in range(STEPS):
        expected[0].append(reference.param_groups[0]["lr"])
        expected[1].append(reference.param_groups[0]["betas"][0])
        reference.step()
        schedule.step()
    lrs, beta1s = rates(RecipeConfig(lr=3e-3), STEPS)
    assert lrs == expected[0]
    assert beta1s == expected[1]
    assert lrs[0] == pytest.approx(3e-3 / 25)
    assert max(lrs) == lrs[5] == pytest.approx(3e-3), "the peak, at 0.3 of the run"
    assert lrs[-1] == pytest.approx(3e-3 / 25 / 1e4)
    assert (beta1s[0], min(beta1s), beta1s[-1]) == pytest.approx((0.95, 0.85, 0.95))


def test_cosine_falls_from_the_rate_to_zero() -> None:
    """Every step against half a cosine written out."""
    lrs, beta1s = rates(RecipeConfig(lr=3e-3, schedule="cosine", beta1=0.8), STEPS)
    assert lrs == pytest.approx([3e-3 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)])
    assert set(beta1s) == {0.8}


def test_constant_stays() -> None:
    lrs, beta1s = rates(RecipeConfig(lr=3e-3, schedule="constant", beta1=0.8), STEPS)
    assert set(lrs) == {3e-3}
    assert set(beta1s) == {0.8}


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_the_shortest_runs_have_a_schedule(schedule: str, steps: int) -> None:
    """As many steps as asked, each at a rate above 0 and not above the peak."""
    lrs, _ = rates(RecipeConfig(lr=3e-3, schedule=schedule), steps)
    assert len(lrs) == steps
    assert all(0 < lr <= 3e-3 * (1 + 1e-12) for lr in lrs), lrs


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_calibration_steps_run_at_the_rate_of_the_first_step(schedule: str) -> None:
    """What `start` sets before the length is known, against the schedule's first step."""
    recipe = RecipeConfig(lr=3e-3, schedule=schedule)
    optimizer = build_optimizer(nn.Linear(2, 2), recipe)
    start(optimizer, recipe)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rates(recipe, STEPS)[0][0]] * 2)
    assert (optimizer.param_groups[0]["lr"] == 3e-3 / DIV_FACTOR) == (schedule == "onecycle")


def test_nothing_of_a_tensors_size_is_made_in_a_step() -> None:
    """After the first step (which makes the moments), the largest new tensor of a step is a piece, for a parameter of eight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, out.numel())
            return out

    parameter = nn.Parameter(torch.ones(8 * PIECE))
    optimizer = AdamWInPieces([parameter], lr=1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Largest() as largest:
        optimizer.step()
    assert 0 < largest.elements <= PIECE


def test_deepspeeds_cpu_step_depends_on_the_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 20 steps, one that starts from the state of another goes on as that one does; the op by itself does not (_forget_products)."""
    pytest.importorskip("deepspeed")
    if reason := ops.ensure_ops(["cpu_adam"], lambda line: None)["cpu_adam"]:
        pytest.skip(reason)

    def parted() -> bool:
        models = [torch.nn.Linear(50, 20) for _ in range(2)]
        first, second = (build_optimizer(model, RecipeConfig(beta1=0.87, beta2=0.991), cpu_adam=True) for model in models)
        for step in range(40):
            if step == 20:
                for own, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
                    own.data.copy_(other)
                    second.state[own] = {key: value.clone() if isinstance(value, Tensor) else value for key, value in first.state[other].items()}
            for model, optimizer in zip(models, (first, second), strict=True):
                if step >= 20 or model is models[0]:
                    for parameter in model.parameters():
                        parameter.grad = torch.cos((step + 3.0) * parameter.detach())
                    optimizer.step()
        return not all(torch.equal(own, other) for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True))

    assert not parted()
    monkeypatch.setattr(optim, "_forget_products", lambda *_: None)
    assert parted()
