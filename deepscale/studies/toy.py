"""Study 1's first experiment: five fully connected layers with a sigmoid after each, and what is left of the gradient at the first.

The original trained one network, whose seed it does not name; here it is many, which differ in their seed alone. No convolution, no batch,
no data set: a loop of its own, in float32 and with torch's initial values, as published.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepscale import drawing
from deepscale.studies import figures
from deepscale.studies.page import amount
from deepscale.studies.study import CPU, FULL, SMOKE, Case, Converged, Figure, Finding, Measured, Results, Scale, Study

LAYERS = ("FC1", "FC2", "FC3", "FC4", "FC5")
SIZES = (1, 10, 10, 10, 10, 1)
TARGET, LR = 0.0, 0.01
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}
# What the original printed at the first step, and what its text divides by to get its "about 10,000 times".
PRINTED = {"FC5": 0.292, "FC1": 3.46e-9}
IN_THE_TEXT = {"FC5": 0.292, "FC1": 3.46e-5}
TEXT_SAYS = 10_000.0  # times
RATIOS = {"FC5/FC1": ("FC5", "FC1"), "FC5/FC4": ("FC5", "FC4")}
LEVELS = {"10 %": 10, "median": 50, "90 %": 90}  # percentiles over the networks
FLAT = 0.01  # where sigmoid' is below this share, the unit passes next to nothing on
SIGMOID = "sigmoid, x = 100"

Norms = NDArray[np.float64]


def measure(settings: Mapping[str, str], seed: int) -> Measured:
    """`networks` networks of the seeds from `seed` on: the norms of their weights' gradients, and the first layer's pre-activations."""
    runs = [train(settings, seed + i) for i in range(int(settings["networks"]))]
    norms, losses = np.array([run[0] for run in runs]), np.array([run[1] for run in runs])  # (networks, steps, 5), (networks, steps)
    before = np.array([run[2] for run in runs])  # (networks, 10)
    numbers: dict[str, float] = {
        "networks": len(runs),
        "loss": float(np.median(losses[:, -1])),
        "loss at the first step": float(np.median(losses[:, 0])),
    }
    curves: dict[str, Any] = {}
    for name, ratio in _ratios(norms[:, 0]).items():
        numbers |= {f"{name} {level}": _percentile(ratio, at) for level, at in LEVELS.items()}
        numbers[f"{name} infinite"] = float(np.mean(np.isinf(ratio)))
        curves[name] = [(i, value) for i, value in enumerate(ratio.tolist())]
    steps = [step for step in range(1, norms.shape[1] + 1) if step <= 10 or step % 5 == 0]
    for i, layer in enumerate(LAYERS):
        numbers[f"{layer} median"] = _percentile(norms[:, 0, i], 50)
        for level, at in LEVELS.items():
            curves[f"{layer} {level}"] = [(step, _percentile(norms[:, step - 1, i], at)) for step in steps]
    slopes = _slope(before) if settings["activation"] == "sigmoid" else np.where(before > 0, 1.0, 0.0)
    numbers["flat"] = float(np.mean(slopes < FLAT))
    counts, edges = np.histogram(before, bins=40)
    curves["pre-activations"] = [((low + high) / 2, count) for low, high, count in zip(edges, edges[1:], counts.tolist(), strict=False)]
    curves["pre-activations of the first network"] = list(enumerate(before[0].tolist()))
    return Measured(numbers, curves)


def train(settings: Mapping[str, str], seed: int) -> tuple[list[list[float]], list[float], list[float]]:
    """One network: (L2 norms of the five weights' gradients, and the loss, at every step; the first layer's pre-activations at the first)."""
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, ACTIVATIONS[settings["activation"]]())))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, target = torch.tensor([[float(settings["x"])]]), torch.tensor([[TARGET]])
    before: Tensor = layers[0](x).detach()[0]
    norms, losses = [], []
    for _ in range(int(settings["steps"])):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        norms.append([float(layer.weight.grad.norm()) for layer in layers if layer.weight.grad is not None])
        losses.append(float(loss.detach()))
        optimizer.step()
    return norms, losses, before.tolist()


def _ratios(first: Norms) -> dict[str, Norms]:
    """Norms (networks, 5) -> ratios (networks,); infinite over an exact 0 in float32."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: first[:, LAYERS.index(above)] / first[:, LAYERS.index(below)] for name, (above, below) in RATIOS.items()}


