"""Stochastic depth at 1,004 layers: what dropping blocks saves in time, and what it does to accuracy."""

import statistics
import time
from pathlib import Path

import torch

from deepscale import config, drawing, kernel
from deepscale.bench.report import number
from deepscale.engine import TorchEngine
from deepscale.models.convnext import ConvNeXt, cross_entropy, use_kernel
from deepscale.studies import figures
from deepscale.studies.page import accuracies
from deepscale.studies.study import CPU, FULL, SMOKE, TINY, Case, Figure, Finding, Measured, Results, Scale, Settings, Study
from deepscale.sweeps import values
from deepscale.world import World

ACCURACY, STEP = "val/accuracy", "perf/step_s median"
NONE, DEPTH = "no dropping", "1004"
TIMED, ROUNDS = "time of a step, in turn", 9
RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
IMAGES = (0.2, 0.5)
SAVED = 0.8  # of the time that the dropped blocks would take, at least
BESIDE = 0.02
RECIPE = {"dataset": "cifar10", "feed": "tensors", "depth": DEPTH}


def blocks(rate: float) -> str:
    """The case of whole blocks dropped."""
    return f"blocks, rate {rate:g}"


def images(rate: float) -> str:
    """The case of a mask on single images' branches."""
    return f"images, rate {rate:g}"


def dropping(case: str, rate: float) -> Settings:
    """What is typed for a case."""
    return {"drop_path": f"{rate:g}", "drop_path_mode": "batch" if case == blocks(rate) else "sample"}


def time_in_turn(settings: Settings, seed: int) -> Measured:
    """CPU seconds of one thread for a step of each case, on random images: all cases in turn, so that what else the machine does meets all alike."""
    torch.manual_seed(seed)
    place = World(0, 1, 0, 1, torch.device("cpu"))
    engines = {}
    for case in CASES:
        typed = [word for name, text in {**settings, **case.settings}.items() for word in values.arguments(name, text)]
        asked = kernel.choose(config.parse([*typed, "--device", "cpu", "--precision", "fp32"]), place, print, print)
        model = ConvNeXt(asked.model).initialise(seed)
        use_kernel(model, str(asked.engine.kernel))
        engines[case.name] = TorchEngine(model, asked, place)
    batch = int(settings["batch_size"])
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            begin = time.process_time()
            engine.backward(cross_entropy(engine.forward(images, True), labels), True)
            engine.step()
            seconds[name].append(time.process_time() - begin)
    own = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one allocates
    return Measured({f"{name}: s": value for name, value in own.items()} | {f"{name}: share": value / own[NONE] for name, value in own.items()})


def share(found: Results, case: str) -> float | None:
    """Time of a step over that without dropping: measured in turn, or else in the trainings."""
    if (measured := found.mean(TIMED, f"{case}: share")) is not None:
        return measured
    whole, own = found.mean(NONE, STEP), found.mean(case, STEP)
    return None if whole is None or own is None else own / whole


def _saves(found: Results) -> bool | None:
    """Rates grow linearly from 0, so half the last one's share of the blocks is dropped."""
    pairs = [(rate, value) for rate in RATES if (value := share(found, blocks(rate))) is not None]
    return None if len(pairs) < len(RATES) else all(1 - value >= SAVED * rate / 2 for rate, value in pairs)


def _saves_nothing(found: Results) -> bool | None:
    values = [share(found, images(rate)) for rate in IMAGES]
    known = [value for value in values if value is not None]
    return None if len(known) < len(IMAGES) else min(known) > 0.95


def _shares(cases: list[str], found: Results) -> str:
    values = {case: value for case in cases if (value := share(found, case)) is not None}
    return "time of a step over that without dropping: " + ", ".join(f"{number(value)} ({case})" for case, value in values.items())


def _improves(found: Results) -> bool | None:
    """Not told by less than the scatter of an accuracy of 2,000 images and few seeds."""
    whole, half = found.mean(NONE), found.mean(blocks(0.5))
    return None if whole is None or half is None or abs(half - whole) < BESIDE else half > whole


