"""Convolutions and activations alone, without norm or skip connection: do 100, 1,000 and 10,000 layers train, and with which initial weights?"""

from collections.abc import Callable

from deepscale.bench.report import number
from deepscale.studies import at_start, figures
from deepscale.studies.at_start import LARGEST, LEFT, MEDIAN, NEAR_ONE, SIGNAL, SMALLEST, ZERO
from deepscale.studies.page import accuracies
from deepscale.studies.study import ACCURACY, CPU, FULL, SMOKE, TINY, Case, Converged, Figure, Finding, Results, Scale, Study

GRADIENT = "grad/first_layer_mean_abs"
INITS = {"delta-orthogonal": {"init": "delta-orthogonal"}, "normal": {"init": "normal"}, "kaiming": {"init": "kaiming"}}
DEPTHS = (100, 1_000, 10_000)
FAILING = ("normal", "kaiming")
RATES = {100: ("1e-4", "1e-2"), 1_000: ("1e-5", "1e-3")}  # depth -> other learning rates, at which those that fail are tried, too
# What the source names: 10,000 layers trained on CIFAR-10 and MNIST, without norm or skip connection.
ORTHOGONAL = "delta-orthogonal"
LINEAR = "delta-orthogonal, sigma_w 1, sigma_b 0"
LEARNED = 0.15  # validation accuracy: half as much again as chance, after the few steps that 10,000 layers get
SHORTER = {"max_steps": "200", "eval_every": "100"}
FLAT = 100.0  # times: first layer's gradient over the last one's, and the other way round


def trained(depth: int, init: str) -> str:
    """A case that is trained."""
    return f"{depth:,} layers, {init}"


def probed(depth: int, init: str) -> str:
    """A case that is looked at before any training."""
    return f"{depth:,} layers, {init}, before training"


def _probes() -> tuple[Case, ...]:
    every = {**INITS, LINEAR: {"init": "delta-orthogonal", "sigma_w": "1", "sigma_b": "0"}}
    return tuple(Case(probed(depth, name), {"depth": str(depth), **own}, compute=at_start.measure) for depth in DEPTHS for name, own in every.items())


def _trainings() -> tuple[Case, ...]:
    return tuple(Case(trained(depth, name), {"depth": str(depth), **own}) for depth in DEPTHS for name, own in INITS.items())


def at_rate(depth: int, init: str, rate: str) -> str:
    """A case that is trained with another learning rate."""
    return f"{trained(depth, init)}, lr {rate}"


def _other_rates() -> tuple[Case, ...]:
    return tuple(
        Case(at_rate(depth, init, rate), {"depth": str(depth), **INITS[init]}) for depth, rates in RATES.items() for init in FAILING for rate in rates
    )


def _failing() -> list[str]:
    """All trainings with weights that are expected to fail."""
    return [*(trained(depth, init) for depth in DEPTHS for init in FAILING), *(case.name for case in _other_rates())]


def _it_trains(depth: int) -> Callable[[Results], bool | None]:
    """A few minutes of 10,000 layers can show that they train, and not that they do not; a few steps of smoke scale show nothing."""

    def holds(found: Results) -> bool | None:
        trains = None if found.scale == SMOKE else found.converged(trained(depth, ORTHOGONAL))
        return trains or None if found.scale == CPU and depth == DEPTHS[-1] else trains

    return holds


def _others_do_not(found: Results) -> bool | None:
    """Of those that were trained."""
    known = [none for case in _failing() if (none := found.none_converged(case)) is not None]
    return all(known) if known else None


def _reached(depths: tuple[int, ...], inits: tuple[str, ...]) -> Callable[[Results], str]:
    return accuracies(*(trained(depth, init) for depth in depths for init in inits))


def _left(found: Results, init: str) -> dict[int, float | None]:
    """Depth -> the gradient at the first layer over the last one's, of those that were looked at; None where it is not finite."""
    return {depth: found.mean(probed(depth, init), LEFT) for depth in DEPTHS if found[probed(depth, init)].rows}


def _flat(value: float | None) -> bool:
    return value is not None and 1 / FLAT <= value <= FLAT


def _keeps(found: Results) -> bool | None:
    left = _left(found, ORTHOGONAL)
    return all(map(_flat, left.values())) if left else None


def _lose(found: Results) -> bool | None:
    left = [value for init in FAILING for depth, value in _left(found, init).items() if depth > DEPTHS[0]]
    return not any(map(_flat, left)) if left else None


def _gradients(*inits: str) -> Callable[[Results], str]:
    def measured(found: Results) -> str:
        parts = []
        for init in inits:
            values = [f"{'not finite' if value is None else number(value)} at {depth:,} layers" for depth, value in _left(found, init).items()]
            parts += [f"{init}: {', '.join(values)}"] if values else []
        return "first layer's gradient over the last one's: " + "; ".join(parts) if parts else ""

    return measured


def _isometric(found: Results) -> bool | None:
    """At 10,000 layers with tanh: nine tenths of the singular values within 10 times of the largest."""
    share = found.mean(probed(10_000, ORTHOGONAL), NEAR_ONE)
    return None if share is None else share >= 0.9


