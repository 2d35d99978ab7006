"""`deepscale bench scaling`: strong and weak scaling over ranks and ZeRO stages: images/s, efficiency, bytes sent, memory, communication.

Every point is a launch of its own: a process for each rank, pinned to cores of its own (ranked.py). Bytes are those that really left the
process; beside them stands what `deepscale plan` computes. Points are written as they are measured.

    deepscale bench scaling --ranks 1,2,4 --zero 0,1,2,3 --json scaling.json     # starts its ranks itself, on this machine
    srun ... deepscale bench scaling --zero 0,1,2,3 --json nodes-2.json      # as one rank of the world that srun or torchrun has started
    deepscale bench scaling --stages 1,2 --micro-batches 2,8 --json stages.json    # in place of these a pipeline, a process for each stage
    deepscale bench scaling --merge *.json --json all.json --csv all.csv --figure scaling.png --page scaling.md   # measures nothing

Where the environment has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, that world is measured instead of --ranks: every rank runs the
command, and rank 0 writes. Each point starts a process beside it and takes the next port after MASTER_PORT. Efficiency needs a point of one rank:
merge in the file of one.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from deepscale import drawing
from deepscale.bench import scaling_pipeline
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Report, Row, check_writable, write_json, write_text
from deepscale.bench.scaling_page import draw, page
from deepscale.bench.scaling_study import MB, MODES, Study, joined, launch_of, point_of, points_from
from deepscale.bench.worker import run_here, run_ranks
from deepscale.config import TrackingConfig
from deepscale.errors import UsageError
from deepscale.parsing import parse_count
from deepscale.provenance import versions
from deepscale.tracking import open_tracker

EXPERIMENT = "deepscale-scaling"
SIZES = ("depth", "width", "batch_size", "steps", "warm_up", "threads", "kernel")
PROGRAM, STAGED = "deepscale.bench.ranked", "deepscale.bench.staged"
EFFICIENCY = (
    "efficiency: images/s against one rank's times the cores that the ranks have; in communication: share of a rank's time inside collectives, "
    "where waiting for a slower rank is in it; MB are 1e6 bytes; memory is that of the largest rank, over the process with everything imported"
)
WAITING = "waiting: share of the passes' time that a stage is in no pass, beside (P - 1)/(M + P - 1); MB are 1e6 bytes, over the process"
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def main(arguments: list[str]) -> None:
    """Measures, or puts measured points together. Raises UsageError for bad input, BenchError where a process fails."""
    options = _options()
    values, report = options.parse(arguments)
    report.goal_sizes = {}
    files = {"--csv": values.csv, "--figure": values.figure, "--page": values.page}
    for option, path in files.items():
        check_writable(path, option)
    if values.figure is not None:
        drawing.pyplot()
    main_rank = bool(values.merge) or not _started() or os.environ["RANK"] == "0"
    if values.merge:
        study = _merged(values, report)
    else:
        study = Study(settings_of(values, *SIZES))
        if values.stages:
            _measure_stages(values, study, report)
        else:
            _measure(values, study, report)
    if not main_rank:
        return
    _fill(study, report)
    report.publish(values.json)
    figure = None if values.figure is None or values.page is None else os.path.relpath(values.figure, values.page.parent)
    for path, text in ((values.csv, study.csv), (values.page, lambda: page(study, report.details["measured"], figure))):
        if path is not None:
            write_text(path, text())
    if values.figure is not None and study.points:
        draw(study, values.figure)


def _options() -> Options:
    options = Options("scaling", "Training on several ranks: speed, efficiency, bytes sent, memory and communication, under every ZeRO stage.")
    add = options.parser.add_argument
    add("--ranks", type=_list(1), default=[1, 2, 4], metavar="N,M", help="numbers of ranks, processes on this machine (default: 1,2,4)")
    add("--zero", type=_list(0, 3), default=[0, 1, 2, 3], metavar="N,M", help="ZeRO stages (default: 0,1,2,3)")
    add("--strong", action="store_true", help="strong scaling alone: one batch over all ranks (default: both)")
    add("--weak", action="store_true", help="weak scaling alone: one batch on each rank (default: both)")
    add("--stages", type=_list(1), metavar="N,M", help="in place of scaling over ranks: a pipeline of so many stages, a rank each")
    add("--micro-batches", type=_list(1), default=[1, 2, 4, 8], metavar="N,M", help="of a pipeline's step (default: 1,2,4,8)")
    options.depth("depth", 302, "layers")
    options.size("width", 16, "channels of stage 1")
    options.size("batch-size", 16, "images a step, of all ranks in strong and of each in weak scaling")
    options.size("steps", 5, "timed steps of a launch")
    options.size("warm-up", 3, "steps before them; ZeRO-3 learns the order of the modules in two", low=1)
    options.size("repeat", 1, "launches of each point, in turn")
    options.size("threads", 1, "threads and cores of a rank")
    options.kernel()
    add("--merge", nargs="+", type=Path, metavar="FILE", help="measure nothing: put points of these --json files together")
    for name, text in (("csv", "a table"), ("figure", "a figure (PNG)"), ("page", "a page in Markdown")):
        add(f"--{name}", type=Path, metavar="FILE", help=f"also write {text}")
    add("--no-tracking", dest="tracking", action="store_false", help=f"no runs in MLflow (default: one for each point, experiment {EXPERIMENT})")
    options.time_limit()
    return options


def _list(low: int, high: int | None = None) -> Any:
    """A parser of "1,2,4": different whole numbers within limits, ascending."""

    def parse(text: str) -> list[int]:
        try:
            numbers = sorted({0 if part.strip() == "0" else parse_count(part.strip()) for part in text.split(",")})
        except argparse.ArgumentTypeError:
            numbers = [-1]
        if numbers[0] < low or (high is not None and numbers[-1] > high):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of numbers from {low}{f' to {high}' if high is not None else ''}; type for example 1,2"
            )
        return numbers

    return parse


def _started() -> bool:
    """Whether this process is a rank that srun or torchrun has started. Raises UsageError where the environment says so by half."""
    missing = [name for name in WORLD if name not in os.environ]
    if 0 < len(missing) < len(WORLD):
        there = ", ".join(name for name in WORLD if name in os.environ)
        raise UsageError(
            f"{there} in the environment describe a rank, but {', '.join(missing)} are not there; start by srun or torchrun, or unset them"
        )
    return not missing


def _measure(values: argparse.Namespace, study: Study, report: Report) -> None:
    """All points, launch after launch in turn; what is measured is in the file at once."""
    started = _started()
    rank = int(os.environ["RANK"]) if started else 0
    wanted = _wanted(values, [int(os.environ["WORLD_SIZE"])] if started else values.ranks)
    report.details["measured"] = [{"command": report.command, "hardware": report.hardware, "versions": versions()}]
    number = 0
    for launch in range(values.repeat):
        for ranks, zero, batch in wanted:
            number += 1
            if not rank:
                say(f"{ranks} rank{'s' if ranks > 1 else ''}, ZeRO {zero}, {batch} images a step, {launch + 1} of {values.repeat}")
            sizes = study.sizes | {"batch_size": batch, "zero": zero}
            if started:
                found = run_here(PROGRAM, sizes, number=number, threads=values.threads, limit_s=values.time_limit)
            else:
                found = run_ranks(PROGRAM, sizes, ranks=ranks, threads=values.threads, limit_s=values.time_limit)
            if rank:
                continue
            new = point_of(study.sizes, zero, batch, found)
            point = study.points.setdefault(new.key, new)
            point.launches.append(launch_of(found))
            if values.json is not None:
                _fill(study, report)
                write_json(values.json, report.as_json())
            if launch + 1 == values.repeat:
                _track(values, study, point.key)


def _measure_stages(values: argparse.Namespace, study: Study, report: Report) -> None:
    """All pipelines, launch after launch in turn. Raises UsageError for a batch that does not divide, and in a world that others have started."""
    if _started():
        raise UsageError("--stages starts its own ranks, and the environment names a rank; type it without srun or torchrun")
    uneven = [count for count in values.micro_batches if values.batch_size % count]
    if uneven:
        raise UsageError(
            f"--batch-size {values.batch_size} does not divide over {uneven[0]} micro batches; type a multiple, or other --micro-batches"
        )
    report.details["measured"] = [{"command": report.command, "hardware": report.hardware, "versions": versions()}]
    for launch in range(values.repeat):
        for stages in values.stages:
            for count in values.micro_batches:
                say(f"{stages} stage{'s' if stages > 1 else ''}, {count} micro batches, {launch + 1} of {values.repeat}")
                sizes = study.sizes | {"micro_batches": count}
                found = run_ranks(STAGED, sizes, ranks=stages, threads=values.threads, limit_s=values.time_limit)
                study.pipelines.append(scaling_pipeline.record_of(count, values.batch_size, found))
                if values.json is not None:
                    _fill(study, report)
                    write_json(values.json, report.as_json())


def _wanted(values: argparse.Namespace, worlds: list[int]) -> list[tuple[int, int, int]]:
    """(ranks, ZeRO stage, batch of all ranks) of all points; a point of strong and weak scaling is measured once. Raises UsageError."""
    both, batch = values.strong == values.weak, values.batch_size
    wanted = dict.fromkeys(
        (ranks, zero, total)
        for ranks in worlds
        for zero in values.zero
        for asked, total in ((both or values.strong, batch), (both or values.weak, batch * ranks))
        if asked
    )
    uneven = [ranks for ranks, _, total in wanted if total % ranks]
    if uneven:
        raise UsageError(f"--batch-size {batch} does not divide over {uneven[0]} ranks; type a multiple, for example --batch-size {8 * uneven[0]}")
    return list(wanted)


def _merged(values: argparse.Namespace, report: Report) -> Study:
    """The points of several files, which must be of one network. Raises UsageError."""
    studies, measured = [], list[dict[str, Any]]()
    for path in values.merge:
        try:
            record = json.loads(path.read_text())
            sizes, points = {name: record["sizes"][name] for name in SIZES}, points_from(record["points"])
            measured += record["measured"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--merge {path} cannot be read as a file of this bench ({type(error).__name__}: {error}); type --json files of it"
            ) from None
        studies.append(Study(sizes, points, record.get("pipelines", [])))
        if sizes != studies[0].sizes:
            name = next(name for name in SIZES if sizes[name] != studies[0].sizes[name])
            raise UsageError(f"--merge {path} has {name} {sizes[name]}, {values.merge[0]} has {studies[0].sizes[name]}; type files of one network")
    study = joined(studies)
    report.sizes |= study.sizes
    report.details["measured"] = measured
    return study


def _fill(study: Study, report: Report) -> None:
    """The table, what is compared, and the points."""
    rows = [row for mode in MODES for row in study.rows(mode)]
    pipelines = scaling_pipeline.rows(study.pipelines)
    report.records = [_cells(row) for row in rows] or [dict(scaling_pipeline.cells(row)) for row in pipelines]
    ratios = tuple(row["sent_over_planned"] for row in rows if row["sent_over_planned"])
    report.rows = [Row("bytes sent, measured / formula", "x", ratios)] if ratios else []
    apart = study.losses_apart()
    report.notes = [
        *([WAITING] if pipelines else []),
        *([EFFICIENCY] if rows else []),
        *([] if apart is None else [f"losses of strong scaling, largest relative difference from one rank's: {apart:.1e}"]),
        *dict.fromkeys(f"OVERSUBSCRIBED: {p.where}" for p in study.points.values() if p.oversubscribed),
    ]
    report.details |= {"points": study.as_json(), "pipelines": study.pipelines}
    report.sizes |= {"ranks": sorted({key[1] for key in study.points}), "zero": sorted({key[2] for key in study.points})}


def _cells(row: dict[str, Any]) -> dict[str, str | float]:
    """A row of the printed table."""
    return {
        "scaling": row["scaling"],
        "ranks": f"{row['ranks']}" + (f" on {row['cores']} cores!" if row["oversubscribed"] else ""),
        **({"nodes": f"{row['nodes']}"} if row["nodes"] > 1 else {"nodes": ""}),
        "ZeRO": f"{row['zero']}",
        "batch": f"{row['batch_size']}",
        "images/s": row["images_per_s"],
        "efficiency": "" if row["efficiency"] is None else f"{row['efficiency']:.0%}",
        "sent, MB a step and rank": "" if row["sent_bytes"] is None else row["sent_bytes"] / MB,
        "formula, MB": row["planned_bytes"] / MB,
        "peak memory, MB": row["peak_bytes"] / MB,
        "in communication": f"{row['communication']:.0%}",
    }


def _track(values: argparse.Namespace, study: Study, key: tuple[int, int, int, int]) -> None:
    """A run in MLflow for a point."""
    point = study.points[key]
    rows = {mode: row for mode in MODES for row in study.rows(mode) if (row["nodes"], row["ranks"], row["zero"], row["batch_size"]) == key}
    tags = {"bench": "scaling", "scaling": " and ".join(rows), "oversubscribed": point.where if point.oversubscribed else "no"}
    row = next(iter(rows.values()))
    settings = {name: row[name] for name in ("nodes", "ranks", "zero", "batch_size", "cores")} | {"device": point.device}
    tracker = open_tracker(
        TrackingConfig(tracking=values.tracking, experiment=EXPERIMENT),
        run_name=f"{study.sizes['depth']} layers, {point.where}, ZeRO {point.zero}, batch {point.batch_size}",
        parameters={name: value for name, value in study.sizes.items() if name != "batch_size"} | settings, tags=tags, dataset=None, rank=0, warn=say,
    )  # fmt: skip
    numbers = {name: value for name, value in row.items() if isinstance(value, float) and name not in ("speedup", "efficiency")}
    for mode, own in rows.items():
        numbers |= {f"{mode}_{name}": own[name] for name in ("speedup", "efficiency") if own[name] is not None}
    tracker.log({f"scaling/{name}": value for name, value in numbers.items()}, 0)
    tracker.finish("FINISHED")
