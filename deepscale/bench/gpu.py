"""`deepscale bench gpu`: is it right on this GPU, how long does a step take, and does it keep to the memory that was planned.

It needs torch; without DeepSpeed the rows that need it are left out. Everything is measured in fresh processes (gpu_worker.py), each
with its own time limit, in the order of their worth; what is left when the time is over is listed as skipped. The JSON file and the
table beside it are written after every measurement.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from deepscale.bench.gpu_cells import FAILED, MEASURED, OPEN, OUT_OF_MEMORY, SKIPPED, Cell, choose, planned, settings_json
from deepscale.bench.gpu_check import Check, small
from deepscale.bench.gpu_report import GpuReport
from deepscale.bench.options import Options, say, whole
from deepscale.bench.worker import BenchError, run_worker
from deepscale.config import Config
from deepscale.engine_config import read
from deepscale.errors import DeepscaleError, UsageError
from deepscale.machine import Machine
from deepscale.parsing import parse_bytes, parse_depth, parse_duration
from deepscale.paths import ds_config_path

DEPTHS, WIDTHS = (26, 1004, 10_001), (64, 128, 256, 512)
LIMIT = 24 * 10**9  # the original study's card; 24e9 bytes are what 24 GiB leave beside CUDA's own context
TIME = 480.0
ROW_S = 120.0  # of one measurement, at most
FEWEST_S = 15.0  # a process needs as long to start, build a network and step it
MIDDLE = 1004  # layers of the network whose steps are looked into: deep enough, and soon done
MEASURED_S = 8.0  # of steps in a row

Measure = Callable[[str, Mapping[str, Any], int, float], dict[str, Any]]


def main(arguments: list[str]) -> None:
    """Checks and measures on the first GPU. Raises UsageError without one, BenchError where it computes wrongly."""
    options = Options("gpu", "Correctness against float64, then step time and memory, planned and measured, in bf16 on one GPU.")
    options.several("depths", DEPTHS, parse_depth, "layers")
    options.several("widths", WIDTHS, whole(), "channels of stage 1")
    options.size("batch-size", 64, "images per step")
    options.several("limits", (LIMIT, None), _limit, "device memory, for example 24GB, or none", shown="24GB none")
    text = f"of everything; what is not reached is listed as skipped (default: {TIME / 60:.0f}m)"
    options.parser.add_argument("--time-limit", type=parse_duration, default=TIME, metavar="T", help=f"longest time {text}")
    options.parser.set_defaults(json=Path("bench-gpu.json"))
    if not torch.cuda.is_available() and not {"-h", "--help"} & set(arguments):
        built = f"torch {torch.__version__} is built {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
        raise UsageError(f"deepscale bench gpu measures a GPU, and torch finds none here ({built}); run it on a machine with one")
    values, report = options.parse(arguments)
    Bench(values, GpuReport(**vars(report)), "cuda").run()


def _limit(text: str) -> int | None:
    return None if text.lower() == "none" else parse_bytes(text)


class Bench:
    """One run, on `device`; `measure` runs a task in a process of its own."""

    def __init__(self, values: argparse.Namespace, report: GpuReport, device: str, measure: Measure | None = None) -> None:
        self.values, self.report, self.device = values, report, device
        self.measure = measure or self.in_process
        self.end = time.monotonic() + values.time_limit
        self.engines = ["torch", "deepspeed"] if find_spec("deepspeed") is not None else ["torch"]
        self.alone = small(device)  # the settings of a process that needs no network of its own

    def run(self) -> None:
        """Everything, in order; the file is written after each measurement."""
        report, values = self.report, self.values
        if len(self.engines) == 1:
            report.notes.append("DeepSpeed is not installed: its rows are left out (pip install deepspeed)")
        found = self._device()
        self._check("network", "the stacked network")
        if "deepspeed" in self.engines:
            self._check_deepspeed()
        self.machine = Machine(device=self.device, device_bytes=found["free_bytes"], host_bytes=found["host_bytes"], bf16=True, ranks=1)
        limits = sorted(values.limits, key=lambda limit: (limit is None, limit))
        report.cells = choose(values.depths, values.widths, limits, self.engines, self.machine, values.batch_size)
        self._save()
        first = [cell for cell in report.cells if cell.first]
        self._cells([cell for cell in first if cell.width == min(values.widths)])
        self._traces(first, ("profile", "operators", "graph"))
        self._cells(first)
        self._traces(first, ("graph deep", "plain"))
        self._pinned(first)
        self._cells(list(report.cells))
        self._save()
        print(report.text(), flush=True)

    def _left(self) -> float:
        """Seconds for the next measurement."""
        return min(ROW_S, self.end - time.monotonic())

    def in_process(self, task: str, settings: Mapping[str, Any], limit: int, seconds: float) -> dict[str, Any]:
        """The task in a fresh process, within the time that is left."""
        options = {"task": task, "settings": json.dumps(settings), "limit": limit, "seconds": seconds}
        threads = torch.get_num_threads()
        return run_worker("deepscale.bench.gpu_worker", options, threads=threads, limit_s=max(1.0, self._left()), accelerator=self.device)

    def _task(self, task: str, settings: Config, limit: int = 0) -> dict[str, Any]:
        return self.measure(task, settings_json(settings), limit, MEASURED_S)

    def _save(self) -> None:
        self.report.seconds = self.values.time_limit - (self.end - time.monotonic())
        self.report.save(self.values.json)

    def _device(self) -> dict[str, Any]:
        say("the device")
        self.report.device = found = self._task("device", self.alone)
        if not found["bf16"] and self.device == "cuda":
            raise UsageError(f"{found['name']} does not compute in bf16, which this bench measures in; it needs a GPU from Ampere on")
        self._save()
        return found

    def _check(self, task: str, what: str, settings: Config | None = None) -> None:
        """Raises BenchError where a check is beyond its tolerance."""
        say(f"is it right: {what}")
        found = self._task(task, settings or self.alone)
        checks = [Check(*each) for each in found["checks"]]
        self.report.checks += checks
        self.report.notes += found.get("broken", [])
        self._save()
        wrong = [check for check in checks if not check.error <= check.tolerance]
        if wrong:
            listed = "; ".join(f"{check.what}: error {check.error:.2g}, at most {check.tolerance:.2g} is right" for check in wrong)
            raise BenchError(f"this device computes wrongly, so nothing is measured: {listed}")

    def _check_deepspeed(self) -> None:
        """Where DeepSpeed does not work at all, its rows are left out: the others are still worth measuring."""
        try:
            self._check("engines", "DeepSpeed against plain torch", small(self.device, engine="deepspeed"))
        except DeepscaleError as error:
            if self.report.wrong:
                raise
            self.engines = ["torch"]
            self.report.notes.append(f"DeepSpeed's rows are left out: {error}")

    def _cells(self, cells: Iterable[Cell]) -> None:
        """Measures those that are not yet."""
        for cell in cells:
            if cell.outcome == OPEN:
                self._cell(cell)
                self._save()

    def _cell(self, cell: Cell) -> None:
        """Measures a cell that fits by plan."""
        assert cell.settings is not None
        if self._left() < FEWEST_S:
            cell.outcome, cell.why = SKIPPED, "the time was over"
            return
        say(f"{cell.name()} ({self.end - time.monotonic():.0f} s left)")
        try:
            cell.numbers = self._task("step", cell.settings, cell.limit or 0)
        except DeepscaleError as error:
            cell.outcome, cell.why = FAILED, str(error)
            return
        cell.outcome, cell.why = cell.numbers.pop("outcome", MEASURED), cell.numbers.pop("why", "")
        if cell.outcome == OUT_OF_MEMORY and cell.settings.engine.zero == 2:
            self._with_zero_3(cell)

    def _with_zero_3(self, cell: Cell) -> None:
        """What ZeRO 2 did not hold, once more with the parameters on the host, where that fits."""
        say(f"out of memory: {cell.why}")
        other = planned(Cell(cell.depth, cell.width, cell.limit, cell.engine, cell.first), self.machine, self.values.batch_size, stages=(3,))
        if other.settings is not None:
            self.report.cells.insert(self.report.cells.index(cell) + 1, other)
            self._save()
            self._cell(other)

    def _traces(self, cells: list[Cell], names: Sequence[str]) -> None:
        """Where the time of a step in plain torch goes; `deep`: of the deepest network, not of the middle one."""
        own = [cell for cell in cells if cell.settings is not None and cell.engine == "torch"]
        middle = sorted(own, key=lambda cell: (abs(cell.depth - MIDDLE), cell.width, cell.limit is None))[:1]
        deepest = sorted(own, key=lambda cell: (-cell.depth, cell.width))[:1]
        for name in names:
            for cell in deepest if name.endswith("deep") else middle:
                self._trace(name, name.split()[0], cell)

    def _pinned(self, cells: list[Cell]) -> None:
        """The first offloaded step once more, with page-locked memory on the host."""
        for cell in cells:
            if cell.outcome == MEASURED and cell.settings is not None and cell.settings.engine.offload == "cpu" and cell.settings.engine.zero == 2:
                with tempfile.TemporaryDirectory() as folder:
                    self._trace("pinned", "step", cell, cell.settings.replace(deepspeed_config=str(pinned_file(Path(folder)))))
                return

    def _trace(self, name: str, task: str, cell: Cell, settings: Config | None = None) -> None:
        """One of them, of a cell's network; one that fails ends no other."""
        assert cell.settings is not None
        if self._left() < FEWEST_S or (self.device != "cuda" and task == "graph"):
            self.report.traces[name] = {"why": "the time was over" if self.device == "cuda" else "CUDA only"}
            return
        say(f"{name}: {cell.name()}")
        limit = cell.limit or 0 if task == "step" else 0
        try:
            self.report.traces[name] = {"of": cell.name()} | self._task(task, settings or cell.settings, limit)
        except DeepscaleError as error:
            self.report.traces[name] = {"of": cell.name(), "why": str(error)}
        self._save()


def pinned_file(folder: Path) -> Path:
    """ZeRO 2's file, with page-locked memory on the host, which the GPU reads and writes without the host's help."""
    settings = read(ds_config_path("zero2_offload"))
    settings["zero_optimization"]["offload_optimizer"]["pin_memory"] = True
    path = folder / "zero2_pinned.json"
    path.write_text(json.dumps(settings))
    return path
