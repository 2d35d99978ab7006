"""A space's file key by key: its texts checked, each by its own rule, and made into the fields of a Space (space.py)."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepscale.errors import UsageError, unknown_choice
from deepscale.parsing import parse_count
from deepscale.sweeps import values
from deepscale.sweeps.texts import where_of
from deepscale.sweeps.values import Range

METRICS = {"val/accuracy": "max", "val/loss": "min"}  # what a sweep may choose by, and what is good; the test set chooses nothing
SEARCHES = ("grid", "random", "optuna")
SCHEDULERS = ("none", "asha", "median")
KEYS = {
    "question": "question: Which activation trains best?",
    "fixed": "fixed: {depth: 110, max_steps: 1000}",
    "grid": "grid: {activation: [gelu, tanh]}",
    "without": "without: [{layerscale_init: none, layerscale_shape: channel}]",
    "ranges": "ranges: {lr: {low: 1e-4, high: 1e-2, log: true}}",
    "seeds": "seeds: [0, 1, 2]",
    "metric": "metric: val/accuracy",
    "mode": "mode: max",
    "converged": "converged: 0.5",
    "search": "search: random",
    "samples": "samples: 16",
    "scheduler": "scheduler: asha",
}  # with an example of each
Found = dict[str, Any]  # the keys and their values: texts.Text, in lists and mappings


def fields(found: Found, where: str) -> dict[str, Any]:
    """The fields of the Space that a file describes, but for its name. Raises UsageError that says where."""
    for key in found:
        if key not in KEYS:
            with at(where_of(key)):
                raise unknown_choice("key", key, KEYS)
    if not found.get("question"):
        raise UsageError(f"{where} asks no question; type for example {KEYS['question']}")
    fixed = {name: _value(name, given, key) for name, key, given in _settings(found, "fixed")}
    grid = {name: _axis(name, given, key) for name, key, given in _settings(found, "grid")}
    ranges = {name: _range(name, given, key) for name, key, given in _settings(found, "ranges")}
    if twice := [name for name in fixed if name in grid or name in ranges]:
        raise UsageError(f"{where}: {twice[0]} is fixed and varied; leave it out of one")
    search = _choice(found, "search", SEARCHES)
    metric = _choice(found, "metric", tuple(METRICS))
    seeds = _seeds(found)
    without = tuple(_point(point, fixed | grid, where) for point in _list(found, "without"))
    if search == "grid":
        if missing := [name for name in ranges if name not in grid]:
            raise UsageError(f"{where}: {missing[0]} has a range and no values for a grid; list some under grid, or type search: random")
        ranges = {}
    else:
        grid = {name: texts for name, texts in grid.items() if name not in ranges}
        if without:
            raise UsageError(f"{where}: without leaves points of a grid out, and the search is {search}; leave it out, or type search: grid")
    if not grid and not ranges and len(seeds) == 1:
        raise UsageError(f"{where} varies nothing; type for example {KEYS['grid']}")
    return {
        "question": str(_text(found, "question")), "fixed": fixed, "grid": grid, "ranges": ranges, "without": without, "seeds": seeds,
        "metric": metric, "mode": _choice(found, "mode", ("max", "min")) if "mode" in found else METRICS[metric],
        "converged": _share(found), "search": search, "samples": _samples(found, search, where),
        "scheduler": _choice(found, "scheduler", SCHEDULERS),
    }  # fmt: skip


@contextmanager
def at(where: str) -> Iterator[None]:
    """Puts a place before the sentence of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _settings(found: Found, key: str) -> Iterator[tuple[str, str, Any]]:
    """(setting, its name as it stands there, what is given for it) of a mapping."""
    given = found.get(key, None)
    if key in found and (not isinstance(given, dict) or not given):
        raise UsageError(f"{_place(found, key)}: {key} names no settings; type for example {KEYS[key]}, or leave {key} out")
    named = set()
    for text, value in (given or {}).items():
        with at(where_of(text)):
            name = values.setting(text)
            if name in named:
                raise UsageError(f"{name} is there twice; leave one of the two out")
        named.add(name)
        yield name, text, value


def _place(found: Found, key: str) -> str:
    return where_of(next(text for text in found if text == key))


def _value(name: str, given: Any, key: str) -> str:
    """One value's text; a list is a value of several numbers: [1, 1, 5, 1] for blocks."""
    if isinstance(given, list) and given and all(isinstance(part, str) for part in given):
        text = ",".join(given)
    elif isinstance(given, str):
        text = str(given)
    else:
        raise UsageError(f"{where_of(key)}: {name} takes one value; type for example {KEYS['fixed']}")
    with at(where_of(given if isinstance(given, str) else key)):
        values.value(name, text)
    return text


