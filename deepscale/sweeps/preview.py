"""`--dry-run`: the trials of a sweep with the memory and the time that the planner expects of each; nothing is trained."""

import dataclasses
import functools
import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from deepscale import config, kernel, plan, world
from deepscale.config import AUTO, CheckpointConfig, Config, DataConfig, RecipeConfig
from deepscale.data.sources import load_source
from deepscale.errors import UsageError
from deepscale.machine import Machine, measure_machine
from deepscale.plan_command import process_bytes
from deepscale.plan_network import flops_of, images_of
from deepscale.plan_time import measure_step_s
from deepscale.progress import gib, seconds
from deepscale.sweeps.space import Space, Trial, settings_of, training_arguments, trials
from deepscale.world import World

# Images to train on, to validate and to test, and their channels; an image folder's are counted.
IMAGES = {
    "cifar10": (45_000, 5_000, 10_000, 3), "cifar100": (47_500, 2_500, 10_000, 3),
    "fashionmnist": (54_000, 6_000, 10_000, 1), "synthetic": (18_000, 2_000, 4_000, 3),
}  # fmt: skip
# Measured on one core with CIFAR-10, 26 layers (150 steps, plain torch and DeepSpeed, in memory and by FFCV): seconds of a trial before its
# first step and after its last (packages, data, plan, engine, record), and of each step beside the network's own (images, record, screen).
START_S, LOOP_S = 15.0, 0.009
FFCV_S, FFCV_BYTES = 13.0, 300_000_000  # more where FFCV feeds the images: it compiles its decoders anew, and brings numba


@dataclass(frozen=True)
class Images:
    """How many images there are, and what they are."""

    train: int
    validation: int
    test: int
    channels: int
    image_size: int
    classes: int

    @property
    def shape(self) -> dict[str, int]:
        """What the planner wants to know."""
        return {"channels": self.channels, "image_size": self.image_size, "classes": self.classes}


@dataclass(frozen=True)
class Cost:
    """What a configuration takes: bytes of a rank on the host, its process included, and on a GPU; seconds until the first step, of a step, and
    of an image's evaluation."""

    host: int
    device: int
    batch: int
    start_s: float
    step_s: float
    image_s: float


@dataclass(frozen=True)
class Planned:
    """What a trial is expected to take: bytes of all its ranks, steps (None where a time budget decides), seconds from start to end."""

    trial: Trial
    host: int = 0
    device: int = 0
    steps: int | None = None
    seconds: float = math.inf
    problem: str = ""  # why it cannot be trained here


def planned(space: Space, listed: Sequence[Trial], ranks: int, threads: int) -> Iterator[Planned]:
    """Each trial with what it will take on this machine, with so many ranks of so many CPU threads. A few seconds for every size of network."""
    with _threads(threads):
        for trial in listed:
            asked = config.parse(training_arguments(space, trial.settings))
            try:
                images, cost = _images(asked.data), _cost(_deciding(asked), ranks)
            except UsageError as error:
                yield Planned(trial, problem=str(error))
                continue
            steps, took = _length(asked, images, cost)
            yield Planned(trial, ranks * cost.host, ranks * cost.device, steps, cost.start_s + took)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _deciding(asked: Config) -> Config:
    """The settings that decide what a step takes; the others at their defaults, so that trials that differ in them are planned once."""
    recipe, data = asked.recipe, asked.data
    own: dict[str, Any] = {"layerscale_init": None if asked.model.gamma_init is None else 1.0} if asked.model.model == "convnext" else {}
    return Config(
        model=dataclasses.replace(asked.model, **own, init="normal"),
        data=dataclasses.replace(
            DataConfig(),
            dataset=data.dataset,
            data_dir=data.data_dir,
            feed=data.feed,
            batch_size=data.batch_size,
            grey=data.grey,
            image_size=data.image_size,
            eval_images=data.eval_images,
            download=False,
        ),
        recipe=RecipeConfig(accumulation=recipe.accumulation, time_budget=recipe.time_budget),
        engine=asked.engine,
        checkpoint=CheckpointConfig(checkpoint_dir="", async_save=asked.checkpoint.async_save),  # every trial has a folder for them
    )


@functools.lru_cache
def _images(data: DataConfig) -> Images:
    if data.dataset == "folder":
        info = load_source(data, lambda text: None).info
        return Images(info.train_images, info.validation_images, info.test_images, info.channels, info.image_size, info.classes)
    train, validation, test, channels = IMAGES["cifar10" if data.dataset == AUTO else data.dataset]
    side = 32 if data.image_size == AUTO else int(data.image_size)
    return Images(train, validation, test, 1 if data.grey else channels, side, 100 if data.dataset == "cifar100" else 10)


@functools.lru_cache
def _cost(deciding: Config, ranks: int) -> Cost:
    """Raises UsageError for what does not fit here."""
    shape = _images(deciding.data).shape
    device = world.choose_device(deciding.engine)
    place = World(0, ranks, 0, ranks, torch.device(device))
    chosen = kernel.choose(deciding, place, _silent, _silent)
    found = plan.resolve(chosen, place, _left(measure_machine(place), deciding), **shape)
    settings, memory = found.config, found.memory
    flops = flops_of(settings, ranks, **shape)
    step_s = found.step_s or measure_step_s(settings, place, images_of(settings, ranks, **shape))
    batch, ffcv = int(settings.data.batch_size), settings.data.feed != "tensors" and importlib.util.find_spec("ffcv") is not None
    host = process_bytes(deciding) + found.copy + (memory.total if device == "cpu" else memory.host) + ffcv * FFCV_BYTES
    image_s = step_s * flops.forward / flops.total / batch
    return Cost(host, 0 if device == "cpu" else memory.device, batch, START_S + ffcv * FFCV_S, step_s + LOOP_S, image_s)


