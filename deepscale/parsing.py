"""Parsers of what is typed: whole numbers, durations, sizes, lists.

Each raises argparse.ArgumentTypeError, which says what was given and what is possible.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    allowed = f"a whole number from {low:,}" + (f" to {high:,}" if high else "")

    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", "").replace(",", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value

    return parse


def real(low: float, high: float | None = None) -> Callable[[str], float]:
    allowed = f"a number from {low:g}" + (f" to {high:g}" if high is not None else "")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}") from None
        if not low <= value <= (float("inf") if high is None else high) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value

    return parse


def or_word(word: str, parse: Callable[[str], Any], value: Any) -> Callable[[str], Any]:
    def parse_or(text: str) -> Any:
        if text.lower() == word:
            return value
        try:
            return parse(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, nor the word {word}") from None

    return parse_or


def parse_depth(text: str) -> int:
    """Layers as a whole number; which of them there can be is the network's matter (models/registry.py)."""
    try:
        return int(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of layers; type for example --depth 1004") from None


def parse_blocks(text: str) -> tuple[int, ...]:
    try:
        blocks = tuple(int(part) for part in text.split(","))
    except ValueError:
        blocks = ()
    if len(blocks) != 4 or min(blocks) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers of blocks, each at least 1; type for example 1,1,5,1")
    return blocks


def parse_tags(text: str) -> tuple[str, ...]:
    tags = tuple(text.split(","))
    if not all(re.fullmatch(r"[\w./-]+=.*", tag) for tag in tags):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of tags; type for example question=depth,seen=yes")
    return tags


def parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """(from, to) layers of "1-3,4-7", each pair going on to a later layer.

    >>> parse_pairs("1-3,4-7")
    ((1, 3), (4, 7))
    """
    found = [re.fullmatch(r"([0-9]{1,7})-([0-9]{1,7})", part) for part in text.split(",")]
    pairs = tuple((int(match[1]), int(match[2])) for match in found if match)
    if len(pairs) != len(found) or not all(0 < first < second for first, second in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of connections, each from a layer to a later one; type for example 1-3,4-7")
    return pairs


def pairs_text(text: str) -> str:
    return ",".join(f"{first}-{second}" for first, second in parse_pairs(text))


parse_count = integer(1)


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "5m" or "2h".

    >>> parse_duration("5m")
    300.0
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration; type for example 90s, 5m or 2h")
    return seconds


@dataclass(frozen=True)
class Every:
    """How often something is done: after so many optimiser steps, or after so many seconds; exactly one of them is given."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.steps}steps" if self.steps is not None else f"{self.seconds:g}s"


def parse_every(text: str) -> Every:
    """Of "500steps" or "500 steps", or of a duration: "10m".

    >>> parse_every("500steps")
    Every(steps=500, seconds=None)
    >>> parse_every("10m")
    Every(steps=None, seconds=600.0)
    """
    match = re.fullmatch(r"([0-9]{1,18}) *steps?", text.strip().replace(",", "").replace("_", ""))
    if match and int(match[1]):
        return Every(steps=int(match[1]))
    try:
        return Every(seconds=parse_duration(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps and no duration; type for example 500steps, 90s or 10m") from None


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB" or "24G" (24 * 2**30), "24GB" (24e9), "512MiB", "1.5 GiB" or "4096".

    >>> parse_bytes("4KiB")
    4096
    """
    match = re.fullmatch(r"([0-9]{1,20}|[0-9]{0,20}\.[0-9]{1,20}) *(?:([kmgt])(i?b)?|b)?", text.strip().lower())
    power, base = (" kmgt".index(match[2] or " "), 1000 if match[3] == "b" else 1024) if match else (0, 1)
    count = int(float(match[1]) * base**power) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of memory; type for example 24GiB, 24GB, 512MiB, or a number of bytes")
    return count


def one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not known; possible: {', '.join(known)}")
        return text

    parse.known = known  # type: ignore[attr-defined]
    return parse
