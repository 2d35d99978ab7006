"""Study 1, LayerScale: which initial gamma a deep network needs. Reads the rows of the sweep tune/spaces/layerscale.yaml."""

from deepscale.studies import figures
from deepscale.studies.components import from_sweep
from deepscale.studies.page import accuracies, means
from deepscale.studies.study import CPU, FULL, SMOKE, Case, Figure, Finding, Results, Scale, Study

ACCURACY, GRADIENT = "val/accuracy", "grad/first_layer_mean_abs"
MEAN_GRADIENT = f"{GRADIENT} mean over the run"
# (gamma, shape) -> the first layer's mean |g| over the run, as published at 1,000 layers; the original's gamma is a scalar.
PUBLISHED = {("0", "scalar"): 0.087, ("1e-6", "scalar"): 0.423, ("1", "scalar"): 0.073, ("none", "scalar"): 0.080}
GAMMAS, SHAPES = ("none", "0", "1e-6", "1e-4", "1e-2", "0.1", "1"), ("scalar", "channel")
ABOVE_CHANCE = 0.2
COMMAND = "python tune/sweep.py tune/spaces/layerscale.yaml --name"
SMALL = "layerscale-110 --width 8 --lr 2e-3 --max-steps 350 --eval-every 175 --eval-images 2000"
LARGE = "layerscale-1004 --depth 1004 --width 64 --patch-size 1 --lr 1e-3 --max-steps none --epochs 100"


def name_of(gamma: str, shape: str) -> str:
    """A case's name: "gamma 1e-6, scalar"."""
    return "no gamma" if gamma == "none" else f"gamma {gamma}, {shape}"


CASES = tuple(
    Case(
        name_of(gamma, shape),
        {"layerscale_init": gamma, "layerscale_shape": shape},
        {MEAN_GRADIENT: PUBLISHED[gamma, shape]} if (gamma, shape) in PUBLISHED else {},
    )
    for shape in SHAPES for gamma in GAMMAS if (gamma, shape) != ("none", "channel")
)  # fmt: skip
ORIGINAL = tuple(name_of(*which) for which in PUBLISHED)


def _stable(found: Results) -> bool | None:
    values = [value for name in ORIGINAL for value in found[name].values(ACCURACY)]
    rows = [row for name in ORIGINAL for row in found[name].rows]
    return len(values) == len(rows) and min(values) > ABOVE_CHANCE if rows and values else None


def _order(found: Results) -> bool | None:
    values = {name: found.mean(name, MEAN_GRADIENT) for name in ORIGINAL}
    known = {name: value for name, value in values.items() if value is not None}
    return None if len(known) < len(ORIGINAL) else max(known, key=known.__getitem__) == name_of("1e-6", "scalar")


STUDY = Study(
    name="layerscale",
    title="LayerScale: the initial gamma",
    question="Which initial value of LayerScale's gamma lets a deep network train, and what does it do to the gradient?",
    source='"Going Beyond the 1000-Layer Convolution Network" (Ludwiczuk): 1,000 layers, width 64, 100 epochs, one gamma per block',
    cases=CASES,
    scales={
        scale: Scale(note=note, sweep=from_sweep(text.split()[0], f"{COMMAND} {text}"))
        for scale, note, text in (
            (SMOKE, "the rows of cpu scale", SMALL),
            (CPU, "110 layers of width 8 with patches of 4 x 4 pixels, 350 steps (half an epoch) instead of 1,000 layers, 100 epochs", SMALL),
            (FULL, "the original's sizes", LARGE),
        )
    },
    columns={ACCURACY: "validation", "test/accuracy": "test", "train/loss": "training loss", MEAN_GRADIENT: "first layer's mean gradient"},
    findings=(
        Finding(f"All of gamma 0, 1e-6, 1 and none train stably (above {ABOVE_CHANCE:.0%}, twice chance, all seeds).", _stable,
                accuracies(*ORIGINAL)),
        Finding("The first layer's gradient is by far the largest with gamma 1e-6.", _order, means("mean |g| over the run", ORIGINAL, MEAN_GRADIENT)),
    ),
    figures=(
        Figure("curves", "Loss, validation accuracy and the first layer's gradient while the networks train: mean over the seeds, bands of one "
               "standard deviation.", figures.curves("train/loss", ACCURACY, GRADIENT)),
    ),
    notes=("These are the rows of a sweep: nothing is run again.",),
)  # fmt: skip
