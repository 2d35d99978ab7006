"""Reversible blocks beside blocks with an identity skip: do coupled halves of the channels learn as well?"""

from collections.abc import Callable

from deepscale.studies import figures
from deepscale.studies.page import accuracies
from deepscale.studies.study import ACCURACY, CPU, FULL, SMOKE, TINY, Case, Converged, Figure, Finding, Results, Scale, Settings, Study

IDENTITY, SAME, TWICE = "identity", "reversible", "reversible, twice the width"
NETWORKS = (IDENTITY, SAME, TWICE)
DEPTHS = (110, 1004)
LEARNED, BESIDE = 0.2, 0.02  # validation accuracies: twice chance; how near is as good
RECIPE = {"dataset": "cifar10", "feed": "tensors"}


def name_of(network: str, depth: int) -> str:
    """The case of a training."""
    return f"{network}, {depth:,} layers"


def _of(depth: int) -> tuple[str, ...]:
    return tuple(name_of(network, depth) for network in NETWORKS)


def _changes(width: int, shorter: Settings | None = None) -> dict[str, Settings]:
    """Case -> twice the width, where that is its name, and fewer steps at 1,004 layers."""
    wide = {"width": str(2 * width)}
    return {name_of(n, depth): {**(wide if n == TWICE else {}), **(shorter or {} if depth == 1004 else {})} for n in NETWORKS for depth in DEPTHS}


def _as_good(network: str, depth: int) -> Callable[[Results], bool | None]:
    """Whether a network is not worse than identity skip."""

    def holds(found: Results) -> bool | None:
        ours, other = found.mean(name_of(network, depth)), found.mean(name_of(IDENTITY, depth))
        return None if ours is None or other is None else ours >= other - BESIDE

    return holds


def _finding(network: str, depth: int) -> Finding:
    what = "At twice the width, with identity's branches" if network == TWICE else "At the same width, with half of the channels in a branch"
    reach = f"reach what identity does at {depth:,} layers, or more: within {100 * BESIDE:g} points of validation accuracy"
    return Finding(f"{what}, reversible blocks {reach}.", _as_good(network, depth), accuracies(name_of(IDENTITY, depth), name_of(network, depth)))


STUDY = Study(
    name="reversible",
    title="Reversible blocks beside identity skip",
    question="Blocks whose inputs are reconstructed in backward couple two halves of the channels: do they learn as well as blocks with an identity "
    "skip, at the same width and at the same branch?",
    source="RevNet, Gomez et al. 2017 (arXiv:1707.04585): \"nearly identical classification accuracy to equally-sized ResNets\" on CIFAR-10, "
    "CIFAR-100 and ImageNet",
    cases=tuple(
        Case(name_of(network, depth), {"skip": IDENTITY if network == IDENTITY else "reversible", "depth": str(depth)})
        for depth in DEPTHS for network in NETWORKS
    ),
    scales={
        SMOKE: Scale(
            TINY,
            cases=(name_of(SAME, 110), name_of(TWICE, 110)),
            changes=_changes(4),
            note="width 4 on synthetic images, four steps: only the machinery",
        ),
        CPU: Scale(
            {**RECIPE, "width": "8", "patch_size": "4", "batch_size": "64", "lr": "2e-3", "max_steps": "700", "eval_every": "175",
             "eval_images": "2000", "engine": "torch"},
            seeds=(0, 1, 2),
            changes=_changes(8, {"max_steps": "350"}),
            note="width 8 (and 16), patches of 4 x 4 pixels; 700 steps of batch 64 (one epoch) at 110 layers, 350 at 1,004",
        ),
        FULL: Scale(
            {**RECIPE, "width": "64", "patch_size": "1", "batch_size": "64", "lr": "1e-3", "epochs": "100", "color_jitter": "0.2",
             "precision": "bf16"},
            seeds=(0, 1, 2),
            changes=_changes(64),
            note="the first study's network and recipe",
        ),
    },
    columns={
        ACCURACY: "validation", "test/accuracy": "test", "train/loss": "training loss", "parameters": "parameters",
        "grad/first_last_ratio": "gradient, first block / last",
    },
    findings=tuple(_finding(network, depth) for depth in DEPTHS for network in (SAME, TWICE)),
    figures=tuple(
        Figure(f"curves-{depth}", f"{depth:,} layers while they train: mean over the seeds, bands of one standard deviation.",
               figures.curves("train/loss", ACCURACY, cases=_of(depth)))
        for depth in DEPTHS
    ),
    converged=Converged(ACCURACY, above=LEARNED),
    profiles=("mean_abs", "output_grad_l2", "output_std"),
    notes=(
        "Gamma is 0 at first in all of them. At the same width a reversible block has a quarter of the weights of an identity one, and at twice the "
        "width as many; but stem, downsamplings and head are twice as wide then. What reversible blocks save in memory, and what that takes in time: "
        "docs/reversible.md.",
    ),
)  # fmt: skip
