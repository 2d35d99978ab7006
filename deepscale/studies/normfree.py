"""Depth without normalisation: which initial weights and scales keep the gradient level over 10,001 layers, and which of them train."""

import math
from collections.abc import Callable, Iterable

from deepscale.bench.report import number
from deepscale.studies import figures
from deepscale.studies.page import accuracies
from deepscale.studies.study import CPU, FULL, SMOKE, TINY, Case, Converged, Figure, Finding, Results, Scale, Settings, Study

ACCURACY, GRADIENT = "val/accuracy", "grad/first_layer_mean_abs"
SLOPE, LARGEST = "grad/slope_decades_per_1000_layers", "grad/largest_last_ratio"
LEVEL = 1.0  # decades over all layers, within the stages
LEARNED, BESIDE = 0.2, 0.02  # validation accuracies: twice chance; how near to LayerNorm's is as good
PLAIN, HE, NORMED = "normal 0.02", "He", "LayerNorm"
METHODS: dict[str, Settings] = {
    NORMED: {"norm": "layernorm", "init": "normal", "layerscale_init": "none"},
    PLAIN: {"init": "normal", "layerscale_init": "none"},
    HE: {"init": "kaiming", "layerscale_init": "none"},
    "Fixup": {"init": "fixup", "layerscale_init": "1"},
    "SkipInit": {"init": "kaiming", "layerscale_init": "0"},
    "LayerScale": {"init": "kaiming", "layerscale_init": "1e-6", "layerscale_shape": "channel"},
    "DeepNorm": {"init": "deepnorm", "skip": "deepnorm", "layerscale_init": "none"},
}
REMEDIES = ("Fixup", "SkipInit", "LayerScale", "DeepNorm")
SHALLOW, DEEP, DEEPEST = 110, 1004, 10001
RECIPE = {"dataset": "cifar10", "feed": "tensors"}
# Two steps, of which the second is recorded as the initial values have it: the first moves no weight by more than 4e-5, and opens Fixup's head.
AT_INIT = {"max_steps": "2", "record_every": "1", "batch_size": "16", "eval_images": "16", "lr": "1e-3", "augment": "false"}


def trained(method: str, depth: int) -> str:
    """The case of a training."""
    return f"{method}, {depth:,} layers"


def at_init(method: str) -> str:
    """The case of the gradient flow at the initial values."""
    return f"{method}, {DEEPEST:,} layers at init"


def decades(found: Results, method: str) -> float | None:
    """How many powers of ten the gradient changes by over all layers, within the stages; infinite where it is not finite or ends at 0."""
    group = found[at_init(method)]
    if not group.rows:
        return None
    slope = group.mean(SLOPE)
    return abs(slope) * DEEPEST / 1000 if slope is not None else math.inf


def _level(method: str) -> Finding:
    def holds(found: Results) -> bool | None:
        value = decades(found, method)
        return None if value is None else value < LEVEL

    def said(found: Results) -> str:
        value = decades(found, method)
        if value is None:
            return ""
        return f"it changes by {number(value)} decades" if math.isfinite(value) else "it is not finite, or 0"

    return Finding(
        f"{method} keeps the gradient level at initialisation: it changes by less than {LEVEL:g} decade within the stages of {DEEPEST:,} layers.",
        holds,
        said,
    )


def _explodes(found: Results) -> bool | None:
    value = decades(found, HE)
    return None if value is None else value > LEVEL


def _train(depth: int) -> Finding:
    def holds(found: Results) -> bool | None:
        return found.converged(*(trained(method, depth) for method in REMEDIES))

    return Finding(f"All four train {depth:,} layers without a norm: validation accuracy above {LEARNED:.0%}.", holds, _reached(REMEDIES, depth))


def _reached(methods: Iterable[str], *depths: int) -> Callable[[Results], str]:
    return accuracies(*(trained(method, depth) for method in methods for depth in depths))


def _as_good(found: Results) -> bool | None:
    norm, others = found.mean(trained(NORMED, DEEP)), [found.mean(trained(method, DEEP)) for method in REMEDIES]
    known = [value for value in others if value is not None]
    return None if norm is None or len(known) < len(others) else max(known) >= norm - BESIDE


def _fails(found: Results) -> bool | None:
    return found.none_converged(trained(HE, SHALLOW), trained(HE, DEEP))


