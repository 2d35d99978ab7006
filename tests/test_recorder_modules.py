"""The recorder on models that are not deepscale's: against plain hooks and loops over `p.grad`."""

import copy
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepscale.config import ModelConfig
from deepscale.errors import UsageError
from deepscale.gradflow import Flow, Recorder, recorder
from deepscale.gradflow.flow import BLOCK_FIELDS
from deepscale.gradflow.health import verdict
from deepscale.gradflow.layers import layout_of_modules
from deepscale.gradflow.modules import ModuleObservation
from deepscale.gradflow.observation import statistics
from deepscale.models.convnext import ConvNeXt
from deepscale.models.observe import SATURATED


class Watch:
    """Plain hooks on some modules of a model, for one pass: outputs copied as they are made, and their gradients."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in names}
        self.handles = [model.get_submodule(name).register_forward_hook(self._keeper(name)) for name in names]

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            self.outputs[name].append(out.detach().double().clone())
            if out.requires_grad:
                out.register_hook(lambda g: self.gradients[name].append(g.double().clone()))

        return keep

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def fields(self) -> dict[str, list[float]]:
        """Mean, standard deviation and gradient of each module's outputs; its gradients' squares add up over its calls."""
        joined = {name: torch.cat([x.flatten() for x in outputs]) for name, outputs in self.outputs.items()}
        return {
            "output_mean": [x.mean().item() for x in joined.values()],
            "output_std": [x.std(unbiased=False).item() for x in joined.values()],
            "output_grad_l2": [sum(float(g.square().sum()) for g in gradients) ** 0.5 for gradients in self.gradients.values()],
        }


def assert_blocks(flow: Flow, record: int, expected: dict[str, list[float]], rtol: float = 1e-5) -> None:
    for name, values in expected.items():
        assert np.allclose(getattr(flow, name)[record], values, rtol=rtol, atol=rtol * 1e-2), name


def assert_weights(flow: Flow, record: int, gradients: dict[str, Tensor], rtol: float = 1e-5) -> None:
    for layer, name in enumerate(flow.layer_names.tolist()):
        g = gradients[name].double()
        for field, value in (("mean_abs", g.abs().mean()), ("l2", g.norm()), ("max_abs", g.abs().max())):
            assert getattr(flow, field)[record, layer] == pytest.approx(value.item(), rel=rtol), (field, name)


def recorded(model: nn.Module, x: Tensor, **settings: Any) -> tuple[Flow, dict[str, list[float]]]:
    """One pass and backward of the squared outputs, recorded; and the blocks' fields by plain hooks on a copy."""
    other = copy.deepcopy(model)
    record = Recorder(model, **settings)
    record.begin(1)
    model(x).square().mean().backward()
    record.gradients()
    flow = record.flow()
    watch = Watch(other, flow.block_names.tolist())
    other(x).square().mean().backward()
    assert_weights(flow, 0, {name: p.grad for name, p in other.named_parameters() if p.grad is not None})
    for own, plain in zip(model.parameters(), other.parameters(), strict=True):
        assert (own.grad is None and plain.grad is None) or torch.equal(own.grad, plain.grad), "recording changes nothing"
    return flow, watch.fields()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------------------------------------------------------- the example


def example() -> str:
    """The code of Recorder's docstring, from its imports to the flow."""
    lines = (Recorder.__doc__ or "").splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip().startswith("import torch"))
    last = next(i for i, line in enumerate(lines) if line.strip().startswith("flow = "))
    return textwrap.dedent("\n".join(lines[first : last + 1]))


