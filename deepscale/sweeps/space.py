"""A space: the question of a sweep, and the settings that are trained to answer it. Knows neither Ray nor MLflow.

    question: Which activation trains a deep network best, with a norm and without?
    fixed: {depth: 110, max_steps: 1000}     # settings of deepscale/train.py
    grid: {activation: [gelu, tanh], norm: [layernorm, none]}
    seeds: [0, 1, 2]

Values are texts as one would type them on the command line, and are read by the settings' own rules.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepscale import config
from deepscale.errors import UsageError
from deepscale.paths import as_folder
from deepscale.sweeps import texts, values
from deepscale.sweeps.fields import Found, at, fields
from deepscale.sweeps.texts import Text
from deepscale.sweeps.values import Range

DRAWN_WITH = 0  # seed of random search: the same space gives the same trials, and more samples begin with the same ones


@dataclass(frozen=True)
class Space:
    """What a sweep trains. Of axes with both a list and a range it holds the one that its search uses."""

    name: str  # stem of the file
    question: str
    fixed: dict[str, str]  # setting -> value as text, as one would type it
    grid: dict[str, tuple[str, ...]]  # axes in the order of the file
    ranges: dict[str, Range]  # of random and Optuna's search; empty for a grid
    without: tuple[dict[str, str], ...] = ()  # points of the grid that are left out
    seeds: tuple[int, ...] = (0,)
    metric: str = "val/accuracy"
    mode: str = "max"
    converged: float = 0.5  # validation accuracy, as a share, from which on a training counts as converged
    search: str = "grid"
    samples: int | None = None  # points of random and Optuna's search
    scheduler: str = "none"

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of what is varied, but for the seed."""
        return (*self.grid, *self.ranges)


@dataclass(frozen=True)
class Trial:
    """One training. `settings`: the axes' values and "seed"; `number` counts from 1."""

    number: int
    settings: dict[str, str]

    @property
    def label(self) -> str:
        """What tells it from the others: "activation=gelu norm=none seed=1"."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())

    @property
    def folder(self) -> str:
        """A name for its folder: "007-activation=gelu_norm=none_seed=1"."""
        return f"{self.number:03}-{as_folder(self.label)}"


def trials(space: Space) -> list[Trial]:
    """All trainings of a grid or of random search, in a fixed order: all points with the first seed come before any with the second.

    Empty for Optuna's search, whose points follow from results (`settings_of` makes settings of them).
    """
    if space.search == "optuna":
        return []
    points = _grid_points(space) if space.search == "grid" else _drawn_points(space)
    settings = [point | {"seed": str(seed)} for seed in space.seeds for point in points]
    return [Trial(number, given) for number, given in enumerate(settings, 1)]


def _grid_points(space: Space) -> list[dict[str, str]]:
    every = [dict(zip(space.grid, point, strict=True)) for point in itertools.product(*space.grid.values())]
    return [point for point in every if not any(_is_at(space.fixed | point, left_out) for left_out in space.without)]


def _is_at(settings: dict[str, str], point: dict[str, str]) -> bool:
    return all(name in settings and values.value(name, settings[name]) == values.value(name, text) for name, text in point.items())


def _drawn_points(space: Space) -> list[dict[str, str]]:
    source = random.Random(DRAWN_WITH)

    def point() -> dict[str, str]:
        return {name: source.choice(axis) for name, axis in space.grid.items()} | {name: r.draw(source) for name, r in space.ranges.items()}

    return [point() for _ in range(space.samples or 0)]


def settings_of(space: Space, point: Mapping[str, Any]) -> dict[str, str]:
    """A trial's settings from what a search gives: numbers of the ranges, texts of the axes, and a seed or none."""
    settings = {name: space.ranges[name].text(point[name]) if name in space.ranges else str(point[name]) for name in space.axes}
    return settings | {"seed": str(point.get("seed", space.seeds[0]))}


def training_arguments(space: Space, settings: Mapping[str, str]) -> list[str]:
    """What deepscale/train.py gets typed for a trial, but for what the sweep itself says (experiment, run name, checkpoints)."""
    return [word for name, text in (space.fixed | dict(settings)).items() for word in values.arguments(name, text)]


def read(path: Path | str, overrides: Sequence[str] = (), keys: Mapping[str, str] | None = None) -> Space:
    """The space in a file, every one of its trials checked.

    `overrides`: settings as typed for deepscale/train.py, which win over the file's; an axis is fixed by them, and --seed the seeds.
    `keys`: search, samples, scheduler, seeds, metric, mode, converged as typed ("0,1,2"), which win too. Raises UsageError that
    names file and line.
    """
    return _space(Path(path).stem, str(path), texts.read(Path(path)), overrides, keys)


def of_axes(name: str, axes: Sequence[str], overrides: Sequence[str] = (), keys: Mapping[str, str] | None = None) -> Space:
    """A grid as typed, without a file: axes like "layerscale_init=0,0.01,1". Raises UsageError."""
    grid: Found = {}
    for text in axes:
        axis, equals, listed = text.partition("=")
        where = f"--grid {text}"
        if not (equals and axis and listed):
            raise UsageError(f"{where} is not a setting and its values; type for example --grid layerscale_init=0,0.01,1")
        if axis in grid:
            raise UsageError(f"{where} varies {axis} again; leave one of the two out")
        grid[Text(axis, where)] = [Text(value, where) for value in listed.split(",")]
    found: Found = {"question": Text(f"What does {' and '.join(grid)} change?", "--grid"), "grid": grid}
    return _space(name, "--grid", found, overrides, keys)


def _space(name: str, where: str, found: Found, overrides: Sequence[str], keys: Mapping[str, str] | None) -> Space:
    typed: Found = {Text(key, f"--{key}"): Text(text, f"--{key} {text}") for key, text in (keys or {}).items()}
    if "seeds" in typed:
        typed["seeds"] = [Text(part, typed["seeds"].where) for part in typed["seeds"].split(",")]
    # The typed keys first: a dict keeps the first of two equal keys, and with it the place that a message names.
    space = _with_typed(Space(name, **fields(typed | found | typed, where)), overrides)
    checked = list(_corners(space)) if space.search == "optuna" else trials(space)
    if not checked:
        raise UsageError(f"{where}: without leaves nothing to train")
    for trial in checked:
        with at(f"{where}, {trial.label}"):
            config.parse(training_arguments(space, trial.settings))
    return space


def _corners(space: Space) -> Iterator[Trial]:
    """Trainings at the ends of all ranges, with every value of the axes: what Optuna asks for lies between."""
    ends = {name: (r.text(r.low), r.text(r.high)) for name, r in space.ranges.items()}
    yield from trials(dataclasses.replace(space, search="grid", grid=space.grid | ends))


def _with_typed(space: Space, overrides: Sequence[str]) -> Space:
    """The space with these settings fixed."""
    settings, names = config.parse_typed(overrides, "python tune/sweep.py")
    seeds = space.seeds
    if "seed" in names:
        seeds, names = (settings.recipe.seed,), names - {"seed"}
    given = config.flat(settings)
    typed = {values.setting(name): values.text_of(name, given[name]) for name in given if name in names}
    grid = {name: axis for name, axis in space.grid.items() if name not in typed}
    ranges = {name: axis for name, axis in space.ranges.items() if name not in typed}
    return dataclasses.replace(space, fixed=space.fixed | typed, grid=grid, ranges=ranges, seeds=seeds)
