"""Are the layers used? What every block adds to the stream over training, and the accuracy that is left without the least used blocks."""

import itertools
import random
from pathlib import Path
from typing import Any

from deepscale import drawing, use
from deepscale.bench.report import number
from deepscale.checkpoints.trained import trained
from deepscale.evaluate import open_trained
from deepscale.studies import figures
from deepscale.studies.study import CPU, FULL, SMOKE, TINY, Case, Figure, Finding, Measured, Results, Scale, Settings, Study

ACCURACY, EFFECTIVE, BLOCKS, NEEDED = "val/accuracy", "effective blocks", "blocks", "blocks needed"
LEAST, ANY = "accuracy without the least used", "accuracy without blocks drawn at random"
REMOVED = (0, 10, 25, 50, 75, 90, 95, 100)  # % of the blocks
CHANCE = 0.1
KEPT = 0.95  # of what the network has learnt over chance: what the blocks that are needed must reach
DEPTHS = (26, 302, 1004, 10001)
RECIPE = {"dataset": "cifar10", "feed": "tensors", "layerscale_init": "0", "keep": "100"}


def name_of(depth: int) -> str:
    """The case of a depth."""
    return f"{depth:,} layers"


def measure(folder: Path, settings: Settings, seed: int) -> Measured:
    """Of a trained network and its checkpoints: every block's use and |gamma|, and test accuracy without the least used and without random blocks."""
    opened = open_trained(trained(folder))
    watched, tested = opened.feed("validation", use.MEASURED), opened.feed("test")
    shares = use.use_of_blocks(opened.model, watched, opened.engine)
    profiles: dict[str, dict[str, Any]] = {"use": {}, "gamma": {}}
    for path in sorted(folder.glob("step-*")):
        found = trained(path)
        model = found.network()
        step, own = str(found.step), use.use_of_blocks(model, watched)
        profiles["use"][step], profiles["gamma"][step] = _against_depth(own), _against_depth(use.gammas(model))
    drawn = list(range(len(shares)))
    random.Random(seed).shuffle(drawn)
    counts = [round(len(shares) * percent / 100) for percent in REMOVED]
    curves = {}
    for name, order in ((LEAST, use.least_used(shares)), (ANY, drawn)):
        rows = use.without(opened.model, opened.engine, tested, opened.place, order, counts)
        curves[name] = [(float(percent), row["accuracy"]) for percent, row in zip(REMOVED, rows, strict=True)]
    chance = 1 / opened.source.info.classes
    enough = chance + KEPT * (curves[LEAST][0][1] - chance)
    removable = max(count for count, (_, accuracy) in zip(counts, curves[LEAST], strict=True) if accuracy >= enough or not count)
    numbers = {BLOCKS: float(len(shares)), EFFECTIVE: effective(shares), NEEDED: float(len(shares) - removable)}
    numbers |= {"needed share": numbers[NEEDED] / len(shares), "effective share": numbers[EFFECTIVE] / len(shares)}
    return Measured(numbers, curves, profiles)