def test_the_example_records_a_resnet() -> None:
    """The docstring's text as it stands, against the same three steps with plain hooks and `p.grad`."""
    torchvision = pytest.importorskip("torchvision")
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(example(), found)
    flow: Flow = found["flow"]
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert flow.layer_names.tolist() == [name for name, p in model.named_parameters() if p.ndim >= 2]
    assert flow.block_names.tolist() == [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert flow.block_groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert flow.steps.tolist() == [1, 2, 3] and flow.depth == 21 and set(flow.layer_kinds) == {"weight"}
    for record in range(3):
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        watch = Watch(model, flow.block_names.tolist())
        F.cross_entropy(model(images), labels).backward()
        watch.remove()
        rtol = 1e-3 if record else 1e-5  # training makes more of what one rounding does
        assert_blocks(flow, record, watch.fields(), rtol)
        assert_weights(flow, record, {name: p.grad for name, p in model.named_parameters()}, rtol)
        optimizer.step()
        optimizer.zero_grad()
        for layer, name in enumerate(flow.layer_names.tolist()):
            ratio = (dict(model.named_parameters())[name].detach() - before[name]).norm() / before[name].norm()
            known = flow.update_ratio[record, layer]
            assert np.isnan(known) or known == pytest.approx(ratio.item(), rel=1e-3)
    known = ~np.isnan(flow.update_ratio)
    assert (known == known[0]).all() and 2 <= known[0].sum() < 21, "45 MB of weights: some are copied"
    assert (flow.saturated > 0.1).all() and (flow.saturated < 0.9).all(), "ReLU"
    assert hooks_of(found["model"]) == 0


# -------------------------------------------------------------------------------------------------------- kinds of models


def mlp(layers: int, activation: type[nn.Module], width: int = 16) -> nn.Sequential:
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), activation())], nn.Linear(width, 3))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_mlp(activation: type[nn.Module], dtype: torch.dtype) -> None:
    """Blocks are its linear layers; each activation counts to the one before it, f' by autograd through the module alone."""
    model = mlp(4, activation).to(dtype)
    with torch.no_grad():
        for linear in model[::2]:
            linear.weight.mul_(6)
            linear.bias.copy_(torch.linspace(-9, 9, len(linear.bias)))
    x = torch.randn(32, 16, dtype=dtype)
    flow, expected = recorded(model, x)
    assert flow.block_names.tolist() == ["0", "2", "4", "6", "8"] and flow.block_depths.tolist() == [1, 2, 3, 4, 5]
    assert flow.block_groups.tolist() == [0, 0, 0, 0, 1]
    assert flow.l2.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert_blocks(flow, 0, expected)
    for block in range(4):
        h = model[: 2 * block + 1](x).detach().requires_grad_()
        (derivative,) = torch.autograd.grad(model[2 * block + 1](h).sum(), h)
        small = derivative.abs() < SATURATED
        assert flow.saturated[0, block] == pytest.approx(small.double().mean().item(), rel=1e-6)
        assert flow.dead[0, block] == pytest.approx(small.all(dim=0).double().mean().item(), rel=1e-6)
    assert flow.dead[0, :4].max() > 0
    assert np.isnan(flow.saturated[0, 4]) and np.isnan(flow.dead[0, 4]), "no activation follows the last one"


def vgg(inplace: bool) -> nn.Sequential:
    features: list[nn.Module] = []
    for channels, out in ((3, 8), (8, 8), (8, 16), (16, 16)):
        features += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace), *([nn.MaxPool2d(2)] if out == channels else [])]
    classifier = nn.Sequential(nn.Linear(16 * 4, 32), nn.SiLU(inplace), nn.Linear(32, 5))
    return nn.Sequential(nn.Sequential(*features), nn.Flatten(), classifier)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_vgg(inplace: bool) -> None:
    """Nested containers; activations in place overwrite the outputs that are observed, after they were."""
    model = vgg(inplace)
    with torch.no_grad():
        model[2][0].weight.mul_(1000)
    x = torch.randn(4, 3, 8, 8)
    flow, expected = recorded(model, x)
    assert flow.block_names.tolist() == ["0.0", "0.2", "0.5", "0.7", "2.0", "2.2"]
    assert flow.block_groups.tolist() == [0, 0, 1, 1, 2, 3], "channels, then no pixels, then fewer"
    assert_blocks(flow, 0, expected)
    h = model[0][:1](x).detach()
    assert flow.saturated[0, 0] == pytest.approx((h <= 0).double().mean().item(), rel=1e-6)
    h = model[2][0](model[1](model[0](x))).detach().requires_grad_()
    (derivative,) = torch.autograd.grad(F.silu(h).sum(), h)
    small = (derivative.abs() < SATURATED).double().mean().item()
    assert small > 0.05 and flow.saturated[0, 4] == pytest.approx(small, rel=1e-6)


