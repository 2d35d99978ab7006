"""ConvNeXt without skip connections: is it the missing skip, or are it the initial weights, that keep 1,000 layers from training?"""

from collections.abc import Callable, Iterable

from deepscale.bench.report import number
from deepscale.studies import at_start, figures
from deepscale.studies.at_start import LEFT, MEDIAN, NEAR_ONE, SIGNAL, ZERO
from deepscale.studies.page import accuracies
from deepscale.studies.study import ACCURACY, CPU, FULL, SMOKE, TINY, Case, Converged, Figure, Finding, Results, Scale, Study

GRADIENT = "grad/first_layer_mean_abs"
LEARNED = 0.2  # validation accuracy: twice chance
FLAT = 100.0  # times: first block's gradient over the last one's, and the other way round
NEAR = 0.05  # of validation accuracy
INDEPENDENT = ("normal", "kaiming", "orthogonal")  # the weights of a block's layers are drawn one without the other
PAIRED = ("paired", "mirrored")
NO_NORM = {
    "paired, tanh, no norm": {"init": "paired", "activation": "tanh", "norm": "none"},
    "mirrored, no norm": {"init": "mirrored", "norm": "none"},
}
INITS = {**{init: {"init": init} for init in (*INDEPENDENT, *PAIRED)}, **NO_NORM}
DEPTHS = (110, 1004)
PROBED = 10001
WITH_SKIP = "skip connections"
RATES = ("3e-4", "3e-3")  # other learning rates, at 110 layers
AT_RATES = (WITH_SKIP, *INDEPENDENT, "mirrored", "mirrored, no norm")


def name_of(depth: int, init: str) -> str:
    """A case."""
    return f"{depth:,} layers, {init}"


NETWORKS = {WITH_SKIP: {"skip": "identity", "init": "normal"}, **{name: {"skip": "none", **own} for name, own in INITS.items()}}


def at_rate(name: str, rate: str) -> str:
    """A case of 110 layers with another learning rate."""
    return f"{name_of(110, name)}, lr {rate}"


def _trainings() -> tuple[Case, ...]:
    return tuple(Case(name_of(depth, name), {"depth": str(depth), **own}) for depth in DEPTHS for name, own in NETWORKS.items())


def _other_rates() -> tuple[Case, ...]:
    return tuple(Case(at_rate(name, rate), {"depth": "110", **NETWORKS[name]}) for name in AT_RATES for rate in RATES)


def _tried(*names: str) -> list[str]:
    """The trainings of 110 layers, with whatever learning rate."""
    return [*_of(110, names), *(at_rate(name, rate) for name in names if name in AT_RATES for rate in RATES)]


def _probes() -> tuple[Case, ...]:
    return tuple(
        Case(name_of(PROBED, f"{name}, before training"), {"depth": str(PROBED), "skip": "none", **own}, compute=at_start.measure)
        for name, own in INITS.items()
    )


def _of(depth: int, names: Iterable[str]) -> list[str]:
    return [name_of(depth, name) for name in names]


def _measured(found: Results, names: list[str]) -> list[str]:
    """Those that have rows; all where none has."""
    return [name for name in names if found[name].rows] or names


def _nothing_trains(found: Results) -> bool | None:
    return None if found.scale == SMOKE else found.none_converged(*_measured(found, _of(1004, INITS)))


def _independent_do_not(found: Results) -> bool | None:
    """At the published depths, of which the deeper one may be missing."""
    tried = (_tried(*INDEPENDENT), _of(1004, INDEPENDENT))
    known = [none for names in tried if (none := found.none_converged(*_measured(found, names))) is not None]
    return all(known) if known and found.scale != SMOKE else None


def _paired_do(found: Results) -> bool | None:
    known = [all_ for depth in DEPTHS if found.scale != SMOKE and (all_ := found.converged(*_measured(found, _of(depth, PAIRED)))) is not None]
    return all(known) if known else None


def _as_good(found: Results) -> bool | None:
    best, skip = (_best(found, _tried(*names)) for names in ((*PAIRED, *NO_NORM), (WITH_SKIP,)))
    return None if best is None or skip is None else best >= skip - NEAR


def _best(found: Results, names: list[str]) -> float | None:
    return max((value for name in names if (value := found.mean(name)) is not None), default=None)


def _reached(names: Iterable[str], *depths: int) -> Callable[[Results], str]:
    return accuracies(*(name_of(depth, name) for name in names for depth in depths))


def _left(found: Results) -> dict[str, float]:
    values = {name: found.mean(name_of(PROBED, f"{name}, before training"), LEFT) for name in INITS}
    return {name: value for name, value in values.items() if value is not None}


def _flat(value: float | None) -> bool:
    return value is not None and 1 / FLAT <= value <= FLAT


def _independent_lose_it(found: Results) -> bool | None:
    measured = [name for name in INDEPENDENT if found[name_of(PROBED, f"{name}, before training")].rows]
    return not any(_flat(_left(found).get(name)) for name in measured) if measured else None  # one that is not finite has no number


def _paired_keep_it(found: Results) -> bool | None:
    names = [name for name in ("mirrored", "mirrored, no norm") if found[name_of(PROBED, f"{name}, before training")].rows]
    return all(_flat(_left(found).get(name)) for name in names) if names else None


