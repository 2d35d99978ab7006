"""Study 1, depth: the same network from 26 to 10,001 layers. Do all depths train, and is the first layer's gradient the same at every depth?"""

from deepscale.studies import figures
from deepscale.studies.page import accuracies, amount
from deepscale.studies.study import CPU, FULL, SMOKE, TINY, Case, Figure, Finding, Results, Scale, Study

GRADIENT = "grad/first_layer_mean_abs"
MEAN_GRADIENT = f"{GRADIENT} mean over the run"
ACCURACY = "val/accuracy"
ABOUT_94 = {ACCURACY: 0.94}  # "about 94 %": best on test, no seed set
DEPTHS = {26: ABOUT_94, 110: {}, 302: {}, 1004: ABOUT_94, 10001: {}}
DEEPEST = "10,001 layers"
SIMILAR = 3.0  # times: what "similar at every depth" is taken to mean
CHANCE, LEARNED = 0.1, 0.2
RECIPE = {"dataset": "cifar10", "feed": "tensors", "batch_size": "64"}


def name_of(depth: int) -> str:
    """The case of a depth."""
    return f"{depth:,} layers"


def at_first_step(found: Results) -> dict[str, float]:
    """Case -> the first layer's mean |g| at the first step, mean over the seeds."""
    first = {name: [row.curves[GRADIENT][0][1] for row in group.rows if row.curves.get(GRADIENT)] for name, group in found.groups.items()}
    return {name: sum(values) / len(values) for name, values in first.items() if values}


def _similar_at_start(found: Results) -> bool | None:
    values = at_first_step(found)
    return None if len(values) < 2 else max(values.values()) <= SIMILAR * min(values.values())


def _start(found: Results) -> str:
    return "mean |g| of the first layer at the first step: " + _listed(at_first_step(found))


def _over_the_run(found: Results) -> dict[str, float]:
    """Without the deepest, where its run is of another length."""
    lengths = {row.settings.get("max_steps") for name, group in found.groups.items() if name != DEEPEST for row in group.rows}
    own = {row.settings.get("max_steps") for row in found[DEEPEST].rows}
    names = [name for name in found.groups if name != DEEPEST or own == lengths]
    return {name: value for name in names if (value := found.mean(name, MEAN_GRADIENT)) is not None}


def _similar_over_the_run(found: Results) -> bool | None:
    values = _over_the_run(found)
    return None if len(values) < 2 else max(values.values()) <= SIMILAR * min(values.values())


def _learns(found: Results) -> bool | None:
    values = [found.mean(name) for name in found.groups if name != DEEPEST]
    known = [value for value in values if value is not None]
    return None if len(known) < 2 else min(known) > LEARNED


def _converges(found: Results) -> bool | None:
    """Tested only by runs of several epochs: within one no depth gets there, the shallowest neither."""
    return found.converged() if found.converged(name_of(26)) else None


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{amount(value)} ({name})" for name, value in values.items())


STUDY = Study(
    name="depth",
    title="Depth: 26 to 10,001 layers",
    question="With skip connections, do networks of every depth train, and is the first layer's gradient the same at every depth?",
    source='"Going Beyond the 1000-Layer Convolution Network" (Ludwiczuk): 26 to 1,004 layers, width 64, 100 epochs; validated on the test set',
    cases=tuple(Case(name_of(depth), {"depth": str(depth)}, published) for depth, published in DEPTHS.items()),
    scales={
        SMOKE: Scale(
            TINY,
            cases=(name_of(26),),
            note="26 layers of width 4 on synthetic images, four steps: only the machinery",
        ),
        CPU: Scale(
            {**RECIPE, "width": "8", "patch_size": "4", "lr": "2e-3", "max_steps": "350", "eval_every": "175", "eval_images": "2000"},
            seeds=(0, 1, 2),
            note="width 8 instead of 64, patches of 4 x 4 pixels instead of single ones, half an epoch (350 steps) instead of 100 epochs, no colour "
            "jitter; 10,001 layers take 20 steps, with one seed",
            changes={DEEPEST: {"max_steps": "20", "eval_every": "20", "eval_images": "256"}},
            once=(DEEPEST,),
        ),
        FULL: Scale(
            {**RECIPE, "width": "64", "patch_size": "1", "lr": "1e-3", "epochs": "100", "color_jitter": "0.2", "precision": "bf16"},
            seeds=(0, 1, 2),
            note="the original's sizes and recipe; 10,001 layers are beyond it",
        ),
    },
    columns={
        ACCURACY: "validation", "test/accuracy": "test", "train/loss": "training loss", MEAN_GRADIENT: "first layer's gradient, mean over the run",
        "parameters": "parameters",
    },
    findings=(
        Finding("Networks of all depths converge.", _converges, accuracies()),
        Finding(f"Networks of all depths learn: validation accuracy above {LEARNED:.0%}, twice chance, after the same steps.", _learns, accuracies()),
        Finding(f"The first layer's gradient at the first step is similar at every depth: within {SIMILAR:g} times.", _similar_at_start, _start),
        Finding(
            f"So it is over the whole run: its mean is within {SIMILAR:g} times.", _similar_over_the_run,
            lambda found: "mean over the run: " + _listed(_over_the_run(found)),
        ),
    ),
    figures=(
        Figure("curves", "Loss, validation accuracy and the first layer's gradient while the networks train: mean over the seeds, bands of one "
               "standard deviation.", figures.curves("train/loss", "val/accuracy", GRADIENT)),
        Figure("gradient", "The gradient at the block outputs against depth, at the first and at the last step, seed 0.",
               figures.against_depth("output_grad_l2", relative=True)),
    ),
    notes=(
        "Gamma begins at 0, as in the published code: at the first step every block is closed, so that networks of all depths compute the same, "
        "and that their gradients and curves are alike says little yet about their depth. The study `used` asks what the blocks add later.",
    ),
    profiles=("mean_abs", "output_grad_l2"),
)  # fmt: skip