def test_units_of_convolutions_are_channels() -> None:
    """Channel 1 of 3 is negative everywhere, channel 2 in half of the images."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 0.0, 1.0])[:, None, None, None])
        model[0].bias.copy_(torch.tensor([1.0, -1.0, 0.0]))
    flow, _ = recorded(model, torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None, None, None].expand(4, 1, 5, 7))
    assert flow.dead[0, 0] == pytest.approx(1 / 3, rel=1e-6)
    assert flow.saturated[0, 0] == pytest.approx(1 / 2, rel=1e-6)


def both(x: Tensor) -> Tensor:
    """(B, 4) -> (B, 2, 4): x and -x."""
    return torch.stack([x, -x], 1)


class Residual(nn.Module):
    """Two uses of one activation module, of 8 units with two rows an image and of 4 with one; a tuple as output; the skip is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.relu = nn.Linear(4, 8), nn.Linear(8, 4), nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        h = self.relu(self.wide(both(x)))
        out = self.relu(self.narrow(h.sum(1)))
        out = out + 0
        out += x
        return out, "more"


class Tower(nn.Module):
    """Blocks in a ModuleList, of which the second runs twice; what follows overwrites each block's output in place."""

    def __init__(self, twice: bool = False, block: Callable[[], nn.Module] = Residual) -> None:
        super().__init__()
        self.blocks, self.twice = nn.ModuleList([block() for _ in range(3)]), twice
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            for _ in range(1 + (self.twice and i == 1)):
                x, _ = block(x)
                x.mul_(2.0)
        return self.head(x)


def test_activations_of_a_block_are_pooled() -> None:
    """All 12 units of the two uses count once each: their numbers by a loop over the block's own steps."""
    model, x = Tower(), torch.randn(16, 4)
    flow, expected = recorded(model, x)
    assert flow.block_names.tolist() == ["blocks.0", "blocks.1", "blocks.2"] and flow.block_depths.tolist() == [2, 4, 6]
    assert_blocks(flow, 0, expected)
    for i, block in enumerate(model.blocks):
        wide = (block.wide(both(x)) <= 0).flatten(0, 1)
        narrow = block.narrow(F.relu(block.wide(both(x))).sum(1)) <= 0
        assert flow.saturated[0, i] == pytest.approx((wide.sum() + narrow.sum()).item() / (32 * 8 + 16 * 4), rel=1e-6)
        assert flow.dead[0, i] == pytest.approx((wide.all(0).sum() + narrow.all(0).sum()).item() / 12, rel=1e-6)
        x = 2 * block(x)[0].detach()


def test_modules_that_run_twice_add_up() -> None:
    flow, expected = recorded(Tower(twice=True), torch.randn(16, 4))
    assert_blocks(flow, 0, expected)
    once, _ = recorded(Tower(), torch.randn(16, 4))
    assert len(once.block_names) == len(flow.block_names)


def test_several_passes_equal_one_over_the_joined_batch() -> None:
    """Accumulation: dead is dead in all micro batches, not in one."""
    model = mlp(3, nn.ReLU).double()
    joined, _ = recorded(copy.deepcopy(model), x := torch.randn(12, 16, dtype=torch.float64))
    record = Recorder(model)
    record.begin(1)
    for part in x.chunk(3):
        (model(part).square().mean() / 3).backward()
    record.gradients()
    flow = record.flow()
    assert joined.dead[0, :3].max() > 0
    for name in (*BLOCK_FIELDS, "mean_abs", "l2", "max_abs", "zeros"):
        assert np.allclose(getattr(flow, name), getattr(joined, name), rtol=1e-9, equal_nan=True), name


def test_two_ranks_equal_one_with_the_joined_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's loss is the mean over its own half; what the second sends is added to what the first sends."""
    model, x = mlp(3, nn.ReLU).double(), torch.randn(12, 16, dtype=torch.float64)
    joined, _ = recorded(copy.deepcopy(model), x)
    sent: list[Tensor] = []

    def all_reduce(values: Tensor) -> None:
        values.add_(sent[0]) if sent else sent.append(values.clone())

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    observation = ModuleObservation(model, layout_of_modules(model, None), torch.device("cpu"))
    for part in reversed(x.chunk(2)):
        observation.attach(activations=True)
        model(part).square().mean().backward()
        fields = statistics(observation.detach(), spread=True, loss_scale=1.0, data_size=2)
    assert len(sent) == 1 and joined.dead[0, :3].max() > 0
    for name, values in fields.items():
        assert np.allclose(values.numpy(), getattr(joined, name)[0], rtol=1e-9, equal_nan=True), name


