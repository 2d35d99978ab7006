"""`deepscale bench reversible`: blocks that are reconstructed beside blocks that are recomputed, and how exact the reconstruction is.

The networks take their steps in turn, in this process. Errors are those of gradients against keeping everything, and of the input of the third
stage, the longest, against the one that forward had; of a stream in float64 whose branches are rounded to a grid, as it is trained
(models/reversible.py), and of one in float32, as RevNet has it.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepscale import kernel
from deepscale.activations import KeepAll, Policy, Recompute, Reconstruct
from deepscale.bench.deep import timed
from deepscale.bench.kept import kept_bytes
from deepscale.bench.networks import Training, build, configuration, random_batch
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Goal, Report, Row, check_writable, markdown, number, ratio, write_text
from deepscale.config import Config
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.engine import TorchEngine
from deepscale.errors import UsageError
from deepscale.models.block import rounded
from deepscale.models.convnext import ConvNeXt, cross_entropy, default_stack_size
from deepscale.models.reversible import inverse
from deepscale.parsing import parse_depth
from deepscale.plan_choices import FAST_SEGMENT
from deepscale.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
DEPTHS = (1_004, 10_001)
STAGE = 2  # the longest one
BRANCHES = {"float32": None, "bf16": torch.bfloat16}
STREAMS = {"float64 and a grid": True, "float32": False}
# At their initial values and trained for some steps. Of the published network's closed branches (gamma 0) everything is exact.
REVERSIBLE = {"skip": "reversible", "activations": "reconstruct", "segment": None}
AT_START = {"init": "kaiming", "layerscale_init": None}
EXACT = Goal(1e-12)
BY_SEGMENTS, BY_STACKS = f"identity, recomputed by {FAST_SEGMENT}", "identity, recomputed by stack"
KEPT, RECONSTRUCTED, ROUNDING = "reversible, all kept", "reversible", "reversible, a stream in float32"
WIDE = "reversible, twice the width"


def main(arguments: list[str]) -> None:
    """Measures. Raises UsageError for bad input."""
    options = Options("reversible", "Reversible blocks in float32: bytes kept, time of a step, and errors of reconstruction.")
    shown = " ".join(map(str, DEPTHS))
    options.parser.add_argument("--depths", nargs="+", type=parse_depth, default=list(DEPTHS), metavar="N", help=f"layers (default: {shown})")
    options.size("width", 8, "channels of stage 1")
    options.size("batch-size", 8, "images per step")
    options.size("rounds", 5, "measured rounds: one step of each network")
    options.size("steps", 20, "of training, at least, before errors are measured again")
    options.size("threads", len(os.sched_getaffinity(0)), "threads; the default is the cores here")
    options.kernel()
    options.parser.add_argument("--part", choices=("all", "time", "errors"), default="all", help="what to measure (default: all)")
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
        trained = _compare(values, depth, report) if values.part != "errors" else _reversible(values, depth)
        report.records += _errors(values, depth, trained, report) if values.part != "time" else ()
    report.notes.append("images are random, 32x32, the same in every step; MB are 1e6 bytes, of all that a forward pass leaves for backward")
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
            known = runs[-1]["bench"] == "reversible"
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UsageError(f"{file} is no file of deepscale bench reversible --json; type those that are")
    write_text(out, page(runs))


def _settings(values: argparse.Namespace, depth: int) -> Config:
    settings = configuration(depth=depth, **settings_of(values, "width", "batch_size", "threads", "kernel"), engine="torch")
    return kernel.choose(settings, ALONE, say, say)


@dataclass
class Network:
    """A network that takes its steps in one of several ways: a policy, and whether its stream is exact."""

    model: ConvNeXt
    training: Training

    def as_(self, policy: Policy, exact: bool) -> Training:
        """The training, ready to take a step in this way."""
        policy.apply(self.model)
        _set_stream(self.model, exact)
        return self.training


def _network(settings: Config, batch: tuple[Tensor, Tensor]) -> Network:
    model = build(settings)
    assert isinstance(model, ConvNeXt)
    return Network(model, Training(TorchEngine(model, settings, ALONE), ALONE, batch))


def _reversible(values: argparse.Namespace, depth: int, **changes: Any) -> Network:
    return _network(_settings(values, depth).replace(**REVERSIBLE, **changes), random_batch(values.batch_size))


def _compare(values: argparse.Namespace, depth: int, report: Report) -> Network:
    """Bytes kept by, and steps of, each way; who begins changes from round to round. Gives the reversible network, trained by these steps."""
    batch, layers = random_batch(values.batch_size), f"{depth:,} layers"
    say(f"{layers}: building")
    identity, reversible = _network(_settings(values, depth), batch), _reversible(values, depth)
    wide = _reversible(values, depth, width=2 * values.width)
    by_stacks = Recompute(max(default_stack_size(blocks_for_depth(depth))))
    ways: dict[str, tuple[Network, Policy, bool]] = {
        BY_SEGMENTS: (identity, Recompute(FAST_SEGMENT), True),
        BY_STACKS: (identity, by_stacks, True),
        KEPT: (reversible, KeepAll(), True),
        RECONSTRUCTED: (reversible, Reconstruct(), True),
        ROUNDING: (reversible, Reconstruct(), False),
        WIDE: (wide, Reconstruct(), True),
    }
    kept, parameters = {}, {}
    for name, (network, policy, exact) in ways.items():
        network.as_(policy, exact).step()  # not counted: it allocates
        kept[name] = kept_bytes(network.model, batch[0])
        parameters[name] = sum(p.numel() for p in network.model.parameters())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(values.rounds):
        say(f"{layers}: round {turn + 1} of {values.rounds}")
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            network, policy, exact = ways[name]
            seconds[name].append(timed(network.as_(policy, exact).step)[1])
    for name in names:
        report.rows.append(Row(f"kept, {name} ({parameters[name]:,} parameters): {layers}", "MB", (kept[name] / 1e6,)))
    for name in names:
        report.rows.append(Row(f"step, {name}: {layers}", "s", tuple(seconds[name])))
    report.rows.append(ratio(f"step, {RECONSTRUCTED} / {KEPT}: {layers}", seconds[RECONSTRUCTED], seconds[KEPT]))
    report.rows.append(ratio(f"step, {RECONSTRUCTED} / {ROUNDING}: {layers}", seconds[RECONSTRUCTED], seconds[ROUNDING]))
    report.rows.append(ratio(f"step, {RECONSTRUCTED} / {BY_SEGMENTS}: {layers}", seconds[RECONSTRUCTED], seconds[BY_SEGMENTS]))
    report.rows.append(ratio(f"step, {WIDE} / {BY_SEGMENTS}: {layers}", seconds[WIDE], seconds[BY_SEGMENTS]))
    return reversible


def _errors(values: argparse.Namespace, depth: int, trained: Network, report: Report) -> Iterator[dict[str, str | float]]:
    """A row for each state of the network, precision of its branches and of its stream."""
    batch, layers = random_batch(values.batch_size), f"{depth:,} layers"
    while len(trained.training.losses) < values.steps:
        say(f"{layers}: step {len(trained.training.losses) + 1} of {values.steps} before errors")
        trained.as_(Reconstruct(), True).step()
    after = f"after {len(trained.training.losses)} steps"
    at_start = _reversible(values, depth, **AT_START)
    for state, network in (("He's initial weights, no gamma", at_start), (after, trained)):
        for branch, low in BRANCHES.items():
            for stream, exact in STREAMS.items():
                where = f"{layers}, {state}, {branch} branches"
                say(f"errors: {where}, a stream in {stream}")
                _set_stream(network.model, exact)
                inputs, deviation = _of_stage(network.model, batch[0], low)
                gradients = _gradient_error(network.model, batch, low)
                if exact:
                    report.rows.append(Row(f"error of gradients: {where}", "relative", (gradients,), EXACT))
                yield {
                    "network": where, "stream": stream, "error of the stage's input": inputs, "error of gradients": gradients,
                    "deviation of the stage's output": deviation,
                }  # fmt: skip


def _set_stream(model: ConvNeXt, exact: bool) -> None:
    for stage in model.path:
        for stack in stage.path:
            stack.exact = exact


def _of_stage(model: ConvNeXt, images: Tensor, low: torch.dtype | None) -> tuple[float, float]:
    """|reconstructed - given| / |given| of the stage's input, as the stream has it, and the standard deviation of its output."""
    stacks, seen = list(model.path[STAGE].path), list[Tensor]()
    hooks = [
        stacks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0])),
        stacks[-1].register_forward_hook(lambda module, given, out: seen.append(out)),
    ]
    with torch.no_grad(), torch.autocast("cpu", dtype=low, enabled=low is not None):
        model(images)
        for hook in hooks:
            hook.remove()
        given, out = seen
        deviation = float(out.std())
        for stack in reversed(stacks):
            out = inverse(stack, out)
    given = rounded(given) if stacks[0].exact else given
    return float((out - given).double().norm() / given.double().norm()), deviation


