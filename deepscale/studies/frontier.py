"""How far depth goes on one CPU with 24 GB: start, step and memory up to a million layers, beside what was planned, and their gradients."""

from deepscale.depth import MAX_DEPTH
from deepscale.studies import figures
from deepscale.studies.page import amount
from deepscale.studies.study import CPU, FULL, SMOKE, TINY, Case, Converged, Figure, Finding, Results, Scale, Study

GIB = 2**30
START, STEP, PEAK, PLANNED, LOSS = "perf/start_s", "perf/step_s median", "perf/peak_memory_over_start_bytes", "planned_memory_bytes", "train/loss"
MAIN = "100,001 layers, width 8"
DEPTHS = {10_001: 8, 100_001: 8, 340_001: 8, 1_000_001: 4}  # layers -> width
START_S, BESIDE = 60.0, 0.10


def name_of(depth: int, width: int) -> str:
    """The case of a depth."""
    return f"{depth:,} layers, width {width}"


CASES = {name_of(depth, width): {"depth": str(min(depth, MAX_DEPTH)), "width": str(width)} for depth, width in DEPTHS.items()}
SHORT = {name: {"max_steps": "2"} for name, settings in CASES.items() if int(settings["depth"]) > 100_001}


def _steps(found: Results) -> bool | None:
    return found.converged(MAIN)


def _starts(found: Results) -> bool | None:
    start = found.mean(MAIN, START)
    return None if start is None else start <= START_S


def _ratios(found: Results) -> dict[str, float]:
    """Case -> measured over planned."""
    known = {name: (found.mean(name, PEAK), found.mean(name, PLANNED)) for name in found.groups}
    return {name: peak / planned for name, (peak, planned) in known.items() if peak is not None and planned}


def _as_planned(found: Results) -> bool | None:
    ratios = _ratios(found)
    return None if not ratios else all(abs(ratio - 1) <= BESIDE for ratio in ratios.values())


def _listed(metric: str, unit: str, found: Results) -> str:
    values = {name: value for name in found.groups if (value := found.mean(name, metric)) is not None}
    return ", ".join(f"{amount(value)} {unit} ({name})" for name, value in values.items())


STUDY = Study(
    name="frontier",
    title="The frontier: a hundred thousand layers, and more",
    question="How deep a network takes steps on one CPU with 24 GB of memory, what does that take, and does its gradient reach the image?",
    source='no study before: "Going Beyond the 1000-Layer Convolution Network" (Ludwiczuk) ends at 1,607 layers',
    cases=tuple(Case(name, settings) for name, settings in CASES.items()),
    scales={
        SMOKE: Scale({**TINY, "depth": "110"}, cases=(name_of(10_001, 8),), changes={name_of(10_001, 8): {"depth": "110", "width": "4"}},
                     note="110 layers of width 4: only the machinery"),
        CPU: Scale(
            {
                "dataset": "cifar10", "feed": "tensors", "patch_size": "4", "batch_size": "8", "lr": "1e-3", "max_steps": "8", "eval_images": "16",
                "async_save": "false", "engine": "deepspeed",
            },
            changes=SHORT,
            note="patches of 4 x 4 pixels, batch 8, AdamW, float32; eight steps, two beyond 100,001 layers",
        ),
        FULL: Scale(
            {"dataset": "cifar10", "patch_size": "1", "batch_size": "64", "lr": "1e-3", "max_steps": "20", "eval_images": "512", "precision": "bf16"},
            cases=(name_of(10_001, 8), MAIN),
            changes={name: {"width": "64"} for name in CASES},
            note="the first study's width and batch, on a GPU with its host's memory",
        ),
    },
    columns={
        "parameters": "parameters", START: "start, s", STEP: "s per step", PLANNED: "planned, bytes", PEAK: "peak over the start, bytes",
        "perf/peak_memory_bytes": "peak of the process, bytes", LOSS: "training loss",
    },
    findings=(
        Finding("100,001 layers of width 8 take steps of training.", _steps, lambda found: _listed(STEP, "s a step", found)),
        Finding(f"They take their first step within {START_S:.0f} s.", _starts, lambda found: _listed(START, "s", found)),
        Finding(
            f"The memory of all of them is planned within {BESIDE:.0%}.", _as_planned,
            lambda found: "measured over planned: " + ", ".join(f"{amount(ratio)} ({name})" for name, ratio in _ratios(found).items()),
        ),
    ),
    figures=(
        Figure("gradient", "The gradient at the output of every block against its depth, at the first and at the last step.",
               figures.against_depth("output_grad_l2", relative=True)),
        Figure("weights", "The gradient of the weights of 100,001 layers against their depth, step by step.",
               figures.over_records("mean_abs", cases=[MAIN])),
    ),
    converged=Converged(LOSS, above=0.0),
    profiles=("mean_abs", "output_grad_l2"),
    notes=(
        "Converged means here that it took its steps. To be run alone (`--concurrent 1`) on a machine that is otherwise idle: the deepest take "
        "nearly all of its memory.",
        "Start: from the row's process, which has its packages imported by the study, to the first step; a command adds the launcher and imports.",
        "What stops it is the memory of weights, gradients and AdamW's two moments, 16 bytes a parameter: at width 8 the planner refuses more than "
        "what 24 GB hold; at width 4 a million layers, the most that --depth takes, fit.",
    ),
)  # fmt: skip