def test_a_vanishing_mlp_shows_it() -> None:
    """30 sigmoid layers: the gradient of the outputs falls all the way to the image, and the verdict says so; with ReLU at He's scale it does not."""
    for activation, label in ((nn.Sigmoid, "vanishing"), (nn.ReLU, "healthy")):
        model = mlp(30, activation, width=64)
        if activation is nn.ReLU:
            for linear in model[::2]:
                nn.init.kaiming_normal_(linear.weight)
        flow, expected = recorded(model, torch.randn(32, 64))
        assert_blocks(flow, 0, expected)
        gradient = flow.output_grad_l2[0, :-1]
        if label == "vanishing":
            assert (np.diff(np.log10(gradient)) > 0.1).all() and gradient[0] < 1e-12 * gradient[-1]
        assert verdict(flow).label == label, verdict(flow).sentence


# ----------------------------------------------------------------------------------------------------- choice of the blocks


class Plain(nn.Module):
    """No containers; `forget` is trained but never run."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two, self.forget = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)))


def test_without_containers_blocks_are_the_modules_with_layers() -> None:
    model = Plain()
    record = Recorder(model)
    record.begin(1)
    model(torch.randn(5, 4)).sum().backward()
    record.gradients()
    flow = record.flow()
    assert flow.block_names.tolist() == ["one", "two", "forget"] and flow.block_groups.tolist() == [0, 1, 1]
    assert all(np.isnan(getattr(flow, name)[0, 2]) for name in BLOCK_FIELDS), "what does not run is not recorded"
    assert flow.zeros[0].tolist() == [0, 0, 1], "nor has it a gradient"
    assert flow.saturated[0, 0] >= 0


def test_blocks_by_name() -> None:
    """Any modules, in any order: they are recorded in path order; a module without layers has the depth of the layer before it.

    An activation that is a block is its own; the others in a block that holds blocks are that one's.
    """
    model, x = vgg(False), torch.randn(4, 3, 8, 8)
    flow, expected = recorded(model, x, blocks=["2", "0.1", "0"])
    assert flow.block_names.tolist() == ["0.1", "0", "2"] and flow.block_depths.tolist() == [1, 4, 6]
    assert_blocks(flow, 0, expected)
    off = [(model[0][:i](x) <= 0).double() for i in (1, 3, 6, 8)]
    assert flow.saturated[0, 0] == pytest.approx(off[0].mean().item(), rel=1e-6)
    assert flow.saturated[0, 1] == pytest.approx((sum(o.sum() for o in off[1:]) / sum(o.numel() for o in off[1:])).item(), rel=1e-6)
    assert Recorder(vgg(False), blocks=[]).flow().block_names.tolist() == []


def test_blocks_of_known_networks() -> None:
    """torchvision's, on the meta device: names as a reader of their code expects them."""
    models = pytest.importorskip("torchvision").models
    expected = {
        "vgg11": (11, ["features.0", "features.3"], "classifier.6"),
        "convnext_tiny": (23, ["features.0", "features.1.0"], "classifier.2"),  # its stem is a subclass of nn.Sequential
        "vit_b_16": (13, ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"], "heads.head"),
        "mobilenet_v3_small": (15, ["features.0", "features.1"], "classifier.3"),
    }
    for name, (count, first, last) in expected.items():
        with torch.device("meta"):
            layout = layout_of_modules(getattr(models, name)(), None)
        assert (len(layout.block_names), layout.block_names[:2], layout.block_names[-1]) == (count, first, last), name
        assert layout.block_depths == sorted(layout.block_depths)
        assert layout.block_depths[-1] == layout.depths[-1] == len(layout.names)


@pytest.mark.parametrize(
    ("model", "blocks", "said"),
    [
        (nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), None, "nothing to record"),
        (nn.ReLU(), None, "nothing to record"),
        (nn.Linear(2, 2).requires_grad_(False), None, "nothing to record"),
        (vgg(False), ["0.10"], "no module '0.10'.* such as '0'"),
        (vgg(False), [""], "no module ''"),
    ],
)
def test_what_cannot_be_recorded_is_a_sentence(model: nn.Module, blocks: list[str] | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Recorder(model, blocks=blocks)


def test_deepscales_own_network_takes_no_blocks() -> None:
    with pytest.raises(UsageError, match="leave `blocks` out"):
        Recorder(ConvNeXt(ModelConfig(depth=14, width=4, patch_size=4)), blocks=["head"])


# ------------------------------------------------------------------------------------------------- what is seen, and what not


def test_hooks_are_there_on_recorded_steps_only() -> None:
    """And begun twice, as after a step that failed, they count once."""
    model, x = mlp(2, nn.Tanh), torch.randn(4, 16)
    record = Recorder(model)
    for step in (1, 2):
        record.begin(step)
        model(x)
    assert hooks_of(model) > 0
    model.zero_grad()
    record.begin(3)
    model(x).square().mean().backward()
    record.gradients()
    assert hooks_of(model) == 0
    model(x).sum().backward()
    flow = record.flow()
    reference, expected = recorded(copy.deepcopy(model).requires_grad_(), x)
    assert flow.steps.tolist() == [3], "steps that were begun and not finished are left out"
    assert_blocks(flow, 0, expected)
    assert flow.dead[0, 0] == reference.dead[0, 0]


def test_a_pass_without_gradients_and_one_that_failed_do_not_count() -> None:
    model, x = mlp(2, nn.Tanh), torch.randn(4, 16)
    _, expected = recorded(copy.deepcopy(model), x)
    record = Recorder(model)
    record.begin(1)
    with torch.no_grad():
        model(100 * x)
    model.train()
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 7))
    model(x).square().mean().backward()
    record.gradients()
    assert_blocks(record.flow(), 0, expected)
    assert record.flow().saturated[0, 0] < 0.01, "100 times the input would saturate"