FLOW = {"grad/first_last_ratio": "gradient, first block / last", LARGEST: "largest / last", SLOPE: "decades per 1,000 layers"}
CASES = tuple(
    Case(name, {"norm": "none", **settings, "depth": str(depth), **extra}, columns=columns)
    for name_of, depth, extra, columns in (
        (at_init, DEEPEST, AT_INIT, tuple(FLOW)),
        (lambda method: trained(method, SHALLOW), SHALLOW, {}, ()),
        (lambda method: trained(method, DEEP), DEEP, {}, ()),
    )
    for method, settings in METHODS.items()
    for name in (name_of(method),)
)
LONGER = {trained(method, DEEP): {"max_steps": "150", "eval_every": "75"} for method in METHODS}

STUDY = Study(
    name="normfree",
    title="Depth without normalisation",
    question="Without any norm, which initial weights and scales keep the gradient level over 10,001 layers, and which train 110 and 1,004?",
    source="Fixup (arXiv:1901.09321), SkipInit (arXiv:2002.10444; ReZero, arXiv:2003.04887, is the same gamma), LayerScale (arXiv:2103.17239), "
    "DeepNorm (arXiv:2203.00555), beside plain initial weights and LayerNorm",
    cases=CASES,
    scales={
        SMOKE: Scale(
            TINY,
            cases=(trained("Fixup", SHALLOW), trained("DeepNorm", SHALLOW)),
            note="width 4 on synthetic images, four steps: only the machinery",
        ),
        CPU: Scale(
            {**RECIPE, "width": "8", "patch_size": "4", "batch_size": "64", "lr": "2e-3", "max_steps": "350", "eval_every": "175",
             "eval_images": "2000", "engine": "torch"},
            seeds=(0, 1, 2),
            changes=LONGER,
            once=tuple(name for method in METHODS for name in (trained(method, DEEP), at_init(method))),
            note="width 8, patches of 4 x 4 pixels; 350 steps of batch 64 (half an epoch) at 110 layers, 150 at 1,004 with one seed; the norms of "
            "stem, downsamplings and head are left out, too",
        ),
        FULL: Scale(
            {**RECIPE, "width": "64", "patch_size": "1", "batch_size": "64", "lr": "1e-3", "epochs": "100", "color_jitter": "0.2",
             "precision": "bf16"},
            seeds=(0, 1, 2),
            cases=tuple(trained(method, DEEP) for method in METHODS) + tuple(at_init(method) for method in METHODS),
            note="the first study's network and recipe without its norms, at 1,004 layers",
        ),
    },
    columns={
        ACCURACY: "validation", "test/accuracy": "test", "train/loss": "training loss", **FLOW,
        f"{GRADIENT} mean over the run": "first layer's gradient",
    },
    findings=(
        Finding(f"He's weights alone explode without a norm over {DEEPEST:,} layers.", _explodes, _level(HE).measured),
        _level(PLAIN), *(_level(method) for method in REMEDIES), _level(NORMED),
        Finding("He's weights alone train neither depth without a norm.", _fails, _reached([HE], SHALLOW, DEEP)),
        _train(SHALLOW), _train(DEEP),
        Finding(f"The best of the four is as good as LayerNorm at {DEEP:,} layers after the same steps: within {BESIDE:.0%}.", _as_good,
                _reached([NORMED, *REMEDIES], DEEP)),
    ),
    figures=(
        Figure("init", f"The gradient at the block outputs of {DEEPEST:,} layers at their initial values (the second of two steps; seed 0). What is "
               "not finite leaves no line.",
               figures.against_depth("output_grad_l2", moments=(-1,), cases=[at_init(method) for method in METHODS])),
        Figure("curves-110", "110 layers while they train: mean over the seeds, bands of one standard deviation.",
               figures.curves("train/loss", ACCURACY, GRADIENT, cases=[trained(method, SHALLOW) for method in METHODS])),
        Figure("curves-1004", "1,004 layers while they train, seed 0.",
               figures.curves("train/loss", ACCURACY, GRADIENT, cases=[trained(method, DEEP) for method in METHODS])),
    ),
    converged=Converged(ACCURACY, above=LEARNED),
    profiles=("mean_abs", "output_grad_l2", "output_std"),
    notes=(
        "Fixup's scalar multiplier is gamma, 1 at first; its biases are the convolutions' own, one per channel, but for the two whose effect the "
        "next convolution's bias has. DeepNorm's x + branch / alpha is its alpha x + branch without the norm that takes the scale away.",
    ),
)  # fmt: skip
