"""`deepscale bench plan`: what the planner predicts against what training runs take, memory and seconds, over many configurations."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepscale.bench.options import Options, say
from deepscale.bench.report import GB, Goal, Report, Row, write_json
from deepscale.bench.report import number as digits
from deepscale.bench.worker import run_ranks, run_worker
from deepscale.config import IN_SEGMENTS
from deepscale.errors import UsageError
from deepscale.parsing import parse_count

GROWTH_RATIO, PEAK_RATIO, STEP_RATIO = "growth, ratio", "peak, ratio", "step, ratio"
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A configuration: sizes, engine ("torch", or DeepSpeed's ZeRO stage and offload), activation policy, ranks, images that are evaluated."""

    depth: int
    width: int
    patch: int
    batch: int
    engine: str
    activations: str
    ranks: int = 1
    evaluated: int = 256
    kernel: str = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by their flat names; nothing of weight is left open."""
        values: dict[str, Any] = {"depth": self.depth, "width": self.width, "patch_size": self.patch, "batch_size": self.batch}
        values |= {"activations": self.activations, "max_steps": STEPS, "eval_images": self.evaluated, "kernel": self.kernel, "precision": "fp32"}
        values |= {"segment": 4} if self.activations in IN_SEGMENTS else {}
        values |= {"slots": 16} if self.activations == "revolve" else {}
        if self.engine == "torch":
            return values | {"engine": "torch"}
        zero, _, offload = self.engine.partition("+")
        return values | {"zero": int(zero.removeprefix("zero")), "offload": "cpu" if offload else "none"}

    def __str__(self) -> str:
        engine = self.engine.replace("zero", "ZeRO ").replace("+", ", ")
        more = (f", {self.ranks} ranks" if self.ranks > 1 else "") + (", kernel torch" if self.kernel == "torch" else "")
        return f"{self.depth:,} layers, width {self.width}, patch {self.patch}, batch {self.batch}, {engine}, {self.activations}{more}"


CASES = (
    Case(26, 8, 1, 8, "zero0", "keep", evaluated=8),
    Case(26, 64, 2, 128, "torch", "keep"),
    Case(26, 32, 1, 64, "zero2", "recompute", kernel="torch"),
    Case(110, 16, 1, 64, "torch", "keep", kernel="torch"),
    Case(110, 32, 2, 32, "zero2", "selective"),
    Case(110, 64, 4, 16, "zero3", "recompute"),
    Case(1004, 16, 4, 64, "zero0", "recompute"),
    Case(1004, 8, 1, 8, "zero1", "recompute", evaluated=8, kernel="torch"),
    Case(1004, 16, 4, 128, "torch", "keep"),
    Case(1004, 24, 4, 48, "zero2", "selective"),
    Case(1004, 32, 4, 16, "zero1", "recompute"),
    Case(1004, 24, 4, 32, "zero3", "recompute"),
    Case(1004, 24, 4, 32, "zero2+offload", "recompute"),
    Case(1004, 16, 4, 32, "zero3+offload", "recompute"),
    Case(10_001, 8, 1, 8, "zero2", "recompute", evaluated=8),
    Case(10_001, 8, 4, 16, "torch", "keep", evaluated=64),
    Case(10_001, 16, 4, 8, "zero1", "recompute", evaluated=8),
    Case(10_001, 12, 4, 8, "zero3", "recompute", evaluated=8),
    Case(1004, 24, 4, 32, "zero1", "recompute", ranks=2),
    Case(1004, 24, 4, 32, "zero2", "keep", ranks=2),
    Case(1004, 24, 4, 32, "zero3", "recompute", ranks=2),
    Case(1004, 16, 4, 64, "zero0", "revolve"),
    Case(1004, 8, 1, 64, "torch", "revolve", evaluated=8),
)


def main(arguments: list[str]) -> None:
    """Runs the cases one after the other in fresh processes. Raises BenchError where one fails."""
    options = Options("plan", "Peak memory and seconds of training runs, as planned and as measured.")
    options.parser.add_argument(
        "--only", metavar="N,M", help=f"cases to run, by number: 1 to {len(CASES)}; others stay in the JSON file (default: all)"
    )
    options.time_limit()
    values, report = options.parse(arguments)
    _take_over(report, values.json if values.only else None)
    for number in _chosen(values.only):
        case = CASES[number - 1]
        say(f"{number} of {len(CASES)}: {case}")
        found = _measured(case, values.time_limit)
        record = _record(number, case, found)
        _add(report, number, record, {"case": number, "settings": case.settings, "ranks": case.ranks} | found)
        say(", ".join(f"{name} {digits(value)}" for name, value in record.items() if isinstance(value, float)))
        if values.json is not None:  # a row is in the file as soon as it is measured
            write_json(values.json, report.as_json())
    _rows(report)
    report.publish(values.json)


def _take_over(report: Report, path: Path | None) -> None:
    """The cases of a file that --json names, so that --only measures some of them again."""
    if path is not None and path.is_file():
        before = json.loads(path.read_text())
        report.records, report.details = before.get("records", []), {"cases": before.get("cases", [])}


def _add(report: Report, number: int, record: dict[str, str | float], details: dict[str, Any]) -> None:
    """A measured case in its place, instead of an earlier measurement of it."""
    cases = {case["case"]: (line, case) for line, case in zip(report.records, report.details.get("cases", []), strict=True)}
    cases[number] = (record, details)
    report.records = [cases[key][0] for key in sorted(cases)]
    report.details = {"cases": [cases[key][1] for key in sorted(cases)]}


def _chosen(text: str | None) -> list[int]:
    """The numbers of the cases to run. Raises UsageError."""
    if text is None:
        return list(range(1, len(CASES) + 1))
    try:
        numbers = [parse_count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        numbers = [0]
    if not all(1 <= number <= len(CASES) for number in numbers):
        raise UsageError(f"--only {text} names no cases; type numbers from 1 to {len(CASES)}, for example --only 1,4")
    return numbers


def _measured(case: Case, limit_s: float) -> dict[str, Any]:
    """What rank 0 planned and took."""
    program, options = "deepscale.bench.planned", {"settings": json.dumps(case.settings)}
    if case.ranks > 1:
        return run_ranks(program, options, ranks=case.ranks, threads=1, limit_s=limit_s)
    return run_worker(program, options, threads=1, limit_s=limit_s)


def _record(number: int, case: Case, found: dict[str, Any]) -> dict[str, str | float]:
    """A line of the table: growth over the process before the network, the whole peak, and seconds a step."""
    planned, grown, base = found["planned_bytes"] / GB, (found["peak_bytes"] - found["base_bytes"]) / GB, found["base_bytes"] / GB
    return {
        "case": f"{number}: {case}",
        "growth planned, GB": planned,
        "measured": grown,
        GROWTH_RATIO: planned / grown,
        "peak measured, GB": base + grown,
        PEAK_RATIO: (base + planned) / (base + grown),
        "step planned, s": found["planned_s"],
        "step measured": found["step_s"],
        STEP_RATIO: found["planned_s"] / found["step_s"],
    }


def _rows(report: Report) -> None:
    """Of every prediction the worst ratio, and how many keep its goal."""
    for what, name, goal in (("peak", PEAK_RATIO, 0.10), ("growth", GROWTH_RATIO, 0.20), ("step", STEP_RATIO, 0.25)):
        off = [abs(float(record[name]) - 1.0) for record in report.records]
        report.rows.append(Row(f"{what}: planned / measured is off 1 by at most, {len(off)} cases", "", (max(off),), Goal(goal)))
        report.rows.append(
            Row(f"{what}: cases within {goal:.0%}", "share", (sum(value <= goal for value in off) / len(off),), Goal(1.0, at_least=True))
        )
