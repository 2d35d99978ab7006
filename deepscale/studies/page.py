"""The page of a study, in Markdown: its table beside the published numbers, a sentence per finding, its figures, and where the numbers come from."""

import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deepscale.bench.report import markdown
from deepscale.files import atomic
from deepscale.progress import rate, seconds
from deepscale.studies import figures
from deepscale.studies.study import ACCURACY, CPU, Figure, Group, Results
from deepscale.sweeps.results import counted
from deepscale.sweeps.table import form_of
from deepscale.sweeps.tags import FINISHED

ANSWERS = {True: "holds", False: "does not hold", None: "not tested at this scale"}
NOTHING = "–"
SECONDS = "perf/seconds"


def write(found: Results, folder: Path, rows: Path) -> Path:
    """Writes NAME.md (NAME-SCALE.md at another scale than cpu) and its figures beside it into `folder`; the page's path. Raises UsageError."""
    stem = name_of(found)
    drawn = []
    for figure in found.study.figures:
        path = folder / f"{stem}-{figure.name}.png"
        if figure.draw(found, path):
            drawn.append((path.name, figure.caption + _rows_drawn(found, figure)))
        else:
            path.unlink(missing_ok=True)  # of rows that are not there any more
    page = folder / f"{stem}.md"
    with atomic(page, "type another --out") as temporary:
        lines = text(found, drawn, os.path.relpath(_folder(found, rows), folder))
        temporary.write_text(re.sub(r"(\d)%", r"\1 %", "\n".join(lines)) + "\n")
    return page


def name_of(found: Results) -> str:
    """The page's name without its ending."""
    return found.study.name if found.scale == CPU else f"{found.study.name}-{found.scale}"


def text(found: Results, drawn: Iterable[tuple[str, str]], rows: str) -> Iterator[str]:
    """The page's lines. drawn: (file, caption). rows: the folder of the files, as the page links to it."""
    study, scale = found.study, found.study.scale(found.scale)
    yield from (f"# {study.title}", "", study.question, "", f"The published study: {study.source}.", "")
    if scale.note:
        yield from (f"At {found.scale} scale: {scale.note}.", "")
    yield from ("```bash", *command(found), "```", "")
    yield from _lines(table(found), 1)
    yield from ("", f"*{_about_table(found)}*", "")
    if study.findings:
        yield from _lines(findings(found), 3)
        yield ""
    for note in study.notes:
        said = note if isinstance(note, str) else note(found)
        if said:
            yield from (said, "")
    for file, caption in drawn:
        yield from (f"![{caption}]({file})", "", f"*{caption}*", "")
    yield from ("## Where the numbers come from", "", *(f"- {line}" for line in origin(found, rows)))


def command(found: Results) -> list[str]:
    """What to type for the same page."""
    source = found.study.scale(found.scale).sweep
    scale = "" if found.scale == CPU else f" --scale {found.scale}"
    seeds = sorted({row.seed for row in found.rows})
    planned = sorted(found.study.scale(found.scale).seeds)
    typed = f" --seeds {','.join(map(str, seeds))}" if source is None and not set(seeds) <= set(planned) else ""
    return [*(source.commands if source else ()), f"deepscale study {shlex.quote(found.study.name)}{scale}{typed} --out docs/studies"]


def table(found: Results) -> list[list[str]]:
    """Headings, and a line for each case; beside a column that was published another one with the published numbers."""
    study = found.study
    groups = [found[case.name] for case in study.of_scale(found.scale)]
    published = {metric for group in groups for metric in group.case.published}
    head, lines = ["case"], [[group.case.name] for group in groups]
    for metric, heading in study.columns.items():
        ours = [mean(group, metric) if group.case.tells(metric) else NOTHING for group in groups]
        if all(cell == NOTHING for cell in ours) and metric not in published:
            continue
        head.append(heading)
        for line, cell in zip(lines, ours, strict=True):
            line.append(cell)
        if metric in published:
            head.append(f"published {heading}")
            for line, group in zip(lines, groups, strict=True):
                line.append(form(metric, group.case.published[metric]) if metric in group.case.published else "")
    head += ["n", "converged"]
    ends = [_ended(group) for group in groups]
    for line, group in zip(lines, groups, strict=True):
        line += [str(len(group.rows)), _converged(group) if group.case.tells(study.converged.metric) else NOTHING]
    if any(ends):
        head.append("not finished")
        for line, cell in zip(lines, ends, strict=True):
            line.append(cell)
    return [head, *lines]


def mean(group: Group, metric: str) -> str:
    """Mean and standard deviation over the seeds."""
    middle, deviation = group.mean(metric), group.deviation(metric)
    if middle is None:
        return NOTHING
    if deviation is None or (not deviation and middle == round(middle)):  # a count, the same in all
        return form(metric, middle)
    return f"{form(metric, middle)} ± {form(metric, deviation)}".replace(" % ±", " ±")


