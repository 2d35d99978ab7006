"""The original study's finding, tested on real networks at initialisation: what skip connections do to the first layer's gradient.

"Going Beyond the 1000-Layer Convolution Network": with them the first layer's gradient is of the same order at every depth, without
them it is gone.
"""

import pytest
import torch

from deepscale import gradflow
from deepscale.activations import Recompute
from deepscale.config import ModelConfig
from deepscale.models.convnext import ConvNeXt, cross_entropy

DEPTHS = (26, 110, 302, 1004)


def first_layer(depth: int, skip: str, gamma: float | None = None, width: int = 4) -> float:
    """Mean |g| of the stem's weight over one batch of made-up images."""
    torch.set_num_threads(1)  # small operators: a second thread on a busy core would stall them
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32, generator=random), torch.randint(10, (8,), generator=random)
    settings = ModelConfig(depth=depth, width=width, patch_size=4, skip=skip, layerscale_init=gamma)
    model = Recompute(4).apply(ConvNeXt(settings)).initialise(0)
    recorder = gradflow.Recorder(model, records=1)
    recorder.begin(0)
    cross_entropy(model(images), labels).backward()
    recorder.gradients()
    flow = recorder.flow()
    return float(flow.mean_abs[0, flow.layer("stem.conv")])


@pytest.mark.parametrize("gamma", [None, 0.0, 1e-6])
def test_with_skip_connections_the_first_layers_gradient_is_of_the_same_order_at_every_depth(gamma: float | None) -> None:
    found = [first_layer(depth, "identity", gamma) for depth in DEPTHS]
    assert min(found) > 1e-3 and max(found) / min(found) < 10, found


def test_without_them_it_is_gone() -> None:
    found = dict(zip(DEPTHS, (first_layer(depth, "none") for depth in DEPTHS), strict=True))
    assert found[26] > 1e-3  # shallow networks train without
    assert found[110] < 1e-3 * found[26] and found[302] < 1e-6 * found[26] and found[1004] < 1e-6 * found[26], found


def test_in_wider_networks_it_explodes_instead() -> None:
    """From width 32 on the branch amplifies with the published normal(0, 0.02): a network without skip connections is ill in another way."""
    found = {depth: first_layer(depth, "none", width=32) for depth in (26, 1004)}
    assert found[1004] > 10 * first_layer(1004, "identity", width=32) and found[1004] > 10 * found[26], found
