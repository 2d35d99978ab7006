"""What a run shows while it trains: a live line on a terminal, plain lines in a log.

On a terminal rich draws one line below everything that is printed; without rich, or where standard error is no terminal (a file, a Slurm
log, a pipe), a plain line is written at most once per interval, and always for the first and the last step. Other ranks than 0 are silent.
"""

import math
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

GIB = 1024**3


def seconds(value: float) -> str:
    """A duration as a reader wants it: "0.42 s", "48 s", "3 m 12 s", "2 h 5 m", "3 d 4 h".

    >>> seconds(192)
    '3 m 12 s'
    """
    if not math.isfinite(value):
        return "?"
    if value < 9.95:
        return f"{value:.2g} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    for large, large_name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {large_name} {rest} {small_name}" if rest else f"{whole // large} {large_name}"
    raise AssertionError(whole)


def gib(value: float) -> str:
    """Bytes in GiB, small ones in MiB or KiB: "1.3 GiB".

    >>> gib(1.3 * 2**30)
    '1.3 GiB'
    """
    for unit, name in ((GIB, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if value >= 0.95 * unit:
            number = value / unit
            return f"{number:.1f} {name}" if number < 99.95 else f"{number:,.0f} {name}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """A whole number with thousands separated: "1,953,654,031".

    >>> count(1953654031)
    '1,953,654,031'
    """
    return f"{value:,.0f}"


def rate(value: float) -> str:
    """A rate with three digits that mean something: "1,240", "38.2", "0.71".

    >>> rate(38.24)
    '38.2'
    """
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


class Progress:
    """The progress of one run, as a context manager. `say` and `warn` may be called from any thread.

    total_steps: optimiser steps of the run. enabled: False for silence (other ranks than 0). interval_s: least seconds between two
    plain lines. stream: default standard error.
    """

    def __init__(self, total_steps: int, *, enabled: bool, interval_s: float = 10.0, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.interval_s = interval_s
        self._enabled = enabled
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._last_shown_s: float | None = None
        self._pending: str | None = None
        self._live = _live_line(self._stream, total_steps) if enabled else None

    def update(self, step: int, *, loss: float, accuracy: float | None, images_per_s: float, remaining_s: float | None) -> None:
        """Shows the state after `step` steps (1..total_steps). accuracy is a share of 1, None where it is not known."""
        if not self._enabled:
            return
        of = f"/{count(self.total_steps)}" if self.total_steps else ""  # not known yet while a time budget is measured out
        line = f"step {count(step)}{of}  {describe(loss, accuracy, images_per_s, remaining_s)}"
        with self._lock:
            self._pending = line
            if self._live is not None:
                bar, task = self._live
                bar.update(task, completed=step, total=self.total_steps or None, description=line)
                return
            now = time.monotonic()
            if self._last_shown_s is None or now - self._last_shown_s >= self.interval_s or step >= self.total_steps:
                self._last_shown_s = now
                self._flush()

    def say(self, line: str) -> None:
        """Shows a line that stays."""
        if self._enabled:
            with self._lock:
                self._print(line, style=None)

    def warn(self, line: str) -> None:
        """Shows a warning that stays."""
        if self._enabled:
            with self._lock:
                self._print(f"warning: {line}", style="yellow")

    def close(self) -> None:
        """Takes the live line away and leaves the last state as a plain line. A second call does nothing."""
        with self._lock:
            if self._live is not None:
                self._live[0].stop()
                self._live = None
            self._flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _flush(self) -> None:
        if self._pending is not None:
            print(self._pending, file=self._stream, flush=True)
            self._pending = None

    def _print(self, line: str, style: str | None) -> None:
        if self._live is not None:
            self._live[0].console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)


def describe(loss: float, accuracy: float | None, images_per_s: float, remaining_s: float | None) -> str:
    """The numbers of a step in one line, those that are not known left out."""
    parts = [f"loss {loss:.4f}"]
    if accuracy is not None:
        parts.append(f"accuracy {accuracy:.1%}")
    parts.append(f"{rate(images_per_s)} images/s")
    if remaining_s is not None:
        parts.append(f"{seconds(remaining_s)} left")
    return "  ".join(parts)


def show_summary(rows: Mapping[str, str], title: str, stream: TextIO | None = None) -> None:
    """Prints a table of two columns, on standard output by default."""
    stream = stream or sys.stdout
    width = max((len(name) for name in rows), default=0)
    lines = [title, "-" * max(len(title), 3)]
    lines += [f"{name:<{width}}  {value}" for name, value in rows.items()]
    print("\n".join(lines), file=stream, flush=True)


def _live_line(stream: TextIO, total_steps: int) -> tuple[Any, Any] | None:
    """rich's progress bar and its task; None where the stream is no terminal or rich is not installed."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    console = Console(file=stream)
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    if console.width >= 90:
        columns.insert(0, BarColumn(bar_width=20))
    bar = Bar(*columns, console=console, transient=True, refresh_per_second=4)
    task = bar.add_task("waiting for the first step", total=total_steps or None)
    bar.start()
    return bar, task