def _axis(name: str, given: Any, key: str) -> tuple[str, ...]:
    if not isinstance(given, list):
        raise UsageError(f"{where_of(key)}: {name} is an axis and takes a list of values; type for example {KEYS['grid']}")
    if not given:
        raise UsageError(f"{where_of(key)}: the axis {name} is empty; list its values, or leave it out")
    texts = tuple(_value(name, value, key) for value in given)
    known: dict[Any, str] = {}
    for text in texts:
        same = known.setdefault(values.value(name, text), text)
        if same is not text:
            raise UsageError(f"{where_of(key)}: {name} has {same} and {text}, which are the same; each value is trained once")
    return texts


def _range(name: str, given: Any, key: str) -> Range:
    where = where_of(key)
    if not isinstance(given, dict) or not {"low", "high"} <= set(given) <= {"low", "high", "log"}:
        raise UsageError(f"{where}: the range of {name} has low, high, and log if it is drawn in its logarithm; type for example {KEYS['ranges']}")
    if not values.is_number(name):
        raise UsageError(f"{where}: {name} is no number and has no range; list its values under grid")
    ends = []
    for end in ("low", "high"):
        text = _value(name, given[end], key)
        if isinstance(values.value(name, text), str | None):
            raise UsageError(f"{where}: {end} of {name} is {text}; an end of a range is a number")
        ends.append(float(values.value(name, text)))
    with at(where):
        log = values.switch(str(given.get("log", "false")))
        if ends[0] >= ends[1]:
            raise UsageError(f"{name} ranges from {ends[0]:g} to {ends[1]:g}; low must be less than high")
        if log and ends[0] <= 0:
            raise UsageError(f"{name} ranges from {ends[0]:g} on, which has no logarithm; type a low above 0, or log: false")
    return Range(ends[0], ends[1], log, values.is_whole(name))


def _point(given: Any, known: dict[str, Any], where: str) -> dict[str, str]:
    """A point that is left out of the grid: values that its axes have."""
    if not isinstance(given, dict) or not given:
        raise UsageError(f"{where}: without lists points of the grid; type for example {KEYS['without']}")
    point = {name: _value(name, value, name) for name, _, value in _settings({"without": given}, "without")}
    for name, text in point.items():
        axis = known.get(name, ())
        if values.value(name, text) not in [values.value(name, other) for other in ([axis] if isinstance(axis, str) else axis)]:
            raise UsageError(f"{where}: without has {name}: {text}, which is not in the grid")
    return point


def _list(found: Found, key: str) -> list[Any]:
    given = found.get(key, [])
    if not isinstance(given, list) or (key in found and not given):
        raise UsageError(f"{_place(found, key)}: {key} takes a list; type for example {KEYS[key]}")
    return given


def _seeds(found: Found) -> tuple[int, ...]:
    seeds = []
    for text in _list(found, "seeds"):
        place = where_of(text) if isinstance(text, str) else _place(found, "seeds")
        if not isinstance(text, str):
            raise UsageError(f"{place}: a seed is a whole number; type for example {KEYS['seeds']}")
        with at(place):
            seeds.append(values.value("seed", text))
            if seeds.count(seeds[-1]) > 1:
                raise UsageError(f"seed {text} is there twice; each seed is trained once")
    return tuple(seeds) or (0,)


def _text(found: Found, key: str) -> str:
    given = found[key]
    if not isinstance(given, str) or not given.strip():
        raise UsageError(f"{_place(found, key)}: {key} takes a text; type for example {KEYS[key]}")
    return given


def _choice(found: Found, key: str, known: tuple[str, ...]) -> str:
    """One of these names; the first of them where the key is left out."""
    if key not in found:
        return known[0]
    text = str(_text(found, key))
    if text not in known:
        with at(_place(found, key)):
            raise unknown_choice(key, text, known)
    return text


def _share(found: Found) -> float:
    text = _text(found, "converged") if "converged" in found else "0.5"
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"{_place(found, 'converged')}: converged is an accuracy from 0 to 1, and {text} was given; type {KEYS['converged']}")
    return share


def _samples(found: Found, search: str, where: str) -> int | None:
    if "samples" not in found:
        if search != "grid":
            raise UsageError(f"{where}: search: {search} draws points, and samples does not say how many; type for example {KEYS['samples']}")
        return None
    try:
        count = parse_count(_text(found, "samples"))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{_place(found, 'samples')}: samples: {error}") from None
    return None if search == "grid" else int(count)
