"""The options that the benches share."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepscale.bench.report import Report, check_writable
from deepscale.config import parser
from deepscale.parsing import parse_depth, parse_duration
from deepscale.provenance import hardware

KERNELS = ("auto", "native", "torch")
UNSIZED = ("rounds", "warm_up", "deep_steps", "part", "policies", "steps", "tolerance")  # how often and what, but no size that a goal is about

NO_SIZE = ("json", "out", "csv", "figure", "page", "merge", "tracking", "nvme_path", "time_limit")  # where results go, and from where they come


def whole(low: int = 1) -> Callable[[str], int]:
    """A parser of whole numbers from `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low}")
        return int(text)

    return parse


class Options:
    """A bench's command line; every size added to it has the goal's value as default."""

    def __init__(self, bench: str, description: str) -> None:
        self.bench = bench
        self.parser = parser(f"deepscale bench {bench}", description)
        self.parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")

    def size(self, name: str, default: int, text: str, low: int = 1) -> None:
        """Adds --name, a whole number."""
        self.parser.add_argument(f"--{name}", type=whole(low), default=default, metavar="N", help=f"{text} (default: {default})")

    def several(self, name: str, default: Sequence[Any], parse: Callable[[str], Any], text: str, shown: str = "") -> None:
        """Adds --name, one or more values; `shown` is how help shows the default."""
        shown = shown or " ".join(map(str, default))
        self.parser.add_argument(f"--{name}", nargs="+", type=parse, default=list(default), metavar="N", help=f"{text} (default: {shown})")

    def depth(self, name: str, default: int, text: str) -> None:
        """Adds --name, a number of layers."""
        self.parser.add_argument(f"--{name}", type=parse_depth, default=default, metavar="N", help=f"{text} (default: {default})")

    def kernel(self) -> None:
        """Adds what computes the blocks of the stacked networks."""
        self.parser.add_argument("--kernel", choices=KERNELS, default="auto", help="of the stacked network's blocks (default: auto)")

    def time_limit(self) -> None:
        """Adds the longest time of one measuring process."""
        text = "of one measuring process (default: 30m)"
        self.parser.add_argument("--time-limit", type=parse_duration, default=1800.0, metavar="T", help=f"longest time {text}")

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, Report]:
        """The values, and the report to fill. Raises UsageError for bad input, before anything is measured."""
        values = self.parser.parse_args(arguments)
        check_writable(values.json)
        sizes = {name: value for name, value in vars(values).items() if name not in NO_SIZE and value is not None}
        asked = {name: self.parser.get_default(name) for name in sizes if name not in UNSIZED}
        asked = {name: value for name, value in asked.items() if value is not None}
        return values, Report(self.bench, arguments, sizes, asked, hardware())


def say(text: str) -> None:
    """A line on what is being measured; standard output is left to the table."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def settings_of(values: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the values, by name."""
    return {name: getattr(values, name) for name in names}