def form(metric: str, value: float) -> str:
    """A number as the page writes it."""
    if metric.endswith(("accuracy", "loss")) and metric != "loss":
        return form_of(metric)(value)
    return amount(value)


def amount(value: float) -> str:
    """Three digits that mean something, whole numbers in full: "338,500", "0.0871", "1.65e14".

    >>> amount(338500), amount(0.08712), amount(1.652e14), amount(3.46e-9)
    ('338,500', '0.0871', '1.65e14', '3.46e-9')
    """
    if not math.isfinite(value):
        return "infinite"
    if value == round(value) and abs(value) < 1e10:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{value:.3g}" if abs(value) >= 1e5 else rate(value))


def means(words: str, cases: Sequence[str] = (), metric: str = ACCURACY) -> Callable[[Results], str]:
    """What a finding rests on: "validation accuracy: 37.5% (26 layers), ...", the means of some cases, of all by default, and how the rows of one
    without any have ended; "" where there are none."""

    def said(found: Results) -> str:
        parts = []
        for name in cases or found.groups:
            value = found.mean(name, metric)
            if value is not None:
                parts.append(f"{value:.1%} ({name})" if metric.endswith("accuracy") else f"{amount(value)} ({name})")
            elif ends := [row.outcome for row in found[name].rows if row.outcome != FINISHED]:
                parts.append(f"{ends[0].replace('_', ' ')} ({name})")
        return f"{words}: {', '.join(parts)}" if parts else ""

    return said


def accuracies(*cases: str) -> Callable[[Results], str]:
    """`means` of the validation accuracy."""
    return means("validation accuracy", cases)


def findings(found: Results) -> list[list[str]]:
    """Headings, and a line for each finding."""
    lines = [["finding", "here", "measured"]]
    for finding in found.study.findings:
        lines.append([finding.sentence, ANSWERS[finding.holds(found)], finding.measured(found)])
    return lines


def origin(found: Results, rows: str) -> Iterator[str]:
    """Hardware, versions, commits, seeds and times of the rows."""
    all_rows = found.rows
    yield f"Rows: one JSON file each, with settings, numbers and curves, in [{rows}]({rows})"
    seeds = sorted({tuple(row.seed for row in group.rows) for group in found.groups.values()} - {()}, key=len)
    if seeds:
        yield "Seeds: " + "; ".join(f"{', '.join(map(str, own))}{f' where n is {len(own)}' if len(seeds) > 1 else ''}" for own in seeds)
    took = [row.numbers[SECONDS] for row in all_rows if SECONDS in row.numbers]
    if took:
        yield f"Time: {seconds(sum(took))} in all {len(took)} rows, each from {seconds(min(took))} to {seconds(max(took))}"
    for name, values in (("Hardware", "hardware"), ("Versions", "versions")):
        known = counted(_words(row.about.get(values)) for row in all_rows if row.about.get(values))
        yield f"{name}: " + "; ".join(known or ["not recorded"])
    started = [row.about["started"] for row in all_rows if row.about.get("started")]
    if started:
        yield "Measured: " + " to ".join(dict.fromkeys(time.strftime("%Y-%m-%d", time.gmtime(at / 1000)) for at in (min(started), max(started))))
    commits = counted(str(row.about["commit"])[:10] for row in all_rows if row.about.get("commit"))
    if commits:
        yield "Commits: " + ", ".join(commits)


def _lines(cells: list[list[str]], left: int) -> list[str]:
    """A table in Markdown, in which `|` ends a cell."""
    return markdown([[cell.replace("|", "\\|") for cell in line] for line in cells], left)


def _about_table(found: Results) -> str:
    study = found.study
    several = any(len(group.rows) > 1 for group in found.groups.values())
    parts = ["mean ± standard deviation over the n seeds of each case"] if several else ["one row of each case"]
    if any(case.published for case in study.of_scale(found.scale)):
        parts.append("columns named published are the source's own numbers")
    return "; ".join([*parts, f"converged: {study.converged}", f"{NOTHING} was not measured"])


def _rows_drawn(found: Results, figure: Figure) -> str:
    count = figures.trainings_shown(figure.draw, found)
    return f" (n = {count})" if count else ""


def _converged(group: Group) -> str:
    count, of = group.converged()
    return NOTHING if not of else ("yes" if count else "no") if of == 1 else f"{count} of {of}"


def _ended(group: Group) -> str:
    ends = counted(row.outcome.replace("_", " ") for row in group.rows)
    return ", ".join(f"{count} {word}" for word, count in ends.items() if word != FINISHED)


def _words(about: Any) -> str:
    """{"CPU": ..., "cores": 2} in words; how busy the machine was differs from row to row."""
    if not isinstance(about, dict):
        return str(about)
    return ", ".join(f"{name} {value}" for name, value in about.items() if name != "load before")


def _folder(found: Results, rows: Path) -> Path:
    """Where the files of the rows lie: those of a sweep in its own folder."""
    path = next((row.path for row in found.rows), None)
    return path.parent if path is not None else rows
