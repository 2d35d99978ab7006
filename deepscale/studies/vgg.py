"""Study 2: VGG08 and VGG38 on CIFAR-100, and what makes the deeper one train: BatchNorm, residual connections, or both."""

from collections.abc import Callable

from deepscale.bench.report import number
from deepscale.studies import figures
from deepscale.studies.page import accuracies
from deepscale.studies.study import ACCURACY, CPU, FULL, SMOKE, Case, Converged, Figure, Finding, Results, Scale, Study

LOSS, TRAIN_LOSS, TRAIN_ACCURACY = "val/loss", "train/loss", "train/accuracy"
PLAIN, BN, RC, BOTH = "VGG38", "VGG38 BN", "VGG38 RC", "VGG38 BN+RC"
FAST = ", lr 1e-2"
REDUCED = ", reductions too"  # residual connections around the reduction blocks
PATTERNS = ", 100 patterns"  # the synthetic set of 100 classes
AT_CHANCE, LEARNED = 1.5, 2.0  # times chance
VANISHED = 1e-2
NORM, SKIP = {"norm": "batchnorm"}, {"skip": "identity"}
VARIANTS: dict[str, dict[str, str]] = {
    PLAIN: {}, BN: NORM, RC: SKIP, BOTH: {**NORM, **SKIP}, BN + FAST: {**NORM, "lr": "1e-2"}, BOTH + FAST: {**NORM, **SKIP, "lr": "1e-2"},
    RC + REDUCED: {**SKIP, "skip_scope": "all"}, BOTH + REDUCED: {**NORM, **SKIP, "skip_scope": "all"},
}  # fmt: skip


def _published(train_loss: float, train: float, loss: float, accuracy: float) -> dict[str, float]:
    return {TRAIN_LOSS: train_loss, TRAIN_ACCURACY: train / 100, LOSS: loss, ACCURACY: accuracy / 100}


PUBLISHED = {
    "VGG08": _published(1.74, 51.59, 1.95, 46.84),
    PLAIN: _published(4.61, 1.0, 4.61, 1.0),
    RC: _published(1.33, 61.52, 1.84, 52.32),
    BOTH: _published(1.26, 62.99, 1.73, 53.76),
    BN + FAST: _published(1.70, 52.28, 1.99, 46.72),
}
# Adam without weight decay, nothing clipped. The architecture's other settings are the network's own defaults.
RECIPE = {
    "model": "vgg", "norm": "none", "skip": "none", "optimizer": "adam", "weight_decay": "0", "clip": "0", "lr": "1e-3", "schedule": "cosine",
    "min_lr": "2e-5", "feed": "tensors",
}  # fmt: skip
TABLE = tuple(
    Case(name, {"depth": "8" if name == "VGG08" else "38", **settings}, PUBLISHED.get(name, {}))
    for name, settings in {"VGG08": dict[str, str](), **VARIANTS}.items()
)
ON_PATTERNS = tuple(
    Case(
        name + PATTERNS,
        {"depth": "38", **VARIANTS[name], "dataset": "synthetic", "synthetic_classes": "100", "max_steps": "1440", "record_every": "360"},
    )
    for name in (PLAIN, BN, RC, BOTH)
)


def chance(found: Results, case: str) -> float:
    """Accuracy by guessing, of the data set that a case's rows were trained on."""
    settings = next((row.settings for row in found[case].rows), {})
    if settings.get("resolved_dataset", settings.get("dataset")) == "synthetic":
        return 1 / int(settings.get("synthetic_classes", 10))
    return 0.01 if settings.get("dataset") == "cifar100" else 0.1


def _times_chance(found: Results, *cases: str) -> list[float]:
    """Validation accuracies over chance, of the cases that are there."""
    means = {case: found.mean(case) for case in cases}
    return [value / chance(found, case) for case, value in means.items() if value is not None]


def _tested(found: Results) -> bool:
    """Whether the networks were trained long enough to say anything: the shallow one, which everybody trains, has learned."""
    return any(value > LEARNED for value in _times_chance(found, "VGG08"))


def _at_chance(found: Results) -> bool | None:
    values = _times_chance(found, PLAIN, PLAIN + PATTERNS)
    return max(values) < AT_CHANCE if values and _tested(found) else None


def _learn(*cases: str) -> Callable[[Results], bool | None]:
    def holds(found: Results) -> bool | None:
        values = _times_chance(found, *cases)
        return min(values) > LEARNED if values and _tested(found) else None

    return holds


def _above(higher: str, lower: str) -> Callable[[Results], bool | None]:
    def holds(found: Results) -> bool | None:
        first, second = found.mean(higher), found.mean(lower)
        return None if first is None or second is None or not _tested(found) else first > second

    return holds


def left_at_entry(found: Results, case: str) -> float | None:
    """The entry convolution's mean |g| over the linear layer's, at the first record of the first seed."""
    records = next((row.profiles["mean_abs"] for row in found[case].rows if row.profiles.get("mean_abs")), None)
    if not records:
        return None
    points = records[min(records, key=int)]
    return points[0][1] / points[-1][1] if points[-1][1] else None


def _vanishes(found: Results) -> bool | None:
    plain, other = left_at_entry(found, PLAIN), left_at_entry(found, BOTH)
    return None if plain is None or other is None else plain < VANISHED < other


