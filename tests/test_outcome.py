"""How a run ends in its record; memory that runs out, by requests that the real allocators refuse."""

import errno
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from deepscale import config
from deepscale.config import Config
from deepscale.errors import NonFiniteError, OutOfMemoryError, UsageError
from deepscale.outcome import Recorded, is_out_of_memory, memory_advice, outcome_of
from deepscale.tracking import NullTracker, Tracker
from deepscale.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Notes(NullTracker):
    """What a tracker is told."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}

    def tags(self, values: Mapping[str, str]) -> None:
        self.told |= values

    def finish(self, status: str) -> None:
        self.told["status"] = status


def torch_on_the_host() -> None:
    torch.empty(2**50)


def numpy_array() -> None:
    np.empty(2**50)


def python_bytes() -> None:
    bytearray(2**60)


def a_map_of_memory() -> None:
    mmap.mmap(-1, 2**55)


@pytest.mark.parametrize("ask", [torch_on_the_host, numpy_array, python_bytes, a_map_of_memory])
def test_every_allocator_that_refuses_is_known(ask: Any) -> None:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as refused:
        ask()
    assert is_out_of_memory(refused.value), refused.value


def test_a_gpu_that_refuses_is_known() -> None:
    """torch's own error class: no GPU is needed to make one."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as shapes:
        torch.zeros(2) @ torch.zeros(3)
    for error in (shapes.value, ValueError("x"), OSError(errno.ENOSPC, "No space left on device"), UsageError("y")):
        assert not is_out_of_memory(error)
        assert outcome_of(error) == "failed"


def test_the_word_for_every_end() -> None:
    ends = {None: "finished", KeyboardInterrupt(): "interrupted", NonFiniteError("nan"): "non_finite", MemoryError(): "out_of_memory"}
    assert [outcome_of(error) for error in ends] == list(ends.values())


def recorded(error: BaseException | None, opened: bool) -> tuple[dict[str, str], BaseException | None]:
    """What the record of a run that ends with `error` holds, and what is raised."""
    notes = Notes()

    def tracker() -> Tracker:
        return notes

    try:
        with Recorded(tracker, lambda error: f"planned 1 GiB ({error})", ALONE) as record:
            if opened:
                assert record.tracker is notes
            if error is not None:
                raise error
    except BaseException as raised:
        return notes.told, raised
    return notes.told, None


@pytest.mark.parametrize("opened", [False, True])
def test_memory_that_runs_out_is_recorded_even_before_the_first_step(opened: bool) -> None:
    told, raised = recorded(MemoryError("no more"), opened)
    assert told == {"outcome": "out_of_memory", "outcome_text": "planned 1 GiB (no more)", "status": "FAILED"}
    assert isinstance(raised, OutOfMemoryError) and str(raised) == "planned 1 GiB (no more)" and raised.exit_code == 4


def test_bad_input_found_before_the_first_step_leaves_no_record() -> None:
    error = UsageError("no such key")
    assert recorded(error, opened=False) == ({}, error)


@pytest.mark.parametrize(
    ("error", "outcome", "status"),
    [(None, "finished", "FINISHED"), (KeyboardInterrupt(), "interrupted", "KILLED"), (NonFiniteError("nan"), "non_finite", "FAILED")],
)
def test_every_run_says_how_it_ended(error: BaseException | None, outcome: str, status: str) -> None:
    told, raised = recorded(error, opened=True)
    assert told == {"outcome": outcome, "status": status}
    assert raised is error


RESOLVED = Config().replace(
    depth=1004, width=64, batch_size=64, zero=0, offload="none", precision="fp32", device="cpu", activations="keep", segment=None, stack_size=18
)


@pytest.mark.parametrize(
    ("changes", "ranks", "advice"),
    [
        ({}, 1, "type --recompute or --accumulation 2 or --width 32"),
        ({"activations": "recompute", "segment": 4}, 1, "type --segment 6 or --accumulation 2 or --width 32"),
        ({"activations": "recompute", "segment": 6, "accumulation": 64, "width": 1}, 1, "type --activations revolve"),
        ({"activations": "recompute", "segment": 6, "zero": 2}, 2, "type --activations revolve or --zero 3 or --accumulation 2 or --width 32"),
        (
            {"activations": "recompute", "segment": 6, "device": "cuda"},
            1,
            "type --activations offload or --activations revolve or --zero 3 --offload cpu or --accumulation 2 or --width 32",
        ),
        ({"activations": "revolve", "segment": 6, "slots": 9, "accumulation": 64, "width": 1}, 1, "type a smaller --depth"),
        ({"activations": "offload", "segment": 6, "device": "cuda", "engine": "torch"}, 1, "type --accumulation 2 or --width 32"),
    ],
)
def test_the_advice_names_what_is_not_on_yet_and_can_be_typed(changes: dict[str, Any], ranks: int, advice: str) -> None:
    settings = RESOLVED.replace(**changes)
    assert memory_advice(settings, ranks) == advice
    for choice in advice.removeprefix("type ").split(" or "):
        if choice.startswith("--"):
            config.parse(choice.split())
