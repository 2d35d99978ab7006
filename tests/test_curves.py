"""`deepscale curves`: what MLflow recorded comes back, is stored small, and is drawn."""

import contextlib
import json
from pathlib import Path

import pytest

from deepscale import curves, tracking
from deepscale.config import TrackingConfig
from deepscale.errors import UsageError

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with one recorded run of 450 steps."""
    place = tmp_path_factory.mktemp("curves")
    settings = {"built_depth": 26, "width": 8, "patch_size": 1, "batch_size": 64, "data_dir": str(place)}
    with contextlib.chdir(place):
        tracker = tracking.open_tracker(TrackingConfig(), run_name="a run", parameters=settings, tags={}, dataset=None, rank=0, warn=pytest.fail)
        for step in range(1, 451):
            tracker.log({"train/loss": 2.3 - step / 1000, "train/accuracy": step / 1000}, step)
        tracker.log({"val/loss": 1.9, "val/accuracy": 0.4}, 450)
        tracker.text("summary.json", json.dumps({"depth": "26 layers"}))
        tracker.finish("FINISHED")
    return place


def test_a_recorded_run_is_stored_and_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stored curve against the values logged: thinned by means, the end kept; the figure is a PNG, from MLflow and from the file."""
    with contextlib.chdir(folder):
        curves.main(["a run", "--save", "saved", "--out", "figure.png"])
        stored = json.loads(Path("saved/a_run.json").read_text())
        curves.main(["saved/a_run.json", "--out", "again.png"])
        assert Path("figure.png").read_bytes()[:4] == Path("again.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.split() == ["figure.png", "again.png"]
    loss = stored["curves"]["train/loss"]
    assert len(loss) == 150
    assert loss[0] == [3.0, pytest.approx(2.3 - 0.002)]  # the mean of steps 1, 2 and 3
    assert loss[-1][0] == 450
    assert stored["summary"] == {"depth": "26 layers"}
    assert stored["settings"]["width"] == "8"
    assert "data_dir" not in stored["settings"]  # the folder of one machine


def test_unknown_names_list_the_known(folder: Path) -> None:
    """A run or experiment that is not there, and files that are not ours."""
    with contextlib.chdir(folder):
        with pytest.raises(UsageError, match="no run is named 'other'; possible: a run"):
            curves.main(["other"])
        with pytest.raises(UsageError, match=r"the experiment 'other' is not in .*possible: .*deepscale"):
            curves.main(["a run", "--experiment", "other"])
        Path("wrong.json").write_text("{}")
        for name in ("wrong.json", "absent.json"):
            with pytest.raises(UsageError, match=f"{name} is not a file that"):
                curves.main([name])


def test_running_mean_starts_at_the_first_value() -> None:
    """Corrected for its start: constant values give themselves, and one value is its own mean."""
    assert curves.running_mean((2.0, 2.0, 2.0)) == pytest.approx([2.0, 2.0, 2.0])
    assert curves.running_mean((1.0, 3.0)) == pytest.approx([1.0, (0.9 * 0.1 * 1.0 + 0.1 * 3.0) / (0.9 * 0.1 + 0.1)])
