"""`deepscale bench revolve`: inputs held in few slots beside inputs that are all kept, by bytes, FLOPs and time; and the schedule for given bytes.

One network takes its forward and backward passes in turn under each policy, in this process.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepscale import kernel
from deepscale.activations import Policy, Recompute, Revolve
from deepscale.bench.activations import loss_and_gradients, stages_of
from deepscale.bench.deep import timed
from deepscale.bench.kept import kept_bytes
from deepscale.bench.networks import build, configuration, random_batch
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import GB, Report, Row, check_writable, markdown, number, ratio, write_text
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.errors import UsageError
from deepscale.models.convnext import default_stack_size, smallest_segment
from deepscale.models.revolve import fewest_slots, runs
from deepscale.parsing import parse_depth
from deepscale.plan_choices import FAST_SEGMENT
from deepscale.plan_network import Images, needs_of
from deepscale.plan_network import stages_of as planned_stages
from deepscale.plan_revolve import SEGMENTS, Share, best_slots, peak_of, shares_of
from deepscale.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
DEPTHS = (10_001,)
GROWTH = (1_004, 10_001, 100_001, 1_000_000)
LIMITS = (1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07)  # GB
LIMITED = 100_001  # layers whose schedules are shown


def main(arguments: list[str]) -> None:
    """Measures. Raises UsageError for bad input."""
    options = Options("revolve", "Inputs of segments in few slots, in float32: bytes, FLOPs and time beside those of keeping all inputs.")
    shown = " ".join(map(str, DEPTHS))
    options.parser.add_argument("--depths", nargs="+", type=parse_depth, default=list(DEPTHS), metavar="N", help=f"layers (default: {shown})")
    options.size("width", 8, "channels of stage 1")
    options.size("batch-size", 8, "images per step")
    options.size("rounds", 3, "measured rounds: one forward and backward pass of each policy")
    options.size("threads", len(os.sched_getaffinity(0)), "threads; the default is the cores here")
    options.kernel()
    options.parser.add_argument("--page", type=Path, metavar="FILE", help="also write a page in Markdown")
    text = "measure nothing: the page is that of these files of --json, together"
    options.parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help=text)
    values, report = options.parse(arguments)
    check_writable(values.page, "--page")
    if values.merge:
        _merge(values.merge, values.page)
        return
    torch.set_num_threads(values.threads)
    for depth in sorted({depth_of_blocks(blocks_for_depth(depth)) for depth in values.depths}):
        _compare(values, depth, report)
    report.notes.append("images are random, 32x32; MB are 1e6 bytes, GB 1e9; bytes kept are counted, of all that a forward pass leaves for backward")
    report.publish(values.json)
    if values.page is not None:
        write_text(values.page, page([report.as_json()]))


def _merge(files: list[Path], out: Path | None) -> None:
    """The page of several runs. Raises UsageError for a file that is none of this bench's, and without a page."""
    if out is None:
        raise UsageError("--merge makes a page of files of --json; type --page FILE, too")
    runs = []
    for file in files:
        try:
            runs.append(json.loads(file.read_text()))
            known = runs[-1]["bench"] == "revolve"
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UsageError(f"{file} is no file of deepscale bench revolve --json; type those that are")
    write_text(out, page(runs))