def effective(shares: list[float]) -> float:
    """The participation ratio (sum u)^2 / sum u^2: n where n blocks are used equally and the others not at all."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / squares if squares else 0.0


def _against_depth(values: list[float]) -> list[tuple[float, float]]:
    """(layer, value): the depth of a block is that of its last layer."""
    return [(1.0 + 3 * (i + 1), value) for i, value in enumerate(values)]


def _without(found: Results, case: str, name: str, percent: float) -> float | None:
    known = [value for row in found[case].rows for at, value in row.curves.get(name, ()) if at == percent]
    return sum(known) / len(known) if known else None


def _deep(found: Results) -> list[str]:
    return [name_of(depth) for depth in DEPTHS[1:] if found[name_of(depth)].rows]


def _all_used(found: Results) -> bool | None:
    shares = [found.mean(case, "needed share") for case in _deep(found)]
    known = [share for share in shares if share is not None]
    return None if not known else min(known) > 0.9


def _grows(found: Results) -> bool | None:
    pairs = [(found.mean(name_of(depth), EFFECTIVE), found.mean(name_of(depth), BLOCKS)) for depth in DEPTHS]
    known = [(own, all_) for own, all_ in pairs if own is not None and all_ is not None]
    return None if len(known) < 2 else all(a[0] < b[0] for a, b in itertools.pairwise(known))


def _chosen(found: Results) -> bool | None:
    """Leaving out half of the blocks: least used against drawn ones."""
    pairs = [(_without(found, case, LEAST, 50), _without(found, case, ANY, 50)) for case in _deep(found)]
    known = [(least, any_) for least, any_ in pairs if least is not None and any_ is not None]
    return None if not known else all(least > any_ for least, any_ in known)


def _without_any(found: Results) -> bool | None:
    """Whether the blocks are what the deep networks know: without any of them less than half of what was learnt is left."""
    pairs = [(_without(found, case, LEAST, 0), _without(found, case, LEAST, 100)) for case in _deep(found)]
    known = [(whole, none) for whole, none in pairs if whole is not None and none is not None]
    return None if not known else all(none - CHANCE < (whole - CHANCE) / 2 for whole, none in known)


def _outside(found: Results) -> str:
    parts = []
    for name in found.groups:
        whole, none = (_without(found, name, LEAST, at) for at in (0, 100))
        if whole is not None and none is not None:
            parts.append(f"{whole:.1%} and {none:.1%} without any ({name})")
    return "test accuracy: " + ", ".join(parts)


def _half(found: Results) -> str:
    parts = []
    for name in found.groups:
        whole, least, drawn = (_without(found, name, key, at) for key, at in ((LEAST, 0), (LEAST, 50), (ANY, 50)))
        if whole is not None and least is not None and drawn is not None:
            parts.append(f"{name} {whole:.1%}, {least:.1%} without the least used half, {drawn:.1%} without a random half")
    return "test accuracy: " + "; ".join(parts)


def _needed(found: Results) -> str:
    return "blocks that keep 95 % of what was learnt, of all: " + _ratios(found, NEEDED)


def _effective(found: Results) -> str:
    return "effective blocks, of all: " + _ratios(found, EFFECTIVE)


def _ratios(found: Results, metric: str) -> str:
    pairs = {name: (found.mean(name, metric), found.mean(name, BLOCKS)) for name in found.groups}
    return ", ".join(f"{number(own)} of {all_:,.0f} ({name})" for name, (own, all_) in pairs.items() if own is not None and all_ is not None)


def _draw_pruned(found: Results, path: Path) -> bool:
    """Test accuracy against the removed share: the least used blocks first, and blocks drawn at random."""
    groups = [group for group in found.groups.values() if any(row.curves.get(LEAST) for row in group.rows)]
    if not groups:
        return False
    figure, axis = drawing.pyplot().subplots(figsize=(6.4, 4.2), layout="constrained")
    for i, group in enumerate(groups):
        for name, style, label in ((LEAST, "-", group.case.name), (ANY, ":", None)):
            x, mean, _ = figures.over_seeds(group, name)
            axis.plot(x, 100 * mean, style, marker="o", markersize=3, color=figures.COLOURS[i], label=label)
    axis.set_xlabel("blocks left out, % of all: the least used first (solid), or drawn at random (dotted)")
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    drawing.save(figure, path)
    return True


STUDY = Study(
    name="used",
    title="Are the layers used?",
    question="With LayerScale's gamma of 0 a network begins as none of its blocks: how many of them does it use when it is trained?",
    source="the question that study 1 leaves open; removal of layers after Veit et al. 2016 (arXiv:1605.06431)",
    cases=tuple(Case(name_of(depth), {"depth": str(depth)}, after=measure) for depth in DEPTHS),
    scales={
        SMOKE: Scale(
            {**TINY, "keep": "100", "layerscale_init": "0", "checkpoint_every": "2steps"},
            cases=(name_of(26),),
            note="26 layers of width 4 on synthetic images, four steps: only the machinery",
        ),
        CPU: Scale(
            {**RECIPE, "width": "8", "patch_size": "4", "batch_size": "64", "lr": "2e-3", "max_steps": "700", "eval_every": "350",
             "eval_images": "1000", "engine": "torch", "checkpoint_every": "140steps", "record_every": "50"},
            changes={
                name_of(1004): {"max_steps": "350", "eval_every": "175", "checkpoint_every": "70steps"},
                name_of(10001): {"max_steps": "40", "eval_every": "40", "checkpoint_every": "10steps", "batch_size": "32", "eval_images": "256"},
            },
            note="width 8, patches of 4 x 4 pixels; 700 steps of batch 64 (an epoch), 350 at 1,004 layers, 40 of batch 32 at 10,001; one seed",
        ),
        FULL: Scale(
            {**RECIPE, "width": "64", "patch_size": "1", "batch_size": "64", "lr": "1e-3", "epochs": "100", "color_jitter": "0.2",
             "precision": "bf16", "checkpoint_every": "10000steps"},
            cases=tuple(name_of(depth) for depth in DEPTHS[:3]),
            seeds=(0, 1, 2),
            note="the first study's network and recipe",
        ),
    },
    columns={
        ACCURACY: "validation", "test/accuracy": "test", BLOCKS: "blocks", EFFECTIVE: "effective blocks", "effective share": "share",
        NEEDED: "blocks that keep 95 %", "needed share": "their share",
    },
    findings=(
        Finding(f"All blocks of the deep networks are used: more than 90 % of them are needed for {KEPT:.0%} of what was learnt.",
                _all_used, _needed),
        Finding("What the deep networks know is in their blocks: without any, stem, downsamplings and head keep less than half of what was learnt.",
                _without_any, _outside),
        Finding("A deeper network uses more blocks: their effective number grows with the depth.", _grows, _effective),
        Finding("What a block adds tells whether it is needed: without the least used half more is left than without a random half.", _chosen, _half),
    ),
    figures=(
        Figure("pruned", "Test accuracy against the share of blocks that are left out of the trained network: mean over the seeds.", _draw_pruned),
        Figure("use", "What each block adds to the stream over what it is given, against depth: light early in training, dark late (the legend "
               "has the first panel's steps); seed 0.",
               figures.over_records("use")),
        Figure("gamma", "|gamma| of each block against depth: light early in training, dark late (the legend has the first panel's steps); seed 0.",
               figures.over_records("gamma")),
    ),
    profiles=("output_grad_l2",),
    notes=(
        "A block's use is |gamma branch(x)| / |x|: L2 norms over an image's whole stream, averaged over 500 validation images. A block that is left "
        "out is gone past by its skip connection, which is the same as a gamma of 0. The effective number of blocks is (sum of uses)^2 / (sum of "
        "their squares). Chance is taken off before 95 % are asked for; left out were "
        + ", ".join(map(str, REMOVED)) + " % of the blocks.",
    ),
)  # fmt: skip
