"""What a bench prints and writes: rows of repeated measurements, goals beside them, and where they were measured."""

import json
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepscale.errors import UsageError
from deepscale.files import atomic
from deepscale.provenance import versions

GB = 1e9


@dataclass(frozen=True)
class Goal:
    """A limit on a row's median, in the row's unit."""

    limit: float
    at_least: bool = False

    def reached(self, value: float) -> bool:
        """Whether the value keeps to the limit."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {number(self.limit)}"


@dataclass(frozen=True)
class Row:
    """One quantity, measured `len(values)` times, in `unit`; "x" is a ratio."""

    what: str
    unit: str
    values: tuple[float, ...]
    goal: Goal | None = None

    @property
    def median(self) -> float:
        """The value that the goal is about."""
        return statistics.median(self.values)

    def cells(self) -> list[str]:
        """The row of the printed table."""
        goal = ["", "", ""]
        if self.goal is not None:
            goal = [str(self.goal), f"{number(self.median / self.goal.limit)}", "yes" if self.goal.reached(self.median) else "no"]
        several = [number(min(self.values)), number(max(self.values))] if len(self.values) > 1 else ["", ""]
        return [self.what, self.unit, number(self.median), *several, str(len(self.values)), *goal]

    def as_json(self) -> dict[str, Any]:
        """The row of the JSON file."""
        record: dict[str, Any] = {"what": self.what, "unit": self.unit, "median": self.median, "min": min(self.values), "max": max(self.values)}
        record |= {"n": len(self.values), "values": list(self.values)}
        if self.goal is not None:
            kind = "at least" if self.goal.at_least else "at most"
            record |= {"goal": f"{kind} {self.goal.limit}", "of_goal": self.median / self.goal.limit, "reached": self.goal.reached(self.median)}
        return record


HEADINGS = ["what", "unit", "median", "lowest", "highest", "n", "goal", "of the goal", "reached"]


def ratio(what: str, above: Sequence[float], below: Sequence[float], goal: Goal | None = None) -> Row:
    """above / below, round by round: values of one round were measured one after the other, so drift cancels."""
    return Row(what, "x", tuple(a / b for a, b in zip(above, below, strict=True)), goal)


def markdown(table: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a table in Markdown, its first line the headings; the first `left` columns are text."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    padded = [
        [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))] for line in table
    ]
    lines = [f"| {' | '.join(line)} |" for line in padded]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return lines


def number(value: float) -> str:
    """Three significant digits, or whole with thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass
class Report:
    """A bench's result. `sizes` are all its options as they are used, `goal_sizes` those that the goals are about, `notes` sentences.

    `records` are rows of a table of their own, by its headings: what is no repeated measurement. `details` go to the file only.
    """

    bench: str
    arguments: list[str]
    sizes: dict[str, Any]
    goal_sizes: dict[str, Any]
    hardware: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    records: list[dict[str, str | float]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What to type for the same measurement."""
        return shlex.join(["deepscale", "bench", self.bench, *self.arguments])

    def text(self) -> str:
        """The table in Markdown, and under it where and how it was measured."""
        lines = markdown([HEADINGS, *(row.cells() for row in self.rows)], left=2)
        if self.records:
            cells = [[cell if isinstance(cell, str) else number(cell) for cell in record.values()] for record in self.records]
            lines = [*markdown([list(self.records[0]), *cells], left=1), "", *lines]
        other = [f"{name} {self.sizes[name]} ({value})" for name, value in self.goal_sizes.items() if self.sizes[name] != value]
        notes = [*self.notes, *([f"not as the goals ask (in brackets): {', '.join(other)}"] if other else [])]
        where = {
            "command": self.command,
            "sizes": ", ".join(f"{name} {value}" for name, value in self.sizes.items()),
            "hardware": ", ".join(f"{name} {value}" for name, value in self.hardware.items()),
            "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
        }
        return "\n".join([*lines, "", *(f"{name}: {value}" for name, value in where.items()), *notes])

    def as_json(self) -> dict[str, Any]:
        """The same numbers for a file."""
        return {
            "bench": self.bench,
            "command": self.command,
            "sizes": self.sizes,
            **({"records": self.records} if self.records else {}),
            "rows": [row.as_json() for row in self.rows],
            "notes": self.notes,
            **self.details,
            "hardware": self.hardware,
            "versions": versions(),
        }

    def publish(self, path: Path | None) -> None:
        """Prints the table, and writes the JSON file where one is asked for."""
        print(self.text(), flush=True)
        if path is not None:
            write_json(path, self.as_json())


def check_writable(path: Path | None, option: str = "--json") -> None:
    """Refuses a file that cannot be written before minutes of measuring. Raises UsageError."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(
            f"{option} {path} cannot be written ({error.strerror or error}); type {option} with a file in a folder that is there"
        ) from None


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes the whole file or nothing."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    with atomic(path, "the table above holds the numbers") as temporary:
        temporary.write_text(text)
