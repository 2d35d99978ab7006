"""What the report knows of a run, wherever it comes from."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepscale.gradflow.flow import Flow, read

# The original study's criterion.
CONVERGED_ABOVE = 0.5

# Numbers of a run in the table's order: key -> (heading, kind). Kinds say how runs.js writes a value.
NUMBERS = {
    "depth": ("depth, layers", "integer"),
    "parameters": ("parameters", "integer"),
    "validation_accuracy": ("validation", "percent"),
    "test_accuracy": ("test", "percent"),
    "validation_loss": ("validation loss", "number"),
    "training_loss": ("training loss", "number"),
    "step_s": ("step", "seconds"),
    "planned_memory_bytes": ("peak memory planned", "bytes"),
    "peak_memory_bytes": ("measured", "bytes"),
}


# Settings that say where, or that have a column of their own.
HIDDEN = {
    *("depth", "built_depth", "parameters", "planned_memory_bytes", "run_name", "experiment", "data_dir", "checkpoint_dir"),
    *("local_rank", "deepspeed_config", "resolved_auto", "tracking", "verbose"),
}
# Settings of a run that are numbers of the table.
FROM_SETTINGS = {"depth": "built_depth", "parameters": "parameters", "planned_memory_bytes": "planned_memory_bytes"}


@dataclass
class ReportRun:
    """A run in the report. Its record is either at hand (`flow`) or read from `record` when its turn comes: 200 do not fit in memory.

    settings: by name, as typed. numbers: what is known of `NUMBERS`; accuracies 0 to 1. curves: name -> (step, value) pairs;
    "first_layer" (mean |g| of the stem's weight) is taken where the record has none. status: how it ended, else MLflow's word (RUNNING
    among them). problem: why there is no record, as the end of a sentence. started_s: seconds since 1970.
    """

    name: str
    id: str
    settings: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    verdict_text: str = ""
    flow: Flow | None = None
    record: Path | None = None
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    status: str = ""
    started_s: float | None = None
    problem: str = ""

    def shown_settings(self) -> dict[str, str]:
        """The settings that say what the run is, not where: no path of the machine among them."""
        texts = {name: f"{value}" for name, value in self.settings.items() if name not in HIDDEN}
        return {name: text for name, text in texts.items() if not os.path.isabs(text)}

    def all_numbers(self) -> dict[str, float]:
        """`numbers`, and what its settings say of them."""
        return numbers_in(self.settings, FROM_SETTINGS) | self.numbers

    @property
    def has_record(self) -> bool:
        """Whether there is a record to draw."""
        return self.flow is not None or self.record is not None

    @property
    def converged(self) -> bool | None:
        """Validation accuracy above 50 %; None where it was not measured."""
        accuracy = self.numbers.get("validation_accuracy")
        return None if accuracy is None else accuracy > CONVERGED_ABOVE

    def load(self) -> Flow | None:
        """The record; None where there is none. Raises UsageError where the file is broken."""
        if self.flow is not None or self.record is None:
            return self.flow
        return read(self.record)


def numbers_in(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float]:
    """The values that are numbers: key -> the value of this name."""
    found = {}
    for key, name in names.items():
        with suppress(KeyError, TypeError, ValueError):
            found[key] = float(values[name])
    return found