def _left(machine: Machine, asked: Config) -> Machine:
    """The machine beside the trial's own process."""
    host = max(0, machine.host_bytes - process_bytes(asked))
    return dataclasses.replace(machine, host_bytes=host, device_bytes=host if machine.device == "cpu" else machine.device_bytes)


def _silent(text: str) -> None:
    pass


def _length(asked: Config, images: Images, cost: Cost) -> tuple[int | None, float]:
    """Steps of a training, and its seconds with all its evaluations (loop.Fit)."""
    recipe = asked.recipe
    epoch = max(1, images.train // cost.batch)
    if recipe.max_steps is None and recipe.time_budget is not None:
        return None, recipe.time_budget
    steps = recipe.max_steps or recipe.epochs * epoch
    every = epoch if recipe.eval_every == AUTO else int(recipe.eval_every)
    limit = math.inf if asked.data.eval_images == AUTO else int(asked.data.eval_images)
    evaluated = -(-steps // every) * min(images.validation, limit) + min(images.test, limit)
    return steps, steps * cost.step_s + evaluated * cost.image_s


def show(space: Space, ranks: int = 1, threads: int = 1, concurrent: int = 1, stream: TextIO | None = None) -> None:
    """Prints the trials with what they will take, each as soon as it is planned, and the whole sweep's time with so many at once."""
    stream = stream or sys.stdout
    listed = trials(space) or [Trial(1, settings_of(space, _middle(space)))]
    names = [*space.axes, "seed"]
    widths = [max(len(text) for text in (name, *(trial.settings[name] for trial in listed))) for name in names]
    numbers = max(len("trial"), len(str(len(listed))))
    gpu = False
    lines: list[Planned] = []
    print(f"{space.name}: {space.question}\n", file=stream)
    for row in planned(space, listed, ranks, threads):
        if not lines:
            gpu = bool(row.device)
            print(_line("trial", names, widths, ["steps", "memory", *(["GPU memory"] if gpu else []), "time"], numbers), file=stream)
        lines.append(row)
        amounts = [row.problem] if row.problem else _amounts(row, gpu)
        print(_line(str(row.trial.number), [row.trial.settings[name] for name in names], widths, amounts, numbers), file=stream, flush=True)
    print("\n" + "\n".join(_summary(space, lines, concurrent)), file=stream, flush=True)


def _middle(space: Space) -> dict[str, str | float]:
    """The middle of all ranges, and the first value of every list."""
    middle: dict[str, str | float] = {name: math.sqrt(r.low * r.high) if r.log else (r.low + r.high) / 2 for name, r in space.ranges.items()}
    middle.update({name: axis[0] for name, axis in space.grid.items()})
    return middle


def _amounts(row: Planned, gpu: bool) -> list[str]:
    steps = "as time allows" if row.steps is None else f"{row.steps:,}"
    return [steps, gib(row.host), *([gib(row.device)] if gpu else []), seconds(row.seconds)]


def _line(number: str, values: Sequence[str], widths: Sequence[int], amounts: Sequence[str], numbers: int) -> str:
    cells = [f"{value:<{width}}" for value, width in zip(values, widths, strict=True)]
    amounts = amounts if len(amounts) == 1 else [f"{amount:>14}" if i == 0 else f"{amount:>11}" for i, amount in enumerate(amounts)]
    return "  ".join([f"{number:>{numbers}}", *cells, *amounts])


def _summary(space: Space, rows: Sequence[Planned], concurrent: int) -> Iterator[str]:
    fitting = [row for row in rows if not row.problem]
    count = len(rows)
    took = sum(row.seconds for row in fitting)
    if space.search == "optuna":
        count, took = int(space.samples or 0), took * int(space.samples or 0)
        drawn = ", ".join(f"{name} {r.text(r.low)} to {r.text(r.high)}" for name, r in space.ranges.items())
        yield f"Optuna draws {count:,} points, of which the middle is planned above: {drawn}"
    if len(fitting) < len(rows):
        yield f"{len(rows) - len(fitting):,} of {len(rows):,} trials cannot be trained here"
    if not fitting:
        return
    count -= len(rows) - len(fitting)
    concurrent = max(1, min(concurrent, count))
    longest = max(row.seconds for row in fitting)
    less = "" if space.scheduler == "none" else f", less what {space.scheduler} stops early"
    yield f"{count:,} trials, {concurrent:,} at a time: about {seconds(max(longest, took / concurrent))}{less}"
    need = sorted((row.host for row in fitting), reverse=True)[:concurrent]
    need = need * concurrent if space.search == "optuna" else need
    free = measure_machine(World(0, 1, 0, 1, torch.device("cpu"))).host_bytes
    if sum(need) > free:
        yield f"!!! {concurrent:,} at a time may need {gib(sum(need))}, and {gib(free)} are free here: type a smaller --concurrent"
