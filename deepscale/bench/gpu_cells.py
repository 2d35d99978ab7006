"""What `deepscale bench gpu` measures: cells of depth, width, memory limit and engine, planned, and in the order of their worth."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepscale import config, plan
from deepscale.bench.networks import CHANNELS, CLASSES, IMAGE_SIZE
from deepscale.bench.report import GB
from deepscale.config import Config
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.errors import UsageError
from deepscale.machine import Machine
from deepscale.plan_memory import Memory, memory_of
from deepscale.plan_network import flops_of
from deepscale.world import World

MEASURED, UNFIT, SKIPPED, FAILED, OUT_OF_MEMORY = "measured", "does not fit, by plan", "skipped", "failed", "out of memory"
OPEN = "not reached"
HEADINGS = [
    "layers",
    "width",
    "limit",
    "how",
    "step ms",
    "n",
    "floor ms",
    "of the floor",
    "device GB planned",
    "allocated",
    "reserved",
    "host GB planned",
]


@dataclass
class Cell:
    """One network within one limit (bytes of device memory, None for all there is) on one engine; `first`: its first choice of engine."""

    depth: int
    width: int
    limit: int | None
    engine: str
    first: bool = True
    settings: Config | None = None  # planned, without any auto
    outcome: str = OPEN
    why: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)  # what the measuring process printed

    @property
    def memory(self) -> Memory | None:
        """What is planned."""
        return None if self.settings is None else memory_of(self.settings, 1, CHANNELS, IMAGE_SIZE, CLASSES)

    @property
    def flops(self) -> float:
        """Of a step, with what is recomputed."""
        return 0.0 if self.settings is None else flops_of(self.settings, 1, CHANNELS, IMAGE_SIZE, CLASSES).total

    @property
    def how(self) -> str:
        """The engine, and the planner's choice, in a few words."""
        if self.settings is None:
            return ""
        engine = self.settings.engine
        name = "torch" if engine.engine == "torch" else f"ZeRO {engine.zero}{' offloaded' if engine.offload == 'cpu' else ''}"
        return f"{name}, {engine.activations}{f' by {engine.segment}' if engine.segment else ''}"

    def name(self) -> str:
        """The cell in words, for messages."""
        within = f"within {self.limit / GB:.3g} GB" if self.limit else "without a limit"
        layers = depth_of_blocks(blocks_for_depth(self.depth))
        return ", ".join(part for part in (f"{layers:,} layers, width {self.width}, {within}", self.how) if part)

    def cells(self, rate: float | None) -> list[str]:
        """The row of the table; `rate` is the device's measured FLOPs per second."""
        layers, limit = f"{depth_of_blocks(blocks_for_depth(self.depth)):,}", f"{self.limit / GB:.3g} GB" if self.limit else "none"
        memory, numbers = self.memory, self.numbers
        floor = self.flops / rate if rate else None
        step = numbers.get("step_s")
        planned = [_gb(memory.device), _gb(memory.states_host)] if memory is not None and self.settings is not None else ["", ""]
        how = self.how if self.outcome == MEASURED else f"{f'{self.how}: ' if self.how else ''}{self.outcome}"
        return [
            *(layers, str(self.width), limit, how),
            *((f"{1e3 * step:,.1f}", str(len(numbers["steps_s"]))) if step else ("", "")),
            *(f"{1e3 * floor:,.2f}" if floor else "", f"{step / floor:.1f}x" if step and floor else ""),
            *(planned[0], _gb(numbers.get("allocated_bytes")), _gb(numbers.get("reserved_bytes")), planned[1]),
        ]

    def as_json(self, rate: float | None) -> dict[str, Any]:
        """The cell of the JSON file."""
        memory = self.memory
        record: dict[str, Any] = {"layers": depth_of_blocks(blocks_for_depth(self.depth)), "width": self.width, "limit_bytes": self.limit}
        record |= {"engine": self.engine, "how": self.how, "outcome": self.outcome, "why": self.why}
        if memory is not None:
            record |= {"parameters": memory.parameters, "planned_device_bytes": int(memory.device), "planned_host_bytes": int(memory.states_host)}
            record |= {"flops": self.flops, "floor_s": self.flops / rate if rate else None, "settings": settings_json(self.settings)}
        return record | self.numbers


def _gb(count: float | None) -> str:
    return f"{count / GB:.2f}" if count else ""


def settings_json(settings: Config | None) -> dict[str, Any]:
    """The settings that differ from their defaults, from which `settings_from` makes the same configuration."""
    given = config.differing(settings) if settings is not None else {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def settings_from(given: dict[str, Any]) -> Config:
    """The configuration of such settings."""
    return Config().replace(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def planned(cell: Cell, machine: Machine, batch_size: int, stages: Sequence[int] = (2, 3)) -> Cell:
    """The cell with the planner's choice within its limit, or with the reason why nothing fits.

    DeepSpeed's is the first of the ZeRO `stages` that fits, offloaded where it must be. `machine` is the device without a limit.
    """
    device_bytes = machine.device_bytes if cell.limit is None else min(cell.limit, machine.device_bytes)
    machine = dataclasses.replace(machine, device_bytes=device_bytes)
    asked = Config().replace(
        depth=cell.depth, width=cell.width, patch_size=1, batch_size=batch_size, engine=cell.engine, device=machine.device,
        precision="bf16", workers=1, layerscale_init=1e-2,
    )  # fmt: skip
    place = World(0, 1, 0, 1, torch.device(machine.device))
    for zero in (0,) if cell.engine == "torch" else stages:
        try:
            found = plan.resolve(asked.replace(zero=zero), place, machine, channels=CHANNELS, image_size=IMAGE_SIZE, classes=CLASSES)
        except UsageError as error:
            cell.outcome, cell.why = UNFIT, str(error)
            continue
        cell.settings, cell.outcome, cell.why = found.config, OPEN, ""
        break
    return cell


def choose(
    depths: Sequence[int], widths: Sequence[int], limits: Sequence[int | None], engines: Sequence[str], machine: Machine, batch_size: int
) -> list[Cell]:
    """All cells in the order of their worth. Left out are an engine that does not fit where another does, and what a tighter limit does not change.

    Plain torch comes first where it fits: it has no copies to make. `machine` is the device without a limit.
    """
    cells: list[Cell] = []
    for depth in depths:
        for width in widths:
            seen: list[tuple[str, Config | None]] = []
            for limit in limits:
                cells += _of_limit(Cell(depth, width, limit, ""), engines, machine, batch_size, seen)
    return sorted(cells, key=_worth)


def _of_limit(cell: Cell, engines: Sequence[str], machine: Machine, batch_size: int, seen: list[tuple[str, Config | None]]) -> Iterator[Cell]:
    """The cells of one network within one limit; `seen` are the choices within tighter limits."""
    tried = [planned(Cell(cell.depth, cell.width, cell.limit, engine), machine, batch_size) for engine in engines]
    fitting = [each for each in tried if each.settings is not None]
    for each in fitting or tried[-1:]:
        each.first = each is (fitting or tried[-1:])[0]
        if (each.engine, each.settings) not in seen or each.settings is None:
            seen.append((each.engine, each.settings))
            yield each


def _worth(cell: Cell) -> tuple[bool, int, int, bool]:
    """First choices before second, narrow before wide, deep before shallow, within a limit before without: the deepest narrow one is the first."""
    return not cell.first, cell.width, -cell.depth, cell.limit is None
