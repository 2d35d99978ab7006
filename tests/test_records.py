"""A run's records, through the training loop: on which steps, at what cost to the others, what is said and what is left behind."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepscale import gradflow, loop
from deepscale.activations import policy_of
from deepscale.config import Config
from deepscale.data import open_feeds
from deepscale.data.synthetic import synthetic
from deepscale.engine import TorchEngine
from deepscale.errors import NonFiniteError
from deepscale.gradflow.flow import FILE
from deepscale.gradflow.health import Thresholds, verdict
from deepscale.models.convnext import ConvNeXt
from deepscale.progress import Progress
from deepscale.records import PAGE, PICTURE, Records
from deepscale.tracking import NullTracker
from deepscale.world import World

HERE = World(0, 1, 0, 1, torch.device("cpu"))
RESOLVED: dict[str, Any] = {
    "depth": 26, "width": 4, "patch_size": 4, "batch_size": 8, "zero": 0, "offload": "none", "precision": "fp32",
    "activations": "recompute", "segment": 2,
    "engine": "torch", "feed": "tensors", "eval_images": 8, "max_steps": 30,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


class Log(NullTracker):
    """Keeps all it is told."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[int, float]] = {}
        self.given_tags: dict[str, str] = {}
        self.files: list[Path] = []

    def log(self, metrics: Any, step: int) -> None:
        for name, value in metrics.items():
            assert math.isfinite(value)
            self.metrics.setdefault(name, {})[step] = value

    def tags(self, values: Any) -> None:
        self.given_tags |= values

    def file(self, path: Path) -> None:
        self.files.append(path)


class Screen(Progress):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__(0, enabled=False)
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def warn(self, line: str) -> None:
        self.warned.append(line)


def make(**settings: Any) -> tuple[loop.Run, Log, Screen]:
    config = Config().replace(**{**RESOLVED, **settings})
    feeds = open_feeds(
        synthetic(train_images=64, test_images=40), config.data, micro_batch=8, eval_batch=8, seed=0, rank=0, world_size=1, device=HERE.device
    )
    model = policy_of(config).apply(ConvNeXt(config.model, stack_size=2)).initialise(0)
    engine, tracker, screen = TorchEngine(model, config, HERE), Log(), Screen()
    records = Records(model, engine, config, tracker, screen)
    return loop.Run(config, HERE, model, engine, feeds, tracker, screen, records), tracker, screen


def test_a_short_run_is_recorded_at_least_twelve_times_with_every_layer_and_block() -> None:
    run, log, _ = make()
    loop.Fit(run)()
    flow = run.records.recorder.flow()
    steps = flow.steps.tolist()
    assert (steps[0], steps[-1]) == (1, 30) and len(steps) >= 12
    assert flow.depth == 26 and len(flow.layer_names) == 26 + 3 + 8 and len(flow.block_names) == 8
    for name in ("mean_abs", "l2", "max_abs", "zeros", "nonfinite", "weight_l2", "update_ratio", "output_std", "output_mean", "output_grad_l2"):
        assert np.isfinite(getattr(flow, name)).sum() == getattr(flow, name).size - (8 if name == "update_ratio" else 0), name  # gamma 0 at first
    counted = np.isfinite(flow.saturated).all(1)
    assert counted[0] and counted[-1] and 2 <= counted.sum() < len(steps)  # the dearest part, not on every record
    assert (flow.l2[0, np.isin(flow.layer_kinds, ("dwconv", "pwconv1", "pwconv2"))] == 0).all() and (flow.l2[-1] > 0).all()
    for name in ("grad/first_last_ratio", "grad/slope_decades_per_1000_layers", "grad/min_mean_abs", "grad/nonfinite_layers"):
        assert set(steps) <= set(log.metrics[name]), name
    first = log.metrics["grad/first_layer_mean_abs"]
    assert [first[step] for step in steps] == pytest.approx(flow.mean_abs[:, 0].tolist(), rel=1e-6)


def test_curves_against_depth_are_logged_with_the_layer_as_step(tmp_path: Path) -> None:
    run, log, _ = make(max_steps=12)
    loop.Fit(run)()
    run.records.keep(tmp_path / "run", "a run", {"depth": 26})
    flow = gradflow.load(tmp_path / "run")
    for moment, record in (("first", 0), ("step_10", flow.steps.tolist().index(10)), ("last", -1)):
        curve = log.metrics[f"depth_{moment}/output_gradient"]
        assert list(curve) == flow.block_depths.tolist()
        assert list(curve.values()) == pytest.approx(flow.output_grad_l2[record].tolist(), rel=1e-6)
    assert [path.name for path in log.files] == [FILE, PAGE, PICTURE] and all(path.is_file() for path in log.files)
    assert flow.meta["run_name"] == "a run" and flow.meta["settings"]["depth"] == "26"