def _ways(depth: int) -> dict[str, Policy]:
    """What is compared: the first one is what the others are held against."""
    stages = blocks_for_depth(depth)
    thrice = tuple(fewest_slots(-(-blocks // FAST_SEGMENT), 2) for blocks in stages)
    return {
        f"recompute by {FAST_SEGMENT}": Recompute(FAST_SEGMENT),
        "recompute by stack": Recompute(max(default_stack_size(stages))),
        f"revolve by {FAST_SEGMENT}, two levels": Revolve(FAST_SEGMENT),
        f"revolve by {FAST_SEGMENT}, up to three runs": Revolve(FAST_SEGMENT, thrice),
    }


def _compare(values: argparse.Namespace, depth: int, report: Report) -> None:
    """Bytes and FLOPs of each policy, and its passes in turn; who begins changes from round to round."""
    images, labels = random_batch(values.batch_size)
    layers, ways = f"{depth:,} layers, batch {values.batch_size}", _ways(depth)
    say(f"{layers}: building")
    settings = configuration(depth=depth, **settings_of(values, "width", "batch_size", "threads", "kernel"), engine="torch")
    model = build(kernel.choose(settings, ALONE, say, say))
    stages, names = stages_of(model, images), list(ways)
    for name, policy in ways.items():
        kept = kept_bytes(policy.apply(model), images)
        report.rows.append(Row(f"kept after forward, {name}: {layers}", "MB", (kept / 1e6,)))
        working = max(policy.at(s).working(*stage) for s, stage in enumerate(stages))
        report.rows.append(Row(f"and what backward makes anew, by formula, {name}: {layers}", "MB", ((kept + working) / 1e6,)))
    flops = {name: sum(policy.at(s).flops(*stage) for s, stage in enumerate(stages)) for name, policy in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(values.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            say(f"{layers}: round {turn + 1} of {values.rounds}, {name}")
            model.zero_grad()
            ways[name].apply(model)
            seconds[name].append(timed(lambda: loss_and_gradients(model, images, labels))[1])
    report.rows += [Row(f"forward and backward, {name}: {layers}", "s", tuple(seconds[name])) for name in names]
    report.rows += [ratio(f"time, {name} / {names[0]}: {layers}", seconds[name], seconds[names[0]]) for name in names[1:]]
    report.rows += [ratio(f"FLOPs by formula, {name} / {names[0]}: {layers}", [flops[name]], [flops[names[0]]]) for name in names[1:]]


# -------------------------------------------------------------------------------------------------------------------- page


def growth(width: int, batch: int) -> list[list[str]]:
    """Bytes of activations that are there at a time, by depth, of each kind of schedule, by formula."""
    table = [
        ["layers", "recompute by 4, MB", "by stack", "by sqrt(blocks / 10)", "revolve, two levels, best segment", "up to three runs, best segment"]
    ]
    for depth in GROWTH:
        blocks = blocks_for_depth(depth)
        row = [_peak(depth, width, batch, segment, None) for segment in (FAST_SEGMENT, max(default_stack_size(blocks)), smallest_segment(blocks))]
        row += [min(_peak(depth, width, batch, segment, again) for segment in SEGMENTS) for again in (1, 2)]
        table.append([f"{depth:,}", *(number(value / 1e6) for value in row)])
    return table


def _peak(depth: int, width: int, batch: int, segment: int, again: int | None) -> int:
    shares = _shares(depth, width, batch, segment)
    return peak_of(shares, [share.units if again is None else fewest_slots(share.units, again) for share in shares])


def _shares(depth: int, width: int, batch: int, segment: int) -> list[Share]:
    """Stages with what a segment makes anew, beside what every schedule takes: one block's and one stack's backward."""
    settings = configuration(depth=depth, width=width, batch_size=batch, segment=segment, engine="torch", kernel="native")
    stages = planned_stages(settings, Images(batch))
    work = [need.segment for need in needs_of(settings, stages, Images(batch))]
    return shares_of(stages, segment, work)


def limited(width: int, batch: int) -> list[list[str]]:
    """The schedule for each limit of bytes."""
    table = [["activations at most, GB", "segments of", "slots of the stages", "runs forward of a block again, mean"]]
    for limit in LIMITS:
        found = []
        for segment in SEGMENTS:
            shares = _shares(LIMITED, width, batch, segment)
            slots = best_slots(shares, int(limit * GB))
            if peak_of(shares, slots) <= limit * GB:
                found.append((_again(shares, segment, slots), segment, slots))
        if found:
            again, segment, slots = min(found)
            table.append([number(limit), str(segment), " ".join(map(str, slots)), number(again)])
    return table


def _again(shares: Sequence[Share], segment: int, slots: Sequence[int]) -> float:
    """Runs of a block beside the forward pass, mean over blocks of equal FLOPs; the last product of a segment, half of a block, is not run."""
    units = sum(share.units for share in shares)
    return 1 - 0.5 / segment + sum(runs(share.units, own) for share, own in zip(shares, slots, strict=True)) / units


INTRODUCTION = """\
# Recomputation in few slots

`--activations recompute` keeps the input of every segment of blocks. `--activations revolve` holds of a stage's inputs as many as there are
`--slots`; backward wants them from the last to the first, and gets the others by running forward again from the nearest one before, on the way
holding some in the slots that have become free. Where they lie is the schedule with the fewest runs of segments that there is for so many slots
(Revolve, Griewank and Walther 2000, doi:10.1145/347837.347846), tested against a search over all schedules of small chains. Loss, gradients and
BatchNorm's statistics are those of keeping everything, bit for bit.

That no segment runs forward more than r times, the first pass counted, n segments take c slots with C(c + r, r) > n: about sqrt(2n) for r = 2. With
n = blocks / s and all that the backward of s blocks needs, that is two levels of recomputation: memory grows as the cube root of depth. A segment's
input may lie in another stack: that stack is called again, so that ZeRO-3 gathers it, one stack more at a time than otherwise.

`auto` takes it where nothing faster fits. The planner shares the bytes that there are among the four stages, for segments of 1, 2, 4, 8 and 16
blocks, so that the fewest FLOPs run again; considered are slots that stay a stage's own through forward and backward, and at most three runs.

It goes with every ZeRO stage and offload, low precision, stochastic depth, BatchNorm, records and checkpoints. Factors of `--drop-path` for single
images are kept for every block, which grows with depth (a number a pixel and block; not with `--drop-path-mode batch`). Refused are
`--skip reversible`, which needs no inputs, `--pipeline-stages`, and networks other than ConvNeXt.
"""


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown, of one run's JSON or of several's."""
    rows = [row for run in runs for row in run["rows"]]
    cells = [[row["what"], row["unit"], number(row["median"]), f"{number(row['min'])} to {number(row['max'])}", str(row["n"])] for row in rows]
    lines = [INTRODUCTION, "## Measured", "", *markdown([["what", "unit", "median", "range", "n"], *cells], left=2), ""]
    lines += ["Passes are without an optimiser step; of a depth that runs once, the first pass allocates.", ""]
    lines += [f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(note for run in runs for note in run["notes"])]
    width, batch = 8, 64
    lines += [
        "",
        "## By formula",
        "",
        f"Width {width}, batch {batch}, 32x32, float32: bytes of inputs and of what a segment makes anew, at the fullest",
    ]
    lines += ["moment of backward.", "", *markdown(growth(width, batch), left=0), ""]
    lines += [
        f"The schedule for a limit on these bytes, {LIMITED:,} layers:",
        "",
        *markdown(limited(width, batch), left=0),
        "",
        "## Measure again",
        "",
    ]
    for run in runs:
        where, versions = (", ".join(f"{name} {value}" for name, value in run[part].items()) for part in ("hardware", "versions"))
        lines += [f"{where}; {versions}:", "", "```bash", run["command"], "```", ""]
    return "\n".join(lines)
