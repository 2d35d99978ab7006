"""VGG08 and VGG38: the coursework's parameter counts, its blocks by hand, torch's own initial values, and a training of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepscale.config import Config, ModelConfig, differing, parse
from deepscale.errors import UsageError
from deepscale.models import registry
from deepscale.models.components import BatchNorm, ChannelNorm
from deepscale.models.network import first_layer
from deepscale.models.registry import Images
from deepscale.models.vgg import VGG, ProcessingBlock, ReductionBlock

CIFAR100 = Images(3, 32, 100)


def model(**settings: object) -> ModelConfig:
    return Config().replace(model="vgg", **settings).model


@pytest.mark.parametrize(
    ("depth", "norm", "skip", "parameters"),
    [
        (8, "none", "none", 59_716),
        (38, "none", "none", 336_196),
        (38, "batchnorm", "none", 338_500),
        (38, "none", "identity", 336_196),
        (38, "batchnorm", "identity", 338_500),
    ],
)
def test_parameters_are_the_published_ones(depth: int, norm: str, skip: str, parameters: int) -> None:
    network = VGG(model(depth=depth, norm=norm, skip=skip), CIFAR100)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == depth
    assert sum(p.numel() for p in VGG(model(depth=depth, norm=norm, skip=skip, skip_scope="all"), CIFAR100).parameters()) == parameters


def written_out(block: nn.Module, x: Tensor, reduction: bool, norm: bool, skip: bool) -> Tensor:
    """studies.md's description, step by step, with torch's own BatchNorm."""

    def normalised(y: Tensor) -> Tensor:
        return F.batch_norm(y, None, None, training=True) if norm else y  # weights 1 and biases 0

    y = F.leaky_relu(normalised(block.conv1(x)), 0.01)  # type: ignore[operator]
    y = F.avg_pool2d(y, 2) if reduction else y
    y = normalised(block.conv2(y))  # type: ignore[operator]
    if skip:
        y = y + (F.avg_pool2d(x, 2) if reduction else x)
    return F.leaky_relu(y, 0.01)


@pytest.mark.parametrize("norm", ["none", "batchnorm"])
@pytest.mark.parametrize(("skip", "scope"), [("none", "blocks"), ("identity", "blocks"), ("identity", "all")])
def test_blocks_are_those_of_the_coursework(norm: str, skip: str, scope: str) -> None:
    """The activation comes after the sum; reduction blocks have a sum with --skip-scope all only."""
    network = VGG(model(depth=14, norm=norm, skip=skip, skip_scope=scope, width=8), CIFAR100).initialise(0).double()
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for block in network.blocks:
        reduction = isinstance(block, ReductionBlock)
        assert reduction or isinstance(block, ProcessingBlock)
        with_skip = skip == "identity" and (scope == "all" or not reduction)
        torch.testing.assert_close(block(x), written_out(block, x, reduction, norm == "batchnorm", with_skip), rtol=1e-10, atol=1e-12)
        assert block.conv1.bias is not None if reduction else block.conv1.bias is None
    assert [type(block) for block in network.blocks] == [ProcessingBlock, ReductionBlock] * 3


def test_initial_values_are_drawn_as_torch_draws_them() -> None:
    """Uniform within 1 / sqrt(fan in), weights and biases; each by its own name and seed; norms 1 and 0."""
    network = VGG(model(depth=38, norm="batchnorm"), CIFAR100).initialise(3)
    again, other = (VGG(model(depth=38, norm="batchnorm"), CIFAR100).initialise(seed) for seed in (3, 4))
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        bound = module.weight[0].numel() ** -0.5
        for own in ("weight", "bias"):
            value = getattr(module, own)
            if value is not None:
                assert 0.9 * bound < value.abs().max() <= bound, name
                assert abs(float(value.detach().std()) - bound / 3**0.5) < (0.1 if value.numel() > 500 else 0.35) * bound, name
                assert torch.equal(value, getattr(again.get_submodule(name), own)), name
                assert not torch.equal(value, getattr(other.get_submodule(name), own)), name
    assert bool((network.entry.norm.weight == 1).all()) and not network.entry.norm.bias.any()


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_of_images_is_that_of_rows(training: bool) -> None:
    """torch's kernel against ChannelNorm written out: outputs, gradients, and running statistics after a step."""
    found = []
    for norm in (BatchNorm(5), ChannelNorm("batchnorm", 5)):
        norm = norm.double().train(training)
        with torch.no_grad():
            norm.weight.copy_(torch.arange(1.0, 6.0)), norm.bias.copy_(torch.arange(5.0))
        norm.statistics.running_mean.fill_(0.3)
        x = torch.randn(4, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = norm(x) if isinstance(norm, BatchNorm) else norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y.pow(3).sum().backward()
        norm.statistics.commit()
        found.append([y, x.grad, norm.weight.grad, norm.bias.grad, norm.statistics.running_mean, norm.statistics.running_var])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


def test_what_a_network_does_not_know_is_refused_with_what_it_knows() -> None:
    for arguments in (["--model", "vgg", "--kernel-size", "5"], ["--skip-scope", "all"]):
        with pytest.raises(UsageError) as refused:
            parse(arguments)
        flag, name = arguments[-2], arguments[1] if len(arguments) > 2 else "convnext"
        assert f"{flag} is no setting of --model {name}, which knows --depth, " in str(refused.value)
        assert all(f"--{known.replace('_', '-')}" in str(refused.value) for known in registry.MODELS[name].settings)
    with pytest.raises(UsageError, match="--kernel-size is no setting of --model vgg"):
        ModelConfig(model="vgg", norm="none", skip="none", init="torch", kernel_size=5)
    with pytest.raises(UsageError, match="--norm rmsnorm is not possible with --model vgg; possible: none, batchnorm"):
        parse(["--model", "vgg", "--norm", "rmsnorm"])
    with pytest.raises(UsageError, match="--depth 3 is out of range: --model vgg has 8 layers or more in steps of 6"):
        parse(["--model", "vgg", "--depth", "3"])
    with pytest.raises(UsageError, match="images of 4 pixels are too small"):
        VGG(model(), Images(3, 4, 10))


def test_a_networks_own_defaults_are_no_differences() -> None:
    """Depth is rounded up to 8 + 6n; from another network its chosen settings come along, its defaults do not."""
    asked = parse(["--model", "vgg", "--depth", "10"])
    assert asked.model.built_depth == 14 and asked.model.stage_blocks == ()
    assert (asked.model.norm, asked.model.skip, asked.model.init, asked.model.width) == ("none", "none", "torch", 32)
    assert differing(parse(["--model", "vgg"])) == {"model": "vgg"}
    moved = Config().replace(depth=14, lr=0.1).replace(model="vgg")
    assert (moved.model.depth, moved.model.norm, moved.recipe.lr) == (14, "none", 0.1)
    assert moved.replace(model="convnext") == Config().replace(depth=14, lr=0.1)


def test_the_first_layer_is_the_entrys_convolution() -> None:
    network = VGG(model(depth=8), CIFAR100)
    assert first_layer(network) is network.entry.conv