def test_a_frozen_beginning_has_no_gradient() -> None:
    """Its outputs have a mean and a deviation; NaN, not 0, is their gradient."""
    model = mlp(3, nn.Tanh)
    model[:3].requires_grad_(False)
    flow, _ = recorded(copy.deepcopy(model), torch.randn(4, 16))
    assert flow.layer_names.tolist() == ["4.weight", "6.weight"] and flow.block_names.tolist() == ["4", "6"]
    flow, _ = recorded(model, torch.randn(4, 16), blocks=["0", "4"])
    assert np.isnan(flow.output_grad_l2[0]).tolist() == [True, False] and (flow.output_std[0] > 0).all()


def test_saturation_is_counted_when_asked() -> None:
    model = mlp(2, nn.Tanh)
    record = Recorder(model)
    record.begin(1, activations=False)
    model(torch.randn(4, 16)).sum().backward()
    record.gradients()
    flow = record.flow()
    assert np.isnan(flow.saturated).all() and np.isnan(flow.dead).all() and (flow.output_std > 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Every block's forward pass runs twice; its gradient is there once."""

    class Checkpointed(Tower):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x, _ = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    class Straight(Tower):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x, _ = block(x)
            return self.head(x)

    x = torch.randn(16, 4, requires_grad=True)
    model = Checkpointed()
    straight = Straight()
    straight.load_state_dict(model.state_dict())
    _, expected = recorded(straight, x)
    record = Recorder(model)
    record.begin(1)
    model(x).square().mean().backward()
    record.gradients()
    assert_blocks(record.flow(), 0, expected)


def test_autocast_and_a_scaled_loss() -> None:
    """bf16 outputs and gradients, a loss times 1,024 with `p.grad` unscaled: within 3 % of float32's (bfloat16 keeps 8 bits)."""
    model, x = mlp(4, nn.GELU), torch.randn(64, 16)
    exact, _ = recorded(copy.deepcopy(model), x)
    record = Recorder(model)
    record.begin(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    (1024 * loss).backward()
    for parameter in model.parameters():
        parameter.grad /= 1024
    record.gradients(loss_scale=1024)
    flow = record.flow()
    for name in ("output_std", "output_grad_l2", "l2"):
        assert np.allclose(getattr(flow, name), getattr(exact, name), rtol=0.03), name
        assert not np.allclose(getattr(flow, name), getattr(exact, name), rtol=1e-6), name


def test_few_of_many_weights_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any model: with room for a quarter, every fourth module's update is measured, and one that is larger than that is not."""
    monkeypatch.setattr(recorder, "CHANGE_BYTES", 0)
    monkeypatch.setattr(recorder, "CHANGE_SHARE", 1 / 4)
    model = mlp(12, nn.ReLU)
    record = Recorder(model)
    assert sum(record.parameters[name].numel() for name in record.changing) <= sum(p.numel() for p in model.parameters()) / 3
    assert len(record.changing) == 4
    assert Recorder(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1))).changing == []