def _gradient_error(model: ConvNeXt, batch: tuple[Tensor, Tensor], low: torch.dtype | None) -> float:
    """|reconstructed - kept| / |kept| of all gradients together."""
    found = []
    for policy in (KeepAll(), Reconstruct()):
        policy.apply(model)
        model.zero_grad()
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            logits = model(batch[0])
        cross_entropy(logits, batch[1]).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(*found, strict=True))
    return (apart / sum(float(g.double().square().sum()) for g in found[0])) ** 0.5


# -------------------------------------------------------------------------------------------------------------------- page


INTRODUCTION = """\
# Reversible blocks

`--skip reversible` makes of every block a coupling of two halves of the channels, (x1, x2) -> (x2, x1 + f(x2)), f being the block's branch on half of
the channels (RevNet, Gomez et al. 2017, arXiv:1707.04585). Backward needs the output of a stage alone: it computes every branch again and takes it
away, `--activations reconstruct`, which is this skip connection's `auto`. `--activations keep` computes the same with everything kept. Of
four stages four outputs are held, in float64, whatever the depth.

In floating point x + f - f is not x, and what is lost adds up over the blocks. Here the stream between a stage's blocks is float64, and a branch is
rounded to a multiple of 2^-32 on its way into it: such sums are exact below 2^21, and everything that is reconstructed is so in every bit; beyond, a
block loses at most 2^-53 of the stream. Branches, norms and all that is outside the blocks stay in float32, or in the branches' low precision.

It goes with every ZeRO stage and offload, low precision, stochastic depth (of images, whose factors are kept, and of blocks), BatchNorm (whose
statistics are kept, and counted once), records, checkpoints and export. Refused are odd widths, `--activations selective|recompute|offload`,
`--segment`, and networks other than ConvNeXt.

At the same `--width` a branch has half of the channels, so a quarter of the weights; at twice the width it is the branch of the identity skip.
Accuracy beside identity skip: `deepscale study reversible`.
"""


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown, of one run's JSON or of several's."""
    rows = [row for run in runs for row in run["rows"]]
    cells = [[row["what"], row["unit"], number(row["median"]), f"{number(row['min'])} to {number(row['max'])}", str(row["n"])] for row in rows]
    lines = [INTRODUCTION, "## Bytes, time and gradients", "", *markdown([["what", "unit", "median", "range", "n"], *cells], left=2), ""]
    records = [record for run in runs for record in run.get("records", ())]
    if records:
        errors = [[cell if isinstance(cell, str) else number(cell) for cell in record.values()] for record in records]
        lines += ["## Errors of reconstruction, relative, L2", "", *markdown([list(records[0]), *errors], left=2), ""]
    lines += [*(f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(note for run in runs for note in run["notes"])), "", "## Measure again", ""]
    for run in runs:
        where, versions = (", ".join(f"{name} {value}" for name, value in run[part].items()) for part in ("hardware", "versions"))
        lines += [f"{where}; {versions}:", "", "```bash", run["command"], "```", ""]
    return "\n".join(lines)