def test_a_recorded_run_trains_as_an_unrecorded_one_bit_for_bit() -> None:
    losses = []
    for every in ("auto", 0):
        run, log, _ = make(record_every=every, max_steps=12, norm="batchnorm")
        loop.Fit(run)()
        losses.append([*log.metrics["train/loss"].values(), run.model.stem.conv.weight.sum().item()])
        assert (len(run.records.recorder.steps) > 0) == (every == "auto")
    assert losses[0] == losses[1] and len(losses[0]) == 13


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts what makes the host wait for the device; the only element is the count."""
    count = [0]

    def counting(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(self: Tensor, *arguments: Any, **options: Any) -> Any:
            count[0] += 1
            return original(self, *arguments, **options)

        return read

    for name in READS:
        monkeypatch.setattr(Tensor, name, counting(name))
    yield count


def test_a_step_without_a_record_reads_nothing_more_from_the_device(reads: list[int]) -> None:
    per_step: dict[bool, list[int]] = {}
    for recording in (False, True):
        run, _, _ = make(record_every=20 if recording else 0, max_steps=25)
        fit, batches, per_step[recording] = loop.Fit(run), loop.endless(run.feeds.train), []
        run.records.length(25)
        for _ in range(25):
            before = reads[0]
            fit._one(batches)
            per_step[recording].append(reads[0] - before)
    differing = [step for step, (plain, watched) in enumerate(zip(per_step[False], per_step[True], strict=True), 1) if plain != watched]
    assert differing == [1, 20, 25]


def test_a_flow_that_turns_bad_is_warned_of_at_once_and_tagged(tmp_path: Path) -> None:
    run, log, screen = make(skip="none", depth=302, max_steps=2, width=4)
    loop.Fit(run)()
    assert len(screen.warned) == 1 and screen.warned[0].startswith("gradient flow at step 1: vanishing")
    rows = run.records.keep(tmp_path, "deep", {})
    assert log.given_tags["gradient_verdict"] == "vanishing" and rows["gradients"].startswith("vanishing: ")


def test_thresholds_are_settings(tmp_path: Path) -> None:
    defaults = Config().tracking
    assert (defaults.vanishing_ratio, defaults.exploding_ratio) == (Thresholds().vanishing_ratio, Thresholds().exploding_ratio)
    run, _, screen = make(vanishing_ratio=1.0, max_steps=3, skip="none", depth=110, record_every=1)
    loop.Fit(run)()
    assert "vanishing" in screen.warned[0]


def test_a_run_that_stops_leaves_the_record_of_its_last_step(tmp_path: Path) -> None:
    run, _, screen = make(max_steps=20, lr=1e30, clip=0.0, schedule="constant", record_every=7)
    with pytest.raises(NonFiniteError):
        loop.Fit(run)()
    run.records.keep(tmp_path, "stopped", {})
    flow = gradflow.load(tmp_path)
    assert (flow.nonfinite[-1] > 0).any() and not (flow.nonfinite[0] > 0).any()
    assert any("non-finite" in line for line in screen.warned)


def test_record_every_and_a_full_record() -> None:
    run, _, screen = make(record_every=10, max_steps=25)
    loop.Fit(run)()
    assert run.records.recorder.steps == [1, 10, 20, 25]
    run.records.recorder.capacity = 3
    run.records.recorder.steps = []
    run.records.every = 1
    run.records.length(100)
    assert len(run.records.steps) == 3 and "--record-every 1" in screen.warned[-1]


def test_a_record_that_was_begun_and_not_finished_is_left_out(tmp_path: Path) -> None:
    """A run that is interrupted within a step."""
    run, _, _ = make(record_every=1, max_steps=2)
    loop.Fit(run)()
    run.records.steps = (1, 2, 3)
    run.records.begin(3)
    assert run.records.keep(tmp_path, "cut", {})["records"].startswith("2, ")
    assert gradflow.load(tmp_path).steps.tolist() == [1, 2]


def test_the_limits_of_a_run_are_kept_with_its_record(tmp_path: Path) -> None:
    run, _, _ = make(max_steps=1, vanishing_ratio=0.9)
    loop.Fit(run)()
    run.records.keep(tmp_path, "strict", {"vanishing_ratio": 0.9, "exploding_ratio": 1e3})
    flow = gradflow.load(tmp_path)
    assert Thresholds.of(flow) == Thresholds(vanishing_ratio=0.9)
    assert (verdict(flow).label, verdict(flow, thresholds=Thresholds()).label) == ("vanishing", "healthy")


def test_without_matplotlib_the_record_and_its_page_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, log, screen = make(max_steps=1)
    loop.Fit(run)()
    for module in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, module, None)
    rows = run.records.keep(tmp_path, "plain", {})
    assert [path.name for path in log.files] == [FILE, PAGE] and all(path.is_file() for path in log.files)
    assert "matplotlib" in screen.warned[-1] and PAGE in rows["records"]


def test_a_run_whose_folder_cannot_be_written_still_has_its_verdict(tmp_path: Path) -> None:
    run, log, screen = make(max_steps=1)
    loop.Fit(run)()
    (tmp_path / "taken").touch()
    rows = run.records.keep(tmp_path / "taken", "full", {})
    assert set(rows) == {"gradients"} and not log.files and "not all written" in screen.warned[-1]


def test_a_run_without_records_leaves_no_file(tmp_path: Path) -> None:
    run, log, _ = make(record_every=0, max_steps=2)
    loop.Fit(run)()
    assert run.records.keep(tmp_path / "none", "none", {}) == {} and not (tmp_path / "none").exists() and not log.files