def _alike(found: Results) -> bool | None:
    pairs = [(found.mean(blocks(rate)), found.mean(images(rate))) for rate in IMAGES]
    known = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return None if len(known) < len(pairs) else max(known) <= BESIDE


def _draw_time(found: Results, path: Path) -> bool:
    """Share of a step's time against the last block's rate."""
    known = {case.name: value for case in CASES if (value := found.mean(TIMED, f"{case.name}: share")) is not None}
    if not known:
        return False
    figure, axis = drawing.pyplot().subplots(figsize=(5.2, 3.8), layout="constrained")
    axis.plot([0, max(RATES)], [1, 1 - max(RATES) / 2], color="#8f8f8f", linewidth=1, label="blocks that are computed")
    for label, name, rates in (("whole blocks", blocks, RATES), ("single images", images, IMAGES)):
        axis.plot(rates, [known[name(rate)] for rate in rates], "o-" if name is blocks else "s", markersize=4, label=label)
    axis.set_ylim(0, 1.2)
    axis.set_xlabel("rate of the last block, growing from 0 over the depth")
    axis.set_ylabel("time of a step, share of that without dropping")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    drawing.save(figure, path)
    return True


CASES = (
    Case(NONE, {"drop_path": "0"}),
    *(Case(blocks(rate), dropping(blocks(rate), rate)) for rate in RATES),
    *(Case(images(rate), dropping(images(rate), rate)) for rate in IMAGES),
)

STUDY = Study(
    name="dropped",
    title="Stochastic depth at 1,004 layers",
    question="What does dropping blocks while training save in time, and what does it do to accuracy?",
    source="Huang et al. 2016 (arXiv:1603.09382): a block is dropped for the whole mini-batch, the last with probability 0.5; 1,202 layers reach "
    "4.91 % error on CIFAR-10 in 500 epochs",
    cases=(*CASES, Case(TIMED, compute=time_in_turn)),
    scales={
        SMOKE: Scale(
            {**TINY, "depth": "110"},
            cases=(blocks(0.5),),
            note="110 layers of width 4 on synthetic images, four steps: only the machinery",
        ),
        CPU: Scale(
            {**RECIPE, "width": "8", "patch_size": "4", "batch_size": "64", "lr": "2e-3", "max_steps": "150", "eval_every": "75",
             "eval_images": "2000", "engine": "torch", "record_every": "50"},
            note="width 8, patches of 4 x 4 pixels, 150 steps of batch 64 (a fifth of an epoch) instead of 500 epochs: the time is measured, the "
            "accuracy is an early one; one seed",
        ),
        FULL: Scale(
            {**RECIPE, "width": "64", "patch_size": "1", "batch_size": "64", "lr": "1e-3", "epochs": "100", "color_jitter": "0.2",
             "precision": "bf16"},
            cases=tuple(case.name for case in CASES),
            seeds=(0, 1, 2),
            note="the first study's network and recipe",
        ),
    },
    columns={
        ACCURACY: "validation", "test/accuracy": "test", "train/loss": "training loss",
        "perf/peak_memory_bytes": "peak memory, bytes",
    },
    findings=(
        Finding(f"Dropping whole blocks saves at least {SAVED:.0%} of the time that the dropped ones would take (half the last block's rate).",
                _saves, lambda found: _shares([blocks(rate) for rate in RATES], found)),
        Finding("Dropping blocks for single images saves no time.", _saves_nothing, lambda found: _shares([images(rate) for rate in IMAGES], found)),
        Finding("Stochastic depth of rate 0.5 reaches more than none.", _improves, accuracies()),
        Finding(f"For whole batches it is as good as for single images: within {BESIDE:.0%} of validation accuracy.", _alike,
                accuracies(*(kind(rate) for rate in IMAGES for kind in (blocks, images)))),
    ),
    figures=(
        Figure("curves", "Loss (of the networks with dropped blocks) and validation accuracy (of the whole network).",
               figures.curves("train/loss", ACCURACY)),
        Figure("time", "Time of a step over that without dropping, median of steps taken in turn; the line is the share of blocks that are computed.",
               _draw_time),
    ),
)  # fmt: skip