def _shares(found: Results) -> str:
    values = {case: value for case in ("VGG08", PLAIN, BN, RC, BOTH) if (value := left_at_entry(found, case)) is not None}
    return "the entry's mean |g| over the last layer's: " + ", ".join(f"{number(value)} ({case})" for case, value in values.items()) if values else ""


STUDY = Study(
    name="vgg",
    title="VGG08 and VGG38: BatchNorm and residual connections",
    question="A network of 8 layers trains and the same of 38 layers does not: is it BatchNorm, residual connections, or both that it needs?",
    source="University of Edinburgh, Machine Learning Practical, coursework 2 (2021): CIFAR-100, 100 epochs",
    cases=(*TABLE, *ON_PATTERNS),
    scales={
        SMOKE: Scale(
            {**RECIPE, "dataset": "synthetic", "image_size": "8", "batch_size": "10", "max_steps": "4", "eval_images": "20", "engine": "torch",
             "record_every": "1"},
            cases=("VGG08", PLAIN, BOTH),
            note="synthetic images of 8 x 8 pixels, four steps: only the machinery",
        ),
        CPU: Scale(
            {**RECIPE, "dataset": "cifar10", "image_size": "16", "augment": "false", "batch_size": "50", "max_steps": "1800", "eval_every": "450",
             "eval_images": "2000", "record_every": "450", "engine": "torch"},
            note="CIFAR-10 at 16 x 16 pixels instead of CIFAR-100 at 32 x 32, and synthetic patterns of 100 classes; 1,800 steps of 50 images "
            "(two epochs; 1,440 on the patterns) instead of 100 epochs of batch 100; no augmentation; the cosine moves every step; the networks "
            "are the original's, but for the classes",
        ),
        FULL: Scale(
            {**RECIPE, "dataset": "cifar100", "batch_size": "100", "epochs": "100", "schedule_every": "epoch", "record_every": "475"},
            seeds=(0, 1, 2),
            cases=tuple(case.name for case in TABLE),
            note="the original's network, data and recipe, with three seeds",
        ),
    },
    columns={
        "parameters": "parameters", TRAIN_LOSS: "training loss", TRAIN_ACCURACY: "training", LOSS: "validation loss", ACCURACY: "validation",
        "test/accuracy": "test",
    },
    findings=(
        Finding("Without BatchNorm and residual connections VGG38 stays at chance.", _at_chance, accuracies(PLAIN, PLAIN + PATTERNS)),
        Finding("So depth alone does harm: VGG08 is above it.", _above("VGG08", PLAIN), accuracies("VGG08", PLAIN)),
        Finding("With BatchNorm VGG38 trains.", _learn(BN, BN + PATTERNS), accuracies(BN, BN + PATTERNS)),
        Finding("With residual connections and without any norm it trains.", _learn(RC, RC + PATTERNS), accuracies(RC, RC + PATTERNS)),
        Finding("With both it trains.", _learn(BOTH, BOTH + PATTERNS), accuracies(BOTH, BOTH + PATTERNS)),
        Finding("Residual connections without BatchNorm give more than BatchNorm without them (lr 1e-3).", _above(RC, BN), accuracies(RC, BN)),
        Finding("Both together give more than residual connections alone.", _above(BOTH, RC), accuracies(BOTH, RC)),
        Finding("With BatchNorm alone the higher learning rate gives more; the coursework left 1e-3 open.", _above(BN + FAST, BN),
                accuracies(BN, BN + FAST)),
        Finding("With both it gives more, too; the coursework left 1e-2 open.", _above(BOTH + FAST, BOTH), accuracies(BOTH, BOTH + FAST)),
        Finding("Residual connections around the reduction blocks, the coursework's open question, give more with BatchNorm.",
                _above(BOTH + REDUCED, BOTH), accuracies(BOTH, BOTH + REDUCED)),
        Finding("They give more without it.", _above(RC + REDUCED, RC), accuracies(RC, RC + REDUCED)),
        Finding(f"In plain VGG38 the gradient vanishes: the entry's is below {VANISHED:g} of the last layer's at first, and with both above.",
                _vanishes, _shares),
    ),
    figures=(
        Figure("curves", "Loss and validation accuracy while the networks train: mean over the seeds, bands of one standard deviation.",
               figures.curves(TRAIN_LOSS, LOSS, ACCURACY, cases=[case.name for case in TABLE])),
        Figure("flow", "Gradient flow: mean |g| of every layer's weight against depth, at the first and at the last record.",
               figures.against_depth("mean_abs", cases=[case.name for case in TABLE])),
        Figure("flow-over-time", "Gradient flow from the first record to the last: mean |g| of every layer's weight, a line for each record.",
               figures.over_records("mean_abs", cases=("VGG08", PLAIN, BN, RC, BOTH))),
    ),
    converged=Converged(ACCURACY, above=0.2),
    notes=(
        "Training loss and accuracy here are the last batch's; the coursework's are means over its last epoch.",
        "Images are normalised by their data set's statistics as everywhere in deepscale (CIFAR-100: mean 129.3/124.1/112.4, deviation "
        "68.2/65.4/70.4 of 255); the coursework took mean 0.4914/0.4822/0.4465 and deviation 0.2023/0.1994/0.2010. Its split of CIFAR-100, "
        "47,500 / 2,500 / 10,000 and balanced over the classes, is deepscale's own.",
        f"At chance: validation accuracy below {AT_CHANCE:g} times that of guessing; trained: above {LEARNED:g} times.",
    ),
)  # fmt: skip
