"""One setting's value out of the text that one types for it, by the setting's own rule in config.py; and ranges of them."""

import argparse
import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Any, get_args

from deepscale import config
from deepscale.config import AUTO
from deepscale.errors import UsageError, unknown_choice

YES, NO = ("true", "yes", "on"), ("false", "no", "off")
# Settings that a sweep gives each of its trials itself.
OWN = ("seed", "experiment", "run_name", "tags", "tracking", "checkpoint_dir", "resume", "local_rank")
_FIELDS = {f.name: f for group in config.GROUPS for f in dataclasses.fields(group)}
KNOWN = tuple(name for name in _FIELDS if name not in OWN)


def setting(text: str) -> str:
    """A setting's name, with `_` for `-`. Raises UsageError for one that is not known, or is not a space's to give."""
    name = text.replace("-", "_")
    if name == "seed":
        raise UsageError("seed is an axis of its own, beside the grid; type for example seeds: [0, 1, 2]")
    if name in OWN:
        raise UsageError(f"{name} is given to every trial by the sweep itself; leave it out")
    if name not in KNOWN:
        raise unknown_choice("setting", text, KNOWN)
    return name


def value(name: str, text: str) -> Any:
    """A setting's value. Raises UsageError with the setting's own sentence for a text that is none."""
    f = _FIELDS[name]
    if f.metadata.get("switch"):
        return AUTO if text == AUTO == f.default else switch(text)
    try:
        return f.metadata["parse"](text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{name}: {error}") from None
    except ValueError:
        raise UsageError(f"{name}: {text!r} is no value of this setting") from None


def switch(text: str) -> bool:
    """True of "true", "yes" or "on". Raises UsageError for what is neither that nor its opposite."""
    if text.lower() not in (*YES, *NO):
        raise UsageError(f"{text!r} is neither on nor off; type true or false")
    return text.lower() in YES


def arguments(name: str, text: str) -> list[str]:
    """A setting as one types it for deepscale/train.py."""
    flag = name.replace("_", "-")
    if not _FIELDS[name].metadata.get("switch"):
        return [f"--{flag}", text]
    chosen = value(name, text)
    return [] if chosen == AUTO else [f"--{flag}" if chosen else f"--no-{flag}"]


def text_of(name: str, chosen: Any) -> str:
    """A value as text: `text_of("blocks", (1, 1, 5, 1))` is "1,1,5,1", and `text_of("augment", False)` "false"."""
    words = config.typed(name, chosen)
    return words[1] if len(words) == 2 else str(chosen).lower()


def is_number(name: str) -> bool:
    """Whether numbers are among a setting's values."""
    return bool({int, float} & _types(name))


def is_whole(name: str) -> bool:
    """Whether a setting's numbers are whole."""
    return float not in _types(name)


def _types(name: str) -> set[Any]:
    kind = _FIELDS[name].type
    return set(get_args(kind)) or {kind}


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, drawn evenly, or evenly in their logarithm; `whole` for settings that are whole numbers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, source: random.Random) -> str:
        """One value."""
        if self.log:
            return self.text(math.exp(source.uniform(math.log(self.low), math.log(self.high))))
        return self.text(source.uniform(self.low, self.high))

    def text(self, number: float) -> str:
        """A number as it is typed: within the range, of four digits."""
        number = min(max(number, self.low), self.high)
        return str(round(number)) if self.whole else f"{number:.4g}"
