"""Study 1, components: which of activation, norm and skip a deep network needs. Reads the rows of the sweep tune/spaces/components.yaml."""

from collections.abc import Callable, Sequence
from pathlib import Path

from deepscale import drawing
from deepscale.studies import figures
from deepscale.studies.page import accuracies, amount, means
from deepscale.studies.study import CPU, FULL, SMOKE, Case, Figure, Finding, FromSweep, Results, Scale, Study

ACTIVATIONS, NORMS, SKIPS = ("gelu", "relu", "tanh", "sigmoid"), ("layernorm", "none"), ("identity", "none")
ACCURACY, GRADIENT = "val/accuracy", "grad/first_layer_mean_abs"
MEAN_GRADIENT = f"{GRADIENT} mean over the run"
CLOSE = 0.05  # of validation accuracy: what "competitive" and "like" are taken to mean
EARLY_PEAK = 0.5  # of the first layer's gradient, as published
COMMAND = "python tune/sweep.py tune/spaces/components.yaml --name"
SMALL = "components-110 --width 8 --layerscale-init none --lr 2e-3 --max-steps 700 --eval-every 350 --eval-images 2000"
LARGE = "components-1004 --depth 1004 --width 64 --patch-size 1 --layerscale-init 0 --lr 1e-3 --max-steps none --epochs 100"


def name_of(activation: str, norm: str, skip: str) -> str:
    """A case's name: "gelu, layernorm, skip"."""
    return f"{activation}, {'no norm' if norm == 'none' else norm}, {'no skip' if skip == 'none' else 'skip'}"


def from_sweep(name: str, command: str) -> FromSweep:
    """The rows of a sweep, and how they come to be there."""
    return FromSweep(name, (command, f"deepscale sweep show {name} --rows docs/results/{name}"))


GELU, TANH, SIGMOID = (name_of(activation, "layernorm", "identity") for activation in ("gelu", "tanh", "sigmoid"))
WITH_SKIP = tuple(name_of(activation, norm, "identity") for norm in NORMS for activation in ACTIVATIONS)
WITHOUT_SKIP = tuple(name_of(activation, norm, "none") for norm in NORMS for activation in ACTIVATIONS)
WITHOUT_NORM = tuple(name_of(activation, "none", "identity") for activation in ACTIVATIONS)


def _span(cases: Sequence[str]) -> Callable[[Results], str]:
    def said(found: Results) -> str:
        values = [value for name in cases for value in found[name].values(ACCURACY)]
        return f"validation accuracy of {len(values)} trainings: {min(values):.1%} to {max(values):.1%}" if values else ""

    return said


def _nothing_trains(found: Results) -> bool | None:
    """Below a fifth: twice chance."""
    values = [value for name in WITHOUT_SKIP for value in found[name].values(ACCURACY)]
    return max(values) < 0.2 if values else None


def _close(case: str, other: str) -> Callable[[Results], bool | None]:
    def holds(found: Results) -> bool | None:
        own, its = found.mean(case), found.mean(other)
        return None if own is None or its is None else abs(own - its) <= CLOSE

    return holds


def _tanh_without_norm(found: Results) -> bool | None:
    gradients, accuracies = ({name: found.mean(name, metric) for name in WITH_SKIP} for metric in (MEAN_GRADIENT, ACCURACY))
    known = {name: value for name, value in gradients.items() if value is not None}
    reached = {name: value for name, value in accuracies.items() if value is not None}
    tanh = name_of("tanh", "none", "identity")
    return None if len(known) < len(WITH_SKIP) else max(known, key=known.__getitem__) == tanh == min(reached, key=reached.__getitem__)


def _peaks(found: Results) -> dict[str, tuple[float, float, float]]:
    """Case with LayerNorm and skip -> the first layer's gradient (at first, at its highest, at last), means over the seeds."""
    peaks = {}
    for name in WITH_SKIP[: len(ACTIVATIONS)]:
        _, mean, _ = figures.over_seeds(found[name], GRADIENT)
        if len(mean):
            peaks[name] = (float(mean[0]), float(mean.max()), float(mean[-1]))
    return peaks