def _percentile(values: Norms, at: float) -> float:
    """By the nearest value: nothing is interpolated to an infinite one."""
    known = values[~np.isnan(values)]
    return float(np.percentile(known, at, method="nearest")) if len(known) else math.nan


def _slope(z: Norms) -> Norms:
    """sigmoid'"""
    s = 1 / (1 + np.exp(-z))
    return np.asarray(s * (1 - s), np.float64)


def _within(name: str, published: float, factor: float) -> Callable[[Results], bool | None]:
    def holds(found: Results) -> bool | None:
        value = found.mean(SIGMOID, f"{name} median")
        return None if value is None else published / factor <= value <= published * factor

    return holds


def _spread(name: str) -> Callable[[Results], str]:
    def measured(found: Results) -> str:
        low, middle, high = (found.mean(SIGMOID, f"{name} {level}") for level in LEVELS)
        if low is None or middle is None or high is None:
            return ""
        none = found.mean(SIGMOID, f"{name} infinite") or 0.0
        zero = f"; exactly 0 in float32 at FC1 of {none:.0%}" if none else ""
        return f"{name} at the first step: median {amount(middle)}, 10-90 % {amount(low)} to {amount(high)} over {_networks(found)} networks{zero}"

    return measured


def _networks(found: Results) -> str:
    return f"{found.mean(SIGMOID, 'networks') or 0:.0f}"


def _usual(said: Mapping[str, float]) -> Callable[[Results], bool | None]:
    """Whether a published ratio lies between 10 and 90 % of the networks: they spread over too many decades for a mean."""

    def holds(found: Results) -> bool | None:
        low, high = found.mean(SIGMOID, "FC5/FC1 10 %"), found.mean(SIGMOID, "FC5/FC1 90 %")
        return None if low is None or high is None else low <= said["FC5"] / said["FC1"] <= high

    return holds


def _mostly_flat(found: Results) -> bool | None:
    share = found.mean(SIGMOID, "flat")
    return None if share is None else share > 0.5


def _flat(found: Results) -> str:
    share, other = found.mean(SIGMOID, "flat"), found.mean("sigmoid, x = 1", "flat")
    if share is None or other is None:
        return ""
    return f"sigmoid' is below {FLAT:g} at {share:.0%} of them with x = 100, at {other:.0%} with x = 1; its largest value is 0.25"


def _input_matters(found: Results) -> bool | None:
    large, small = found.mean(SIGMOID, "FC5/FC1 median"), found.mean("sigmoid, x = 1", "FC5/FC1 median")
    return None if large is None or small is None else large > 10 * small


def _input_measured(found: Results) -> str:
    values = {name: found.mean(name, "FC5/FC1 median") for name in (SIGMOID, "sigmoid, x = 1", "relu, x = 100")}
    known = [f"{amount(value)} ({name})" for name, value in values.items() if value is not None]
    return f"median FC5/FC1: {', '.join(known)}" if known else ""


def norms_over_steps(found: Results, path: Path) -> bool:
    """The five norms over the steps: medians, with bands from 10 to 90 %."""
    row = next(iter(found[SIGMOID].rows), None)
    if row is None:
        return False
    pyplot = drawing.pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for layer, colour in zip(LAYERS, drawing.COLOURS, strict=False):
        steps, low = np.array(row.curves[f"{layer} 10 %"], float).T
        middle, high = (np.array(row.curves[f"{layer} {level}"], float)[:, 1] for level in ("median", "90 %"))
        axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.plot(steps, middle, color=colour, label=layer)
    axis.set_yscale("log")
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("gradient of the layer's weight, L2 norm")
    figures.legend(figure, axis)
    axis.margins(x=0.01)
    axis.grid(alpha=0.25)
    drawing.save(figure, path)
    return True


