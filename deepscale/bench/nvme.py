"""`deepscale bench nvme`: states and parameters on a disk beside host memory: seconds of a step, peak memory, and whether training is the same."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from deepscale.bench import networks
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import GB, Report, Row, check_writable, markdown, number, write_text
from deepscale.bench.worker import run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.nvme import folder
from deepscale.nvme.traffic import disk_s, traffic_of
from deepscale.plan_memory import memory_of

# The places by what they are called: --zero and --offload of deep.py.
PLACES: dict[str, dict[str, Any]] = {
    "ZeRO 3": {"zero": 3, "offload": "none"},
    "--offload cpu": {"zero": 3, "offload": "cpu"},
    "--offload nvme": {"zero": 3, "offload": "nvme"},
}
SHAPE = {"channels": networks.CHANNELS, "image_size": networks.IMAGE_SIZE, "classes": networks.CLASSES}


def main(arguments: list[str]) -> None:
    """Measures in fresh processes, in turn. Raises BenchError where one fails."""
    options = Options("nvme", "Optimiser states and parameters on a disk beside host memory, on one rank of the CPU.")
    options.depth("depth", 1004, "layers")
    options.size("width", 32, "channels of stage 1")
    options.size("batch-size", 2, "images per step")
    options.size("steps", 3, "steps of each process; the first is not among those that are timed", low=2)
    options.size("rounds", 3, "processes of each kind, in turn")
    options.time_limit()
    options.parser.add_argument("--nvme-path", default=None, metavar="DIR", help="folder on the disk (default: a temporary one)")
    options.parser.add_argument("--page", type=Path, metavar="FILE", help="also write a page in Markdown")
    values, report = options.parse(arguments)
    check_writable(values.page, "--page")
    with tempfile.TemporaryDirectory(dir=values.nvme_path) as disk:
        folder.check(disk)
        _measure(values, disk, report)
    report.publish(values.json)
    if values.page is not None:
        write_text(values.page, page(report.as_json()))


def _measure(values: argparse.Namespace, disk: str, report: Report) -> None:
    layers = f"{depth_of_blocks(blocks_for_depth(values.depth)):,} layers"
    sizes = settings_of(values, "depth", "width", "batch_size") | {"threads": 1}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in PLACES}
    for turn in range(values.rounds):
        for name, place in PLACES.items():
            say(f"{layers}, {name}, {turn + 1} of {values.rounds}")
            own = {**sizes, **place, "warm_up": 1, "steps": values.steps - 1} | ({"nvme_path": disk} if place["offload"] == "nvme" else {})
            results[name].append(run_worker("deepscale.bench.deep", own, threads=1, limit_s=values.time_limit))
    for name, runs in results.items():
        settings = networks.configuration(**sizes, **PLACES[name], nvme_path=disk if "nvme" in name else None)
        planned = memory_of(settings, 1, **SHAPE)
        grown = tuple((run["peak_bytes"] - run["base_bytes"]) / GB for run in runs)
        report.rows += [
            Row(f"step, {name}", "s", tuple(statistics.median(run["step_wall_s"]) for run in runs)),
            Row(f"peak over the start, {name}", "GB", grown),
            Row(f"planned / measured, {name}", "x", tuple(planned.total / GB / value for value in grown)),
        ]
        if planned.states.disk:
            traffic, speed = traffic_of(settings, 1, planned.parameters), folder.speed_of(disk)
            report.rows += [
                Row("on the disk, planned", "GB", (planned.states.disk / GB,)),
                Row("read in a step, planned", "GB", (traffic.read / GB,)),
                Row("written in a step, planned", "GB", (traffic.written / GB,)),
                Row("the disk reads", "GB/s", (speed.read / GB,)),
                Row("the disk writes", "GB/s", (speed.write / GB,)),
                Row("of a step the disk takes, planned", "s", (disk_s(settings, 1, planned.parameters),)),
            ]
            report.notes.append(f"{planned.parameters:,} parameters in {layers}, one rank, one thread, blocks recomputed by 4")
    plain = results["ZeRO 3"][0]["losses"]
    same = all(run["losses"] == plain for name, runs in results.items() if name != "--offload cpu" for run in runs)
    report.notes.append(f"losses of {len(plain)} steps with the disk and without are {'the same bit for bit' if same else 'NOT the same'}")


INTRODUCTION = """\
# States and parameters on a disk

`--offload nvme --nvme-path DIR` (or `--deepspeed_config ds_configs/zero3_nvme.json --nvme-path DIR`) is ZeRO-3 with the optimiser's states and
the large parameters in files (ZeRO-Infinity, arXiv:2104.07857): 12 bytes a parameter for master weights and moments, 4 for the parameter and 4 for
its gradient where a rank's part of the tensor is 1 MiB or more. In memory stay gradients, smaller tensors, and buffers. `deepscale plan --offload
nvme` shows what rests where.

DeepSpeed 0.19.8 by itself trains wrong so, and says nothing. What is wrong, each seen alone, and what is done here:

- Its op `async_io` drops the result of every request (`_do_io_complete`). Gradients are read back to addresses that O_DIRECT refuses, and the step
  takes what was in the buffer; with tensors of whole blocks, or with `sub_group_size` 1, it is right. Here reads and writes of our own stand in its
  place, and every result is looked at (`deepscale/nvme/transfer.py`). They need neither libaio nor a compiler.
- For the same reason a write to a full disk is lost. Here the run ends with a sentence.
- Parameters on the disk are bfloat16 where the accelerator has no float16, as on a CPU (`_set_dtype`). Here they are float32.
- Parameters that were gathered ahead from the disk are still on their way at the step, where an assertion fails. Here nothing is gathered ahead from
  a disk (`stage3_prefetch_bucket_size` 0), so that the disk's time is not hidden behind computation.

Before training every run makes two steps of a small network with the disk, in its own process group, and is refused where a weight is more than a
thousandth of its change away from plain torch's: so a later version of DeepSpeed that does otherwise is found. Refused are also a folder that is
missing or cannot be written, and a disk with less room than is planned. Every rank has a folder of its own in DIR, removed at its end; what a killed
run has left is removed by the next. Checkpoints are as ever, in the same format; while one is made, its states are in memory.

On a CPU in float32 losses, gradients and weights are those of ZeRO-3 without a disk, bit for bit, on one rank and on two (`tests/test_nvme.py`).

"""


def page(run: dict[str, Any]) -> str:
    """The page in Markdown, of the JSON."""
    cells = [[row["what"], row["unit"], number(row["median"]), f"{number(row['min'])} to {number(row['max'])}", str(row["n"])] for row in run["rows"]]
    where, versions = (", ".join(f"{name} {value}" for name, value in run[part].items()) for part in ("hardware", "versions"))
    return "\n".join([
        INTRODUCTION + "## Time and memory", "", *markdown([["what", "unit", "median", "range", "n"], *cells], left=2), "",
        *(f"{note[0].upper()}{note[1:]}." for note in run["notes"]),
        "The disk is the machine's, a virtual one: what an NVMe disk does, and a GPU's part of it, has not been measured.", "",
        f"{where}; {versions}:", "", "```bash", run["command"], "```", "",
    ])  # fmt: skip
