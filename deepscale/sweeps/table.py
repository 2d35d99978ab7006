"""A sweep's table: one line per choice of settings with means over its seeds, or one per trial; for reading, and as CSV."""

import csv
import io
from collections.abc import Callable

from deepscale.bench.report import markdown
from deepscale.progress import rate
from deepscale.sweeps.results import NUMBERS, RUNNING, Point, Row, Sweep
from deepscale.sweeps.tags import FINISHED


def text(sweep: Sweep, each: bool = False) -> str:
    """Title, table in Markdown, and what its columns are. each: a line per trial."""
    return "\n".join([title(sweep), "", *markdown(cells(sweep, each), len(sweep.axes) + each), "", note(sweep, each)])


def cells(sweep: Sweep, each: bool = False) -> list[list[str]]:
    """The table, its first line the headings; columns in which nothing is known are left out."""
    head, lines = _trials(sweep) if each else _points(sweep)
    known = [name in sweep.axes or any(line[i] not in ("", "–") for line in lines) for i, name in enumerate(head)]
    return [[cell for cell, shown in zip(line, known, strict=True) if shown] for line in [head, *lines]]


def note(sweep: Sweep, each: bool = False) -> str:
    """What the columns are."""
    good = "highest" if sweep.mode == "max" else "lowest"
    several = "" if each or sweep.seeds < 2 else "mean ± standard deviation over the seeds of each line; "
    return f"{several}sorted by {sweep.metric}, {good} first; converged: validation accuracy above {sweep.above:.0%}"


def title(sweep: Sweep) -> str:
    """How far the sweep has come, in one line."""
    planned = f"{sweep.trials:,} trials" if sweep.trials else f"{len(sweep.rows):,} trials so far"
    started = f", {len(sweep.rows):,} started" if sweep.trials and len(sweep.rows) < sweep.trials else ""
    ends = ", ".join(f"{count:,} {_words(outcome)}" for outcome, count in sweep.ends.items())
    return f"{sweep.name}: {planned}{started}: {ends}; {sum(row.steps for row in sweep.rows):,} steps in all"


def as_csv(sweep: Sweep, each: bool = False) -> str:
    """The same with all digits, metrics by their names in MLflow; what is not known is empty."""
    lines = _trial_records(sweep) if each else _point_records(sweep)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _metrics(sweep: Sweep) -> list[str]:
    """The sweep's own metric first, then those of the table."""
    return list(dict.fromkeys([sweep.metric, *NUMBERS]))


def _points(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    metrics = _metrics(sweep)
    head = [*sweep.axes, "seeds", *(NUMBERS.get(metric, metric) for metric in metrics), "converged", "not finished"]
    return head, [
        [*point.settings.values(), str(len(point.rows)), *(_mean(point, metric) for metric in metrics), _converged(point, sweep), _ended(point)]
        for point in sweep.points
    ]


def _trials(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    metrics = _metrics(sweep)
    head = ["trial", *sweep.axes, "seed", "steps", *(NUMBERS.get(metric, metric) for metric in metrics), "outcome"]
    return head, [
        [str(row.number), *sweep.of(row).values(), str(row.seed), f"{row.steps:,}", *(_one(row, metric) for metric in metrics), _words(row.outcome)]
        for row in ordered(sweep)
    ]


def ordered(sweep: Sweep) -> list[Row]:
    """The trials, the best value of the sweep's metric first, those without one last."""
    sign = -1 if sweep.mode == "max" else 1
    return sorted(sweep.rows, key=lambda row: sign * row.numbers[sweep.metric] if sweep.metric in row.numbers else float("inf"))


def _mean(point: Point, metric: str) -> str:
    mean, deviation = point.mean(metric), point.deviation(metric)
    form = form_of(metric)
    if mean is None:
        return "–"
    return form(mean) if deviation is None else f"{form(mean)} ± {form(deviation)}".replace("% ±", "±")


def _one(row: Row, metric: str) -> str:
    return form_of(metric)(row.numbers[metric]) if metric in row.numbers else "–"


def form_of(metric: str) -> Callable[[float], str]:
    """How a metric is written: accuracies in percent, losses with four digits after the point."""
    if metric.endswith("accuracy"):
        return lambda value: f"{value:.2%}".replace("%", " %")
    return (lambda value: f"{value:.4f}") if metric.endswith("loss") else rate


def _converged(point: Point, sweep: Sweep) -> str:
    count, of = point.converged(sweep.above)
    return f"{count} of {of}" if of else "–"


def _ended(point: Point) -> str:
    return ", ".join(f"{count} {_words(outcome)}" for outcome, count in point.ends.items() if outcome != FINISHED)


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")


def _point_records(sweep: Sweep) -> list[dict[str, object]]:
    records = []
    for point in sweep.points:
        record: dict[str, object] = {**point.settings, "trials": len(point.rows), "running": point.ends.get(RUNNING, 0), "n": len(point.measured)}
        for metric in _metrics(sweep):
            record |= {metric: point.mean(metric), f"{metric} sd": point.deviation(metric)}
        count, of = point.converged(sweep.above)
        records.append({**record, "converged": count / of if of else None, "outcomes": _outcomes(point)})
    return records


def _trial_records(sweep: Sweep) -> list[dict[str, object]]:
    return [
        {"trial": row.number, **sweep.of(row), "seed": row.seed, "outcome": row.outcome, "steps": row.steps}
        | {metric: row.numbers.get(metric) for metric in _metrics(sweep)}
        | {"run": row.run.info.run_id}
        for row in ordered(sweep)
    ]


def _outcomes(point: Point) -> str:
    return " ".join(f"{outcome}:{count}" for outcome, count in point.ends.items())