def _gradients(found: Results) -> str:
    left = _left(found)
    names = [name for name in INITS if found[name_of(PROBED, f"{name}, before training")].rows]
    return f"first block's gradient over the last one's at {PROBED:,} layers: " + ", ".join(
        f"{number(left[name]) if name in left else 'not finite'} ({name})" for name in names
    )


STUDY = Study(
    name="paired",
    title="ConvNeXt without skip connections: a matter of initial weights",
    question="Without skip connections nothing trains, found the original. Does anything, with initial weights of which a block is an isometry?",
    source='"Going Beyond the 1000-Layer Convolution Network" (Ludwiczuk) for the claim; the weights: Saxe et al. (arXiv:1312.6120), Balduzzi et al. '
    "(arXiv:1702.08591)",
    cases=(*_trainings(), *_other_rates(), *_probes()),
    scales={
        SMOKE: Scale(
            {**TINY, "width": "2", "lr": "1e-3"},
            cases=(name_of(110, "mirrored"), name_of(PROBED, "mirrored, before training")),
            changes={name_of(110, "mirrored"): {"depth": "26"}, name_of(PROBED, "mirrored, before training"): {"depth": "110"}},
            note="26 and 110 layers of width 2 on synthetic images: only the machinery",
        ),
        CPU: Scale(
            {
                "dataset": "cifar10", "feed": "tensors", "width": "8", "patch_size": "4", "batch_size": "64", "lr": "1e-3",
                "max_steps": "300", "eval_every": "150", "eval_images": "2000",
            },
            seeds=(0, 1, 2),
            once=tuple(case.name for case in (*_trainings(), *_other_rates(), *_probes()) if case.name not in _of(110, NETWORKS)),
            changes={
                **{name_of(1004, name): {"lr": "2e-4", "max_steps": "150", "eval_every": "75"} for name in NETWORKS},
                **{at_rate(name, rate): {"lr": rate} for name in AT_RATES for rate in RATES},
            },
            note="width 8 instead of 64, patches of 4 x 4 pixels instead of single ones, 300 steps instead of 100 epochs, no colour jitter; 1,004 "
            "layers take 150 steps with a fifth of the learning rate, with one seed; three learning rates at 110 layers, two of them with one seed",
        ),
        FULL: Scale(
            {
                "dataset": "cifar10", "width": "64", "patch_size": "1", "batch_size": "64", "lr": "1e-3", "epochs": "100", "color_jitter": "0.2",
                "precision": "bf16",
            },
            seeds=(0, 1, 2),
            cases=tuple(case.name for case in (*_trainings(), *_probes())),
            once=tuple(case.name for case in _probes()),
            changes={case.name: {"singular": "0"} for case in _probes()},  # its Jacobian has 65,536 rows
            note="the original's sizes and recipe",
        ),
    },
    columns={
        ACCURACY: "validation", "test/accuracy": "test", "train/loss": "training loss", LEFT: "first block's gradient over the last one's",
        ZERO: "blocks without gradient", SIGNAL: "signal, last block over first", MEDIAN: "singular values: median",
        NEAR_ONE: "within 10 times of the largest",
    },
    findings=(
        Finding("Without skip connections nothing trains at 1,004 layers, with whatever initial weights.", _nothing_trains, _reached(INITS, 1004)),
        Finding(
            "With weights that are drawn one without the other (normal of deviation 0.02 as published, Kaiming, orthogonal) it does not train.",
            _independent_do_not, accuracies(*_tried(*INDEPENDENT), *_of(1004, INDEPENDENT)),
        ),
        Finding("With weights of which a block is an isometry (paired, mirrored) it trains, at 110 and 1,004 layers.", _paired_do,
                _reached(PAIRED, *DEPTHS)),
        Finding(
            f"At 110 layers the best of them without skip connections gets within {NEAR * 100:g} points of the accuracy with them, each at its best "
            "learning rate.", _as_good, accuracies(*_tried(WITH_SKIP, *PAIRED, *NO_NORM)),
        ),
        Finding(
            f"At {PROBED:,} layers weights drawn one without the other lose the gradient, or it explodes: by more than {FLAT:g} times.",
            _independent_lose_it, _gradients,
        ),
        Finding(f"Mirrored ones keep it within {FLAT:g} times, with a norm and without.", _paired_keep_it, _gradients),
    ),
    figures=(
        Figure("accuracy", "Validation accuracy of 110 layers while they train: mean over the seeds, bands of one standard deviation.",
               figures.curves(ACCURACY, "train/loss", cases=_of(110, NETWORKS))),
        Figure("accuracy-1004", "The same of 1,004 layers, one seed.", figures.curves(ACCURACY, "train/loss", cases=_of(1004, NETWORKS))),
        Figure("gradient", f"Gradient at the block outputs of {PROBED:,} layers before any training.",
               figures.against_depth("output_grad_l2", moments=(0,), cases=[case.name for case in _probes()])),
        Figure("signal", f"Signal in {PROBED:,} layers before any training.",
               figures.against_depth("output_std", moments=(0,), cases=[case.name for case in _probes()])),
    ),
    converged=Converged(ACCURACY, above=LEARNED),
    profiles=("mean_abs", "output_grad_l2"),
    notes=("Converged means more than twice chance here: within half an epoch no network gets to 50 %.",),
)  # fmt: skip
