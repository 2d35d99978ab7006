"""What a log file and a terminal get to see of a run."""

import io
import os
import pty
import re
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepscale import progress
from deepscale.progress import Progress


def advance(shown: Progress, steps: int) -> None:
    for step in range(1, steps + 1):
        shown.update(step, loss=2.3 / step, accuracy=step / 1000, images_per_s=1234.5, remaining_s=float(steps - step))


def test_a_log_gets_the_first_and_the_last_step_and_one_line_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    log = io.StringIO()
    with Progress(95, enabled=True, interval_s=10.0, stream=log) as shown:
        advance(shown, 95)
    lines = log.getvalue().splitlines()
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 95]
    assert lines[-1] == "step 95/95  loss 0.0242  accuracy 9.5%  1,234 images/s  0 s left"


def test_a_run_that_stops_early_leaves_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(10_001, enabled=True, stream=log) as shown:
        advance(shown, 50)
        raise KeyboardInterrupt
    assert [line.split()[1] for line in log.getvalue().splitlines()] == ["1/10,001", "50/10,001"]
    shown.close()
    assert len(log.getvalue().splitlines()) == 2


def test_other_ranks_are_silent() -> None:
    log = io.StringIO()
    with Progress(5, enabled=False, stream=log) as shown:
        advance(shown, 5)
        shown.say("a")
        shown.warn("b")
    assert log.getvalue() == ""


def test_lines_of_several_threads_stay_whole() -> None:
    log = io.StringIO()
    with Progress(1, enabled=True, stream=log) as shown:
        threads = [threading.Thread(target=lambda: [shown.warn("x" * 50) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert log.getvalue() == ("warning: " + "x" * 50 + "\n") * 200


TERMINAL = """
import sys
{before}
from deepscale.progress import Progress
with Progress(3, enabled=True) as shown:
    shown.say("the plan [bold]as it is[/bold]")
    for step in (1, 2, 3):
        shown.update(step, loss=1.0, accuracy=None, images_per_s=10.0, remaining_s=None)
"""


@pytest.mark.parametrize("before", ["", "sys.modules['rich'] = None"], ids=["rich", "without rich"])
def test_a_terminal_with_and_without_rich(before: str) -> None:
    """On a pseudo-terminal: the live line moves the cursor and is gone at the end; without rich there are plain lines."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", TERMINAL.format(before=before)], stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait(20) == 0
    text = seen.decode()
    assert ("\x1b[2K" in text) == (before == "")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
    assert "the plan [bold]as it is[/bold]\n" in plain
    assert plain.rstrip().endswith("step 3/3  loss 1.0000  10 images/s")


def test_the_summary_is_two_columns() -> None:
    out = io.StringIO()
    progress.show_summary({"depth": "10,001 layers", "peak memory": "1.3 GiB"}, "Run", stream=out)
    assert out.getvalue() == "Run\n---\ndepth        10,001 layers\npeak memory  1.3 GiB\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.0421, "0.042 s"),
        (9.96, "10 s"),
        (59.7, "1 m"),
        (192, "3 m 12 s"),
        (3600, "1 h"),
        (7500, "2 h 5 m"),
        (273600, "3 d 4 h"),
        (float("nan"), "?"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert progress.seconds(value) == text


@given(st.floats(10, 1e7))
def test_seconds_are_right_to_what_they_leave_out(value: float) -> None:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    parts = progress.seconds(value).split()
    back = sum(int(number) * units[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True))
    assert abs(back - value) <= {"s": 0.5, "m": 1, "h": 60, "d": 3600}[parts[1]] + 0.5


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (1000, "1.0 KiB"), (5 * 2**20, "5.0 MiB"), (1.3 * 2**30, "1.3 GiB"), (2**37, "128 GiB")])
def test_gib(value: float, text: str) -> None:
    assert progress.gib(value) == text


def test_counts_and_rates() -> None:
    assert progress.count(1953654031) == "1,953,654,031"
    assert [progress.rate(value) for value in (0.714, 38.24, 99.96, 1240.4)] == ["0.714", "38.2", "100", "1,240"]