def _rises_and_falls(found: Results) -> bool | None:
    peaks = _peaks(found)
    shaped = [top > 2 * first and top > 2 * last and EARLY_PEAK / 2 <= top <= EARLY_PEAK * 2 for first, top, last in peaks.values()]
    return all(shaped) if shaped else None


def _peaks_said(found: Results) -> str:
    return "; ".join(f"{amount(a)} to {amount(b)}, then {amount(c)} ({name})" for name, (a, b, c) in _peaks(found).items())


def shares(found: Results, path: Path) -> bool:
    """Validation accuracy of every choice, one dot a training."""
    groups = sorted((group for group in found.groups.values() if group.values(ACCURACY)), key=lambda group: group.mean(ACCURACY) or 0.0)
    if not groups:
        return False
    figure, axis = drawing.pyplot().subplots(figsize=(7.5, 1.2 + 0.3 * len(groups)), layout="constrained")
    for i, group in enumerate(groups):
        colour = drawing.COLOURS[1 if group.case.settings.get("skip") == "none" else 0]
        values = [100 * value for value in group.values(ACCURACY)]
        axis.plot(values, [i] * len(values), "o", color=colour, markeredgecolor="white")
    axis.set_yticks(range(len(groups)), [group.case.name for group in groups], fontsize=9)
    axis.set_xlabel("validation accuracy, %; a dot for each training")
    axis.grid(alpha=0.25)
    drawing.save(figure, path)
    return True


STUDY = Study(
    name="components",
    title="Components: activation, normalisation and skip connection",
    question="Which of activation, normalisation and skip connection does a deep network need to train?",
    source='"Going Beyond the 1000-Layer Convolution Network" (Ludwiczuk): 1,000 layers, width 64, 100 epochs; validated on the test set',
    cases=tuple(
        Case(name_of(activation, norm, skip), {"activation": activation, "norm": norm, "skip": skip})
        for skip in SKIPS for norm in NORMS for activation in ACTIVATIONS
    ),
    scales={
        scale: Scale(note=note, sweep=from_sweep(text.split()[0], f"{COMMAND} {text}"))
        for scale, note, text in (
            (SMOKE, "the rows of cpu scale", SMALL),
            (CPU, "110 layers of width 8 with patches of 4 x 4 pixels, no gamma, 700 steps (one epoch) instead of 1,000 layers, 100 epochs", SMALL),
            (FULL, "the original's sizes", LARGE),
        )
    },
    columns={ACCURACY: "validation", "test/accuracy": "test", "train/loss": "training loss", MEAN_GRADIENT: "first layer's mean gradient"},
    findings=(
        Finding("Without skip connections nothing trains (below 20 %, twice chance).", _nothing_trains, _span(WITHOUT_SKIP)),
        Finding("tanh with LayerNorm is competitive: within 5 points of GELU with LayerNorm.", _close(TANH, GELU), accuracies(TANH, GELU)),
        Finding("sigmoid with LayerNorm is competitive: within 5 points of GELU.", _close(SIGMOID, GELU), accuracies(SIGMOID, GELU)),
        Finding("sigmoid without LayerNorm is like GELU without: within 5 points.", _close(WITHOUT_NORM[3], WITHOUT_NORM[0]),
                accuracies(WITHOUT_NORM[3], WITHOUT_NORM[0])),
        Finding("tanh without LayerNorm has the highest mean gradient and the lowest accuracy of all with skip connections.",
                _tanh_without_norm, means("first layer's mean |g| over the run", WITH_SKIP, MEAN_GRADIENT)),
        Finding(f"With LayerNorm the first layer's gradient rises to about {EARLY_PEAK:g} early (within 2 times), then falls to less than half.",
                _rises_and_falls, _peaks_said),
    ),
    figures=(
        Figure("accuracy", "Validation accuracy of every choice; orange: without skip connections.", shares),
        Figure("curves", "Loss, validation accuracy and the first layer's gradient of the networks with skip connections: mean over the seeds, bands "
               "of one standard deviation.", figures.curves("train/loss", ACCURACY, GRADIENT, cases=WITH_SKIP)),
    ),
    notes=(
        "These are the rows of a sweep: nothing is run again. Without skip connections it is the initial weights that decide whether the gradient "
        "vanishes or explodes; the studies `plain` and `paired` ask that.",
    ),
)  # fmt: skip
