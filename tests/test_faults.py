"""What a run survives, and how it ends where it cannot: real runs of several processes, really stopped and killed."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from jobs import TINY, Job
from test_train import runs_in

TORCH = [*TINY, "--engine", "torch"]


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path) -> Path:
    """Where runs lie, with a tracking database."""
    shutil.copy(empty_store, tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ a rank that hangs


@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_rank_that_sleeps_is_named_and_the_record_closed(folder: Path, sleeper: int) -> None:
    script, patience_s = str(REPOSITORY / "tests" / "sleeping_feed.py"), 6.0
    environment = {"SLEEPER": str(sleeper)}
    with Job(folder, *TORCH, "--max-steps", "20", "--hang-timeout", "6s", ranks=2, script=script, environment=environment) as job:
        job.until_said("step 1/")
        begin = time.monotonic()
        assert job.end() == [1, 1]
        took = time.monotonic() - begin
        assert job.orphans() == {}
    (sentence,) = job.said("deepscale: ")
    assert f"deepscale: rank {sleeper} (process " in sentence and "has been at the data of step 5 for" in sentence, sentence
    assert "in sleeping_feed.py:" in sentence and "--hang-timeout" in sentence and "--resume auto" in sentence
    (run,) = runs_in(folder)
    assert (run.status, run.tags["outcome"], len(run.losses())) == ("FAILED", "failed", 4)
    assert run.tags["outcome_text"].startswith(f"rank {sleeper} (process ")
    assert took < patience_s + 10, "the timeout and a few seconds"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named_by_another(folder: Path, stopped: int) -> None:
    """SIGSTOP, as a machine that swaps: neither its loop nor its watchdog runs. Rank 0 also holds the ranks' key-value store."""
    with Job(folder, *TORCH, "--max-steps", "1000000", "--hang-timeout", "5s", ranks=2) as job:
        job.until_said("step 1/")
        job.send(signal.SIGSTOP, [stopped])
        assert job.end() == [1, 1]
        assert job.orphans() == {}
    (sentence,) = job.said("deepscale: ")
    assert f"deepscale: rank {stopped} (process " in sentence and "has not been heard of for" in sentence, sentence
    assert ("may stay open" in sentence) == (stopped == 0)
    (run,) = runs_in(folder)
    assert (run.status, run.tags["outcome"]) == ("FAILED", "failed"), "rank 0 is woken up to see that the run is over"
