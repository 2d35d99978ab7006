"""`deepscale study`: lists the studies, or runs what is missing of one and writes its page."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from deepscale import config, errors, resume
from deepscale.errors import UsageError
from deepscale.parsing import parse_count
from deepscale.paths import relative_to_here
from deepscale.studies import stored
from deepscale.studies.study import CPU, FULL, SCALES, SMOKE, STUDIES, Results, Study, load
from deepscale.sweeps import values

LIST = "list"


def main(arguments: list[str]) -> None:
    """Runs `list`, or a study."""
    parser = _parser()
    given, typed = parser.parse_known_args(arguments)
    if given.name in (None, LIST):
        print(listing())
        return
    study, free = load(given.name), _free(typed)
    study.scale(given.scale)
    if given.only is not None:
        study.case(given.only)
    rows = given.rows or (Path("studies") / "smoke" if given.scale == SMOKE else stored.results_folder())
    place = rows / study.name
    failures = [] if given.page else _run_missing(given, study, free, place)
    if not given.dry_run:
        _write_page(given, stored.read(study, given.scale, place, given.rows), place)
        _raise(failures)


def _run_missing(given: Any, study: Study, free: dict[str, str], place: Path) -> list[Any]:
    """Runs the rows that are not there, or says what they would take; those without a result. place: the folder of the rows."""
    from deepscale.studies.runner import missing

    scale, found = given.scale, stored.read(study, given.scale, place, given.rows)
    jobs = missing(study, scale, found, given.folder, place, given.seeds or (), given.only, free)
    concurrent = given.concurrent or _concurrent(free)
    if jobs and (given.dry_run or scale == FULL):
        from deepscale.studies import cost

        cost.show(study, scale, jobs, concurrent)
    if given.dry_run:
        done = len(found.rows)
        print(f"{study.name}, {scale} scale: {done:,} {'row is' if done == 1 else 'rows are'} there, {len(jobs):,} to run")
        return []
    if jobs and scale == FULL and not given.yes:
        _ask(study)
    return _run(study, scale, jobs, concurrent) if jobs else []


def _write_page(given: Any, found: Results, place: Path) -> None:
    """The page of the rows that are there. Raises UsageError where there are none, and none were to be run."""
    study, source = found.study, found.study.scale(found.scale).sweep
    if source is not None and not found.rows:
        where, todo = relative_to_here(place.parent / source.folder), "; ".join(source.commands)
        raise UsageError(f"{where} holds no rows yet: the study {study.name} reads those of a sweep; type {todo}")
    if given.page and not found.rows:
        raise UsageError(f"{relative_to_here(place)} holds no rows of {found.scale} scale; leave --page out to run them")
    if found.rows:
        from deepscale.studies import page

        print(page.write(found, given.out or Path("studies") / study.name, place))


def listing() -> str:
    """Every study with its question and scales."""
    lines = ["usage: deepscale study NAME [--scale smoke|cpu|full] [options]     (deepscale study --help)", ""]
    known = [load(name) for name in STUDIES]
    width = max(len(study.name) for study in known)
    for study in known:
        lines += [f"  {study.name:<{width}}  {study.title}", f"  {'':<{width}}  {study.question}"]
    return "\n".join(lines)


def _parser() -> Any:
    parser = config.parser(
        "deepscale study",
        "Run what is missing of a published study, and write its page. Other options are settings of deepscale/train.py that change no result "
        "(--data-dir, --engine, --threads ...).",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"{LIST}, or one of {', '.join(STUDIES)}")
    parser.add_argument(
        "--scale", default=CPU, choices=SCALES, help=f"size: {SMOKE} (seconds), {CPU} (two cores), {FULL} (the original's own) (default: {CPU})"
    )
    parser.add_argument("--seeds", type=_seeds, metavar="0,1,2", help="seeds instead of the scale's own")
    parser.add_argument("--only", metavar="CASE", help="run this case alone")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the page goes (default: studies/NAME; docs/studies for the repository)")
    parser.add_argument(
        "--rows", type=Path, metavar="FOLDER", help=f"where rows lie, in a folder of the study's name (default: docs/results; {SMOKE}: studies/smoke)"
    )
    parser.add_argument("--folder", type=Path, default=Path("studies"), help="where rows are trained, with their checkpoints (default: studies)")
    parser.add_argument("--concurrent", type=parse_count, metavar="N", help="rows at a time (default: one for each core, or each GPU)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and what it takes; run nothing")
    parser.add_argument("--page", action="store_true", help="write the page of the rows that are there; run nothing")
    parser.add_argument("--yes", action="store_true", help=f"start {FULL} scale without asking")
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds; type for example 0,1,2")
    return seeds


def _free(typed: list[str]) -> dict[str, str]:
    """Settings of train.py among what was typed. Raises UsageError for one that a study fixes."""
    if not typed:
        return {}
    settings, chosen = config.parse_typed(typed, "deepscale study")
    for name in sorted(chosen):
        if name not in resume.FREE or name not in values.KNOWN:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is the study's to say; leave it out, or train with deepscale/train.py --{flag} ... instead")
    given = config.flat(settings)
    return {name: values.text_of(name, given[name]) for name in given if name in chosen}


def _concurrent(free: dict[str, str]) -> int:
    """Rows at a time: a GPU each, or as many cores as they have threads."""
    import torch

    if torch.cuda.is_available() and free.get("device") != "cpu":
        return torch.cuda.device_count()
    threads = free.get("threads", "1")
    return max(1, len(os.sched_getaffinity(0)) // int(threads)) if threads.isdigit() else 1


def _ask(study: Study) -> None:
    """Raises UsageError where nobody says yes."""
    if sys.stdin.isatty() and input("start? type yes: ").strip().lower() in ("y", "yes"):
        return
    raise UsageError(f"nothing was started; type deepscale study {study.name} --scale {FULL} --yes to start it")


def _run(study: Study, scale: str, jobs: list[Any], concurrent: int) -> list[Any]:
    """The rows without a result. Raises Interrupted for a wish to end."""
    from deepscale.studies.runner import Runner
    from deepscale.sweeps.tags import ENDED

    print(f"{study.name}, {scale} scale: {len(jobs):,} rows to run, {min(concurrent, len(jobs))} at a time", flush=True)
    runner = Runner(jobs, concurrent, lambda text: print(f"{study.name}: {text}", flush=True))
    left = [end for end in runner() if end.outcome not in ENDED]
    if runner.code:
        raise errors.Interrupted(f"{len(left):,} of {len(jobs):,} rows are left; type the same to go on", runner.code)
    return left


def _raise(failures: list[Any]) -> None:
    """Raises for rows without a result: UsageError where one was refused."""
    from deepscale.sweeps.programs import INTERRUPTED, REFUSED

    said = list(dict.fromkeys(end.text for end in failures if end.outcome != INTERRUPTED))
    if not failures:
        return
    kind = UsageError if any(end.outcome == REFUSED for end in failures) else errors.DeepscaleError
    raise kind("\n  ".join([f"{len(failures):,} rows have no result; type the same to try them again", *said]))
