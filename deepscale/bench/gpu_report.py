"""The table and the file of `deepscale bench gpu`: the checks, the cells, where a step's time goes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepscale.bench.gpu_cells import HEADINGS, MEASURED, Cell
from deepscale.bench.gpu_check import Check
from deepscale.bench.report import GB, Goal, Report, Row, markdown, ratio, write_json, write_text

PLANNED_SHARE = 0.10


@dataclass
class GpuReport(Report):
    """`device` is what gpu_device.describe found, `traces` are the worker's results of that name."""

    device: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        """Whether a check is beyond its tolerance; NaN is."""
        return any(not check.error <= check.tolerance for check in self.checks)

    @property
    def rate(self) -> float | None:
        """FLOPs per second of the device's bf16 product."""
        return self.device.get("matmul_bf16_flops")

    def fill(self) -> None:
        """The rows from what there is."""
        self.rows = [Row(f"error of {check.what}", "relative", (check.error,), Goal(check.tolerance)) for check in self.checks]
        if self.rate:
            self.rows.append(Row("matrix product in bf16", "TFLOP/s", (self.rate / 1e12,)))
            self.rows.append(Row("copy on the device", "GB/s", (self.device["copy_bytes"] / GB,)))
        self.rows += self._memory_rows() + self._trace_rows()

    def _memory_rows(self) -> list[Row]:
        """The deepest network within the tightest limit; the plan against all that were measured."""
        rows = []
        measured = [cell for cell in self.cells if cell.outcome == MEASURED and cell.numbers.get("reserved_bytes")]
        deep = [cell for cell in measured if cell.limit and cell.depth == max(c.depth for c in self.cells)][:1]
        for cell in deep:
            assert cell.limit is not None
            rows.append(Row(f"reserved, {cell.name()}", "GB", (cell.numbers["reserved_bytes"] / GB,), Goal(cell.limit / GB)))
        if measured:
            above = [cell.numbers["allocated_bytes"] for cell in measured]
            below = [cell.memory.device for cell in measured if cell.memory is not None]
            rows.append(ratio("device memory, measured / planned", above, below))
        return rows

    def _trace_rows(self) -> list[Row]:
        rows = []
        found = self.traces.get("profile", {})
        if "kernels" in found:
            rows += [
                Row("kernels per block of a step", "", (found["kernels_per_block"],)),
                Row("the device idle in a step", "share", (found["gaps"],)),
                Row("the host waits for the device in a step", "times", (float(found["synchronisations"]),)),
            ]
        for name in ("graph", "graph deep"):
            found = self.traces.get(name, {})
            if "graph_s" in found:
                rows.append(Row(f"passes of {found['of']}", "ms", (1e3 * found["eager_s"],)))
                rows.append(Row("the same as one CUDA graph", "ms", (1e3 * found["graph_s"],)))
        plain, pinned = self.traces.get("plain", {}), self.traces.get("pinned", {})
        if "plain_s" in plain:
            network = ", ".join(plain["of"].split(", ")[:2])
            rows.append(ratio(f"passes of {network}, nothing recomputed, plain / stacked", [plain["plain_s"]], [plain["stacked_s"]]))
        if "step_s" in pinned:
            rows.append(Row(f"step with pinned host memory, {pinned['of']}", "ms", (1e3 * pinned["step_s"],)))
        return rows

    def text(self) -> str:
        """The cells' table above the rows'."""
        self.fill()
        table = markdown([HEADINGS, *(cell.cells(self.rate) for cell in self.cells)], left=4)
        why = [f"{cell.name()}: {cell.outcome}: {cell.why.splitlines()[0]}" for cell in self.cells if cell.why]
        gpu = f"device: {self.device.get('name')}, {self.device.get('total_bytes', 0) / GB:.0f} GB, CUDA {self.device.get('cuda')}; "
        return "\n".join([*table, "", *why, "", super().text(), f"{gpu}{self.seconds:.0f} s in all"])

    def as_json(self) -> dict[str, Any]:
        """Everything, with the reasons of what is not there."""
        self.fill()
        record = super().as_json() | {"device": self.device, "seconds": self.seconds}
        record["checks"] = [check._asdict() for check in self.checks]
        return record | {"cells": [cell.as_json(self.rate) for cell in self.cells], "traces": self.traces}

    def save(self, path: Path | None) -> None:
        """Writes the file, and the table beside it as Markdown."""
        if path is not None:
            write_json(path, self.as_json())
            write_text(path.with_suffix(".md"), self.text() + "\n")