def on_the_sigmoid(found: Results, path: Path) -> bool:
    """The first layer's pre-activations: all networks' as a histogram, one network's on sigmoid and on its derivative."""
    row = next(iter(found[SIGMOID].rows), None)
    if row is None:
        return False
    pyplot = drawing.pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    places, counts = np.array(row.curves["pre-activations"], float).T
    axes[0].bar(places, counts, width=places[1] - places[0], color=drawing.COLOURS[5], edgecolor="white", linewidth=0.4)
    axes[0].set_ylabel(f"units of {_networks(found)} networks")
    own = np.array(row.curves["pre-activations of the first network"], float)[:, 1]
    z = np.linspace(min(-12.0, own.min()), max(12.0, own.max()), 800)
    curves: tuple[tuple[Any, str, Callable[[Norms], Norms]], ...] = (
        (axes[1], "sigmoid", lambda z: 1 / (1 + np.exp(-z))),
        (axes[2], "derivative of the sigmoid", _slope),
    )
    for axis, name, function in curves:
        axis.plot(z, function(z), color=drawing.COLOURS[0])
        axis.plot(own, function(own), "o", color=drawing.COLOURS[1], markeredgecolor="white", label="units of seed 0")
        axis.set_ylabel(name)
    axes[2].legend(frameon=False, fontsize=8, loc="upper right")
    for axis in axes:
        axis.set_xlabel("pre-activation of the first layer at the first step")
        axis.grid(alpha=0.25)
    drawing.save(figure, path)
    return True


def _about_the_text(found: Results) -> str:
    printed, text = (said["FC5"] / said["FC1"] for said in (PRINTED, IN_THE_TEXT))
    return (
        f"The original's text says that the first layer's gradient is about {amount(text)} times smaller than the last one's: it divides "
        f"{IN_THE_TEXT['FC5']:g} by {amount(IN_THE_TEXT['FC1'])}. Its notebook printed {amount(PRINTED['FC1'])}: that is {amount(printed)} times."
    )


STUDY = Study(
    name="toy",
    title="Five sigmoid layers: the vanishing gradient in its simplest form",
    question="How much of the gradient is left at the first of five fully connected layers with a sigmoid after each?",
    source='"Going Beyond the 1000-Layer Convolution Network" (Ludwiczuk), its first experiment: one network of one seed',
    cases=(
        Case(SIGMOID, {"activation": "sigmoid", "x": "100"}, {"FC5/FC1 median": 1e4, "FC5/FC4 median": 10.0}, compute=measure),
        Case("sigmoid, x = 1", {"activation": "sigmoid", "x": "1"}, compute=measure),
        Case("relu, x = 100", {"activation": "relu", "x": "100"}, compute=measure),
    ),
    scales={
        SMOKE: Scale({"networks": "10", "steps": "20"}, note="10 networks of 20 steps instead of 100 of 100"),
        CPU: Scale({"networks": "100", "steps": "100"}, note="the original's own size; 100 networks (seeds 0 to 99) where it trained one"),
        FULL: Scale({"networks": "100", "steps": "100"}, note="the same as at cpu scale"),
    },
    columns={
        "networks": "networks",
        "FC5/FC1 median": "FC5/FC1, median",
        "FC5/FC1 10 %": "10 %",
        "FC5/FC1 90 %": "90 %",
        "FC5/FC4 median": "FC5/FC4, median",
        "FC5/FC4 10 %": "10 %",
        "FC5/FC4 90 %": "90 %",
        "flat": "FC1 units that are flat",
        "loss": "loss at the end",
    },
    findings=(
        Finding(
            "From FC5 to FC4 the gradient falls about 10 times at the first step (the median within a factor of 3).",
            _within("FC5/FC4", 10.0, 3.0),
            _spread("FC5/FC4"),
        ),
        Finding(
            f"From FC5 to FC1 it falls about {amount(TEXT_SAYS)} times, as the text says (the median within a factor of 10).",
            _within("FC5/FC1", TEXT_SAYS, 10.0),
            _spread("FC5/FC1"),
        ),
        Finding("So it falls in a usual network: between 10 and 90 % of them.", _usual(IN_THE_TEXT), _spread("FC5/FC1")),
        Finding(f"What the notebook printed, {amount(PRINTED['FC5'] / PRINTED['FC1'])} times, is usual, too.", _usual(PRINTED), _spread("FC5/FC1")),
        Finding("Most units of the first layer lie where the sigmoid is flat.", _mostly_flat, _flat),
        Finding("Much of it is the input's doing, not depth's: with x = 1 the ratio is more than 10 times smaller.", _input_matters, _input_measured),
    ),
    figures=(
        Figure("norms", "The gradient's norm at each of the five layers: median of the networks, and bands from 10 to 90 %.", norms_over_steps),
        Figure(
            "sigmoid", "The first layer's pre-activations: of all networks, and one network's on the sigmoid and on its derivative.", on_the_sigmoid
        ),
    ),
    converged=Converged("loss", above=None, below=0.01),
    notes=(_about_the_text,),
)
