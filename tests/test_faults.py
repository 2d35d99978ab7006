"""What a run survives, and how it ends where it cannot: real runs of one and two processes, really stopped, killed and starved.

docs/faults.md says the same in a table. `make soak` (soak.py) kills at random; its short form is here.
"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import TINY, Server, Started
from test_train import Recorded, runs_in

TORCH = [*TINY, "--engine", "torch"]
ENDLESS = [*TORCH, "--max-steps", "1000000", "--checkpoint-every", "5steps", "--checkpoint-dir", "ck", "--resume", "auto"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Where runs are forked from."""
    pytest.importorskip("deepspeed")
    with Server() as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path) -> Path:
    """Where runs lie, with a tracking database."""
    shutil.copy(empty_store, tmp_path)
    return tmp_path


def only_run(folder: Path) -> Recorded:
    (run,) = runs_in(folder)
    return run


# --------------------------------------------------------------------------------------------------------------------- folders


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_does_not_block_it(server: Server, folder: Path) -> None:
    with Started(server, folder, ENDLESS) as first:
        first.until_said("checkpoint of step 5 ")
        with Started(server, folder, ENDLESS, 2) as second:
            assert second.end() == [2, 2]
            (sentence,) = set(second.said("deepscale: "))
        assert f"ck is in use by another run (process {first.ranks[0]} on " in sentence and "--checkpoint-dir" in sentence
        assert not first.ended()
        first.send(signal.SIGKILL)
        assert first.end() == [-signal.SIGKILL]
    with Started(server, folder, ENDLESS) as third:
        third.until_said("going on after step")
        third.send(signal.SIGTERM)
        assert third.end() == [75]
    assert only_run(folder).status == "KILLED"
