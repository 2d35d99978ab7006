"""What a network is before any training: gradient and signal at every block, and the singular values of its blocks' Jacobian."""

from collections.abc import Mapping

import numpy as np
import torch

from deepscale import config
from deepscale.gradflow.flow import Flow
from deepscale.gradflow.jacobian import input_of, longest_part, singular_values
from deepscale.gradflow.probe import Variant, images_of, probe
from deepscale.gradflow.values import depth_curve
from deepscale.models.network import Network
from deepscale.studies.study import Measured
from deepscale.sweeps import values
from deepscale.train import build_model
from deepscale.world import World

LEFT = "gradient, first block over last"
ZERO = "blocks whose gradient is exactly 0"
SIGNAL = "signal, last block over first"
SMALLEST, MEDIAN, LARGEST, NEAR_ONE = (f"singular values: {name}" for name in ("smallest", "median", "largest", "within 10 times of the largest"))
POINTS = 100


def measure(settings: Mapping[str, str], seed: int) -> Measured:
    """Of the network that train.py would begin with: one forward and backward pass on a batch, and, but with `singular` 0, one on as many
    copies of its first image as the deepest stage has values."""
    typed = {name: text for name, text in settings.items() if name != "singular"} | {"seed": str(seed), "threads": "1"}
    asked = config.parse([word for name, text in typed.items() for word in values.arguments(name, text)])
    result = next(probe([Variant("", asked)], 1, print))
    numbers = of_flow(result.flow)
    if settings.get("singular") != "0":
        place = World(0, 1, 0, 1, torch.device("cpu"))
        info, take = images_of(result.variant.config, 1, place, print)
        numbers |= of_jacobian(build_model(result.variant.config, info, place), take(1)[0][0])
    profiles = {field: {"0": depth_curve(result.flow, -1, field, POINTS)} for field in ("mean_abs", "output_grad_l2", "output_std")}
    return Measured(numbers, profiles=profiles)


def of_flow(flow: Flow) -> dict[str, float]:
    """How much of gradient and signal there is at the one end of the blocks, over what there is at the other. An infinite one is left out."""
    gradient, signal = (np.asarray(field[-1], np.float64) for field in (flow.output_grad_l2, flow.output_std))
    numbers = {ZERO: float(np.mean(gradient == 0)), "parameters": float("nan")}
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers |= {LEFT: float(gradient[0] / gradient[-1]), SIGNAL: float(signal[-1] / signal[0])}
    return {name: value for name, value in numbers.items() if np.isfinite(value)}


def of_jacobian(model: Network, image: torch.Tensor) -> dict[str, float]:
    """The singular values of the longest part with blocks of one width, at an image (1, C, H, W)."""
    _, part = longest_part(model)
    found = singular_values(part, input_of(part, model, image))
    if not bool(torch.isfinite(found).all()):
        return {}
    largest = float(found[0])
    return {
        LARGEST: largest, MEDIAN: float(found.median()), SMALLEST: float(found[-1]),
        NEAR_ONE: float((found > largest / 10).double().mean()) if largest else 0.0,
    }  # fmt: skip