def _singular_values(found: Results) -> str:
    parts = []
    for depth in DEPTHS:
        for init in (ORTHOGONAL, LINEAR):
            low, middle, high = (found.mean(probed(depth, init), name) for name in (SMALLEST, MEDIAN, LARGEST))
            if low is not None and middle is not None and high is not None:
                parts.append(f"{number(low)} to {number(high)}, median {number(middle)} ({depth:,} layers, {init})")
    return "singular values with tanh: " + "; ".join(parts) if parts else ""


STUDY = Study(
    name="plain",
    title="Without skip connections: plain networks of up to 10,000 layers",
    question="Do networks of convolutions and tanh alone, without norm or skip connection, train at 100, 1,000 and 10,000 layers?",
    source='"Dynamical Isometry and a Mean Field Theory of CNNs: How to Train 10,000-Layer Vanilla Convolutional Neural Networks" (Xiao et al. 2018, '
    "arXiv:1806.05393)",
    cases=(*_trainings(), *_other_rates(), *_probes()),
    scales={
        SMOKE: Scale(
            {**{name: text for name, text in TINY.items() if name != "kernel"}, "model": "plain", "patch_size": "8", "lr": "1e-3"},
            cases=(trained(100, ORTHOGONAL), probed(1_000, ORTHOGONAL), probed(1_000, "normal")),
            note="width 4 on synthetic images, four steps; gradient and singular values of 1,000 layers",
        ),
        CPU: Scale(
            {
                "model": "plain", "dataset": "cifar10", "feed": "tensors", "width": "8", "patch_size": "8", "batch_size": "32", "lr": "1e-3",
                "weight_decay": "0", "max_steps": "600", "eval_every": "300", "eval_images": "2000",
            },
            changes={
                **{trained(1_000, init): {"lr": "1e-4", **SHORTER} for init in INITS},
                **{at_rate(100, init, rate): {"lr": rate} for init in FAILING for rate in RATES[100]},
                **{at_rate(1_000, init, rate): {"lr": rate, **SHORTER} for init in FAILING for rate in RATES[1_000]},
                **{trained(10_000, init): {"lr": "1e-5", "max_steps": "60", "eval_every": "60", "eval_images": "512"} for init in INITS},
            },
            note="width 8 on 4 x 4 pixels (one 8 x 8 convolution of stride 8 before them) where the paper is hundreds of channels wide, Adam, a "
            "tenth of the learning rate for ten times the depth (those that fail at 100 and 1,000 layers also with a tenth and ten times of it); "
            "600, 200 and 60 steps of 32 images",
        ),
        FULL: Scale(
            {
                "model": "plain", "dataset": "cifar10", "width": "256", "patch_size": "4", "batch_size": "128", "lr": "1e-4", "weight_decay": "0",
                "epochs": "30",
            },
            cases=tuple(case.name for case in (*_trainings(), *_probes())),
            changes={
                **{case.name: {"singular": "0"} for case in _probes()},  # its Jacobian has 16,384 rows
                **{trained(10_000, init): {"lr": "1e-6"} for init in INITS},
                **{trained(1_000, init): {"lr": "1e-5"} for init in INITS},
            },
            note="width 256 on 8 x 8 pixels; the paper's recipe is not all known: Adam with a learning rate that falls with the depth",
        ),
    },
    columns={
        ACCURACY: "validation", "test/accuracy": "test", "train/loss": "training loss", LEFT: "first layer's gradient over the last one's",
        ZERO: "layers without gradient", SIGNAL: "signal, last layer over first", SMALLEST: "singular values: smallest", MEDIAN: "median",
        LARGEST: "largest",
    },
    findings=(
        *(Finding(f"{depth:,} plain layers train with delta-orthogonal weights.", _it_trains(depth), _reached((depth,), (ORTHOGONAL,)))
          for depth in DEPTHS),
        Finding("With normal weights (deviation 0.02) and with Kaiming's none of these depths trains.", _others_do_not, accuracies(*_failing())),
        Finding(f"Delta-orthogonal weights keep the gradient within {FLAT:g} times over all layers, at every depth.", _keeps, _gradients(ORTHOGONAL)),
        Finding(f"With the others it vanishes or explodes by more than {FLAT:g} times at 1,000 layers and more.", _lose, _gradients(*FAILING)),
        Finding(
            "With tanh the network is still near to an isometry at 10,000 layers: nine tenths of the singular values of its layers' Jacobian lie "
            "within 10 times of the largest.", _isometric, _singular_values,
        ),
    ),
    figures=(
        Figure("curves", "Training loss and validation accuracy while they train, one seed.",
               figures.curves("train/loss", ACCURACY, cases=[case.name for case in _trainings()])),
        *(Figure(f"gradient-{depth}", f"Gradient at the output of each of {depth:,} layers before any training.",
                 figures.against_depth("output_grad_l2", (0,), cases=[case.name for case in _probes() if case.name.startswith(f"{depth:,} ")]))
          for depth in DEPTHS),
        Figure("gradient-trained", "Gradient of the weights of delta-orthogonal networks against depth, at the first and at the last step.",
               figures.against_depth("mean_abs", cases=[trained(depth, ORTHOGONAL) for depth in DEPTHS], relative=True)),
    ),
    converged=Converged(ACCURACY, above=LEARNED),
    profiles=("mean_abs", "output_grad_l2"),
    notes=("Converged means half as much again as chance here: 10,000 layers get a few minutes on a CPU.",),
)  # fmt: skip
