"""The steps of a run with plain torch on the synthetic images, and with engines and clocks that are made up.

`FakeClock` stands for time: it moves when the network runs, by what the test says, so that a time budget can be counted out exactly.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepscale import loop
from deepscale.config import Config
from deepscale.data import open_feeds
from deepscale.data.splits import Source
from deepscale.data.synthetic import synthetic
from deepscale.engine import TorchEngine
from deepscale.errors import NonFiniteError
from deepscale.models.convnext import ConvNeXt, cross_entropy
from deepscale.progress import Progress
from deepscale.records import Records
from deepscale.tracking import NullTracker
from deepscale.world import World

HERE = World(0, 1, 0, 1, torch.device("cpu"))
RESOLVED: dict[str, Any] = {
    "depth": 14, "width": 4, "patch_size": 4, "batch_size": 16, "zero": 0, "offload": "none", "precision": "fp32", "activations": "keep",
    "engine": "torch", "feed": "tensors", "layerscale_init": 1.0,
}  # fmt: skip


# A schedule that catches up on the calibration steps; a run has silenced it (engine.hush).
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


class Recorder(NullTracker):
    """Keeps what the loop logs: metrics by name as {step: value}, and parameters."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[int, float]] = {}
        self.settings: dict[str, Any] = {}

    def log(self, metrics: Any, step: int) -> None:
        for name, value in metrics.items():
            assert step not in self.metrics.setdefault(name, {}), f"{name} twice at step {step}"
            self.metrics[name][step] = value

    def parameters(self, values: Any) -> None:
        self.settings |= values


class Screen(Progress):
    """Keeps the lines that the loop says."""

    def __init__(self) -> None:
        super().__init__(0, enabled=False)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    warn = say


@pytest.fixture(scope="module")
def source() -> Source:
    return synthetic(train_images=320, test_images=100)


MakeRun = Callable[..., loop.Run]


@pytest.fixture
def make(source: Source) -> MakeRun:
    """`make(max_steps=5)` is a run ready to start; `world` is another place of this process."""

    def build(world: World = HERE, **settings: Any) -> loop.Run:
        config = Config().replace(**{**RESOLVED, **settings})
        micro = int(config.data.batch_size) // config.recipe.accumulation // world.size
        feeds = open_feeds(source, config.data, micro_batch=micro, eval_batch=16, seed=0, rank=world.rank, world_size=world.size, device=world.device)
        model = ConvNeXt(config.model, stack_size=2).initialise(0)
        engine, tracker, screen = TorchEngine(model, config, HERE), Recorder(), Screen()
        return loop.Run(config, world, model, engine, feeds, tracker, screen, Records(model, engine, config, tracker, screen))

    return build


def recorded(run: loop.Run) -> Recorder:
    assert isinstance(run.tracker, Recorder)
    return run.tracker


# ------------------------------------------------------------------------------------------------------------------ one step


class EventEngine:
    """An engine that notes what is asked of it, in order; `cost_s` of a made-up clock passes at each forward pass and step."""

    name = "events"

    def __init__(self) -> None:
        self.events: list[str] = []
        self.module: nn.Module = nn.Linear(1, 1)
        self.settings: dict[str, Any] = {}
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1.0)
        self.clock: FakeClock | None = None
        self.forward_s = self.step_s = 0.0

    def forward(self, images: Tensor, last: bool = True) -> Tensor:
        self.events.append(f"forward {len(images)}{' last' if last else ''}")
        if self.clock:
            self.clock.now += self.forward_s
        return torch.zeros(len(images), 10, requires_grad=True)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.events.append("backward last" if last else "backward")

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return None

    def step(self) -> None:
        self.events.append("step")
        if self.clock:
            self.clock.now += self.step_s


class FakeClock:
    """Stands for the module time in the loop."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield torch.zeros(4, 3, 32, 32), torch.arange(4)


def test_a_step_reads_the_gradients_between_the_last_backward_and_the_weights() -> None:
    engine = EventEngine()
    loop.train_step(engine, batches(), 3, HERE, lambda totals: engine.events.append(f"inspect {totals[2]:.0f} images"))
    assert engine.events == [
        "forward 4", "backward", "forward 4", "backward", "forward 4 last", "backward last", "inspect 12 images", "step",
    ]  # fmt: skip


def test_what_inspection_raises_keeps_the_step_from_the_weights(make: MakeRun) -> None:
    run = make()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}

    def refuse(totals: Tensor) -> None:
        raise NonFiniteError("no")

    with pytest.raises(NonFiniteError):
        loop.train_step(run.engine, loop.endless(run.feeds.train), 1, HERE, refuse)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_steps_sums_are_those_of_its_images(make: MakeRun, accumulation: int) -> None:
    """Against one forward pass over the same 16 images."""
    run, reference = make(accumulation=accumulation), make()
    found: list[list[float]] = []
    images, labels = next(reference.feeds.train.epoch(0))
    parts = zip(images.chunk(accumulation), labels.chunk(accumulation), strict=True)
    loop.train_step(run.engine, parts, accumulation, HERE, lambda totals: found.append(totals.tolist()))
    logits = reference.model(images)
    assert found[0][0] == pytest.approx(16 * cross_entropy(logits, labels).item(), rel=1e-6)
    assert found[0][1:] == [(logits.argmax(1) == labels).sum().item(), 16]


# ---------------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_counts_every_image_once(make: MakeRun) -> None:
    """Against the whole split in one batch; afterwards the network trains as before."""
    run = make(norm="batchnorm")
    for _ in range(3):
        loop.train_step(run.engine, loop.endless(run.feeds.train), 1, HERE, lambda totals: None)
    found = loop.evaluate(run.engine, run.feeds.test, HERE)
    assert run.model.training
    images, labels = (torch.cat(parts) for parts in zip(*run.feeds.test.epoch(), strict=True))
    run.model.eval()
    with torch.no_grad():
        logits = run.model(images)
    assert found["images"] == len(labels) == 100
    assert found["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-9)


@pytest.mark.parametrize(("images", "ranks"), [(100, 3), (2, 3), (33, 2), (16, 1), (17, 1)])
def test_all_ranks_run_equally_many_forward_passes(make: MakeRun, images: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 gathers weights in each: a rank without images passes a blank one, which does not count."""
    monkeypatch.setattr(World, "sum", lambda self, values: values)
    passes, counted = [], 0.0
    for rank in range(ranks):
        run = make(World(rank, ranks, rank, ranks, torch.device("cpu")), batch_size=6, eval_images=images)
        engine = EventEngine()
        counted += loop.evaluate(engine, run.feeds.test, run.world)["images"]
        passes.append(len(engine.events))
    assert counted == images
    assert len(set(passes)) == 1 and passes[0] == math.ceil(math.ceil(images / ranks) / 16)


# --------------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_the_learning_rate_is_torchs_schedule_to_the_last_step(make: MakeRun, schedule: str) -> None:
    run = make(max_steps=12, schedule=schedule, lr=0.01, eval_images=20)
    loop.Fit(run)()
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=0.01)
    torchs: dict[str, Any] = {
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=12),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    }
    reference = torchs[schedule]()
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    found = recorded(run).metrics["train/lr"]
    assert list(found) == list(range(1, 13))
    assert list(found.values()) == pytest.approx(expected, rel=1e-9)


def test_a_run_learns_and_records_it(make: MakeRun) -> None:
    run = make(max_steps=40, lr=0.01, eval_every=15)
    result = loop.Fit(run)()
    metrics = recorded(run).metrics
    losses = list(metrics["train/loss"].values())
    assert list(metrics["train/loss"]) == list(range(1, 41))
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert (result.steps, result.planned_steps, result.first_loss, result.loss) == (40, 40, losses[0], losses[-1])
    assert list(metrics["val/loss"]) == [15, 30, 40]
    assert list(metrics["test/accuracy"]) == [40]
    assert result.test["images"] == 100 and metrics["test/accuracy"][40] == result.test["accuracy"] > 0.2
    assert {1, 11, 21, 31} < set(metrics["grad/first_layer_mean_abs"])
    further = {"train/accuracy", "train/lr", "perf/step_s", "perf/images_per_s", "val/accuracy", "test/loss", "grad/first_layer_mean_abs_bias"}
    assert further <= set(metrics)
    assert recorded(run).settings == {"resolved_steps": 40, "resolved_eval_every": 15, "resolved_eval_images": 30 + 100}
    assert result.gradient == metrics["grad/first_layer_mean_abs"][40]


def test_the_first_layers_gradient_is_that_before_clipping(make: MakeRun) -> None:
    """Against autograd on the first batch."""
    run, reference = make(max_steps=1, clip=1e-3, eval_images=20), make()
    loop.Fit(run)()
    images, labels = next(reference.feeds.train.epoch(0))
    cross_entropy(reference.model(images), labels).backward()
    for name, parameter in (("", reference.model.stem.conv.weight), ("_bias", reference.model.stem.conv.bias)):
        assert parameter is not None and parameter.grad is not None
        assert recorded(run).metrics[f"grad/first_layer_mean_abs{name}"][1] == pytest.approx(parameter.grad.abs().mean().item(), rel=1e-6)


@pytest.mark.parametrize(("epochs", "accumulation", "steps"), [(1, 1, 18), (2, 1, 36), (2, 2, 18)])
def test_the_length_in_epochs(make: MakeRun, epochs: int, accumulation: int, steps: int) -> None:
    """290 training images; with accumulation a batch of 32 is two micro batches of 16."""
    run = make(epochs=epochs, accumulation=accumulation, batch_size=16 * accumulation, eval_images=20)
    assert loop.Fit(run)().steps == steps
    assert list(recorded(run).metrics["val/loss"]) == [steps // epochs * n for n in range(1, epochs + 1)]


def test_the_same_seed_gives_the_same_losses(make: MakeRun) -> None:
    runs = [make(max_steps=6, drop_path=0.5, eval_images=20) for _ in range(2)]
    for run in runs:
        torch.manual_seed(7)
        loop.Fit(run)()
    assert recorded(runs[0]).metrics["train/loss"] == recorded(runs[1]).metrics["train/loss"]


# --------------------------------------------------------------------------------------------------------------- time budget


class Clocked:
    """A run whose forward passes and steps take made-up time."""

    def __init__(self, run: loop.Run, monkeypatch: pytest.MonkeyPatch, forward_s: float, step_s: float) -> None:
        self.run, self.clock, self.engine = run, FakeClock(), EventEngine()
        self.engine.clock, self.engine.forward_s, self.engine.step_s = self.clock, forward_s, step_s
        run.engine = self.engine
        monkeypatch.setattr(loop, "time", self.clock)

    def fit(self) -> float:
        """Trains; the seconds it took."""
        begin = self.clock.now
        loop.Fit(self.run)()
        return self.clock.now - begin


def test_a_time_budget_is_filled_and_not_exceeded(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 1 s, of which 0.1 s is the forward pass that evaluation needs, too; validation after every epoch of 18 steps."""
    clocked = Clocked(make(time_budget=200.0), monkeypatch, forward_s=0.1, step_s=0.9)
    took = clocked.fit()
    assert 180 < took <= 200
    steps = recorded(clocked.run).settings["resolved_steps"]
    assert clocked.engine.events.count("step") == steps == len(recorded(clocked.run).metrics["train/loss"])
    assert recorded(clocked.run).settings["resolved_eval_images"] == 130
    rates = list(recorded(clocked.run).metrics["train/lr"].values())
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(sgd, 1e-3, total_steps=steps, cycle_momentum=False)
    expected = []
    for _ in range(steps):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        reference.step()
    assert rates[0] == pytest.approx(1e-3 / 25)
    assert rates[3:] == pytest.approx(expected[3:], rel=1e-9)  # the first three were measured before the length was known


def test_slow_evaluation_is_limited_and_said_so(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass of 16 images takes 100 s: 40 images per split are a quarter of the budget, and validation has 30."""
    monkeypatch.setattr(loop, "FEWEST_EVALUATED", 16)
    clocked = Clocked(make(time_budget=2000.0), monkeypatch, forward_s=100.0, step_s=1.0)
    clocked.fit()
    assert recorded(clocked.run).settings["resolved_eval_images"] == 30 + 40
    assert any("--eval-images" in line for line in clocked.run.progress.lines)  # type: ignore[attr-defined]
    by_hand = Clocked(make(time_budget=2000.0, eval_images=100), monkeypatch, forward_s=100.0, step_s=1.0)
    by_hand.fit()
    assert recorded(by_hand.run).settings["resolved_eval_images"] == 130
    assert not any("--eval-images" in line for line in by_hand.run.progress.lines)  # type: ignore[attr-defined]


def test_a_budget_too_short_for_anything_still_makes_a_step_more(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(make(time_budget=0.5), monkeypatch, forward_s=0.1, step_s=0.9)
    clocked.fit()
    assert recorded(clocked.run).settings["resolved_steps"] == loop.CALIBRATION_STEPS + 1


def test_a_budget_never_exceeds_the_epochs(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(make(time_budget=1e6, epochs=2), monkeypatch, forward_s=0.1, step_s=0.9)
    clocked.fit()
    assert recorded(clocked.run).settings["resolved_steps"] == loop.CALIBRATION_STEPS + 2 * 18


def test_fast_and_slow_ranks_ask_each_other_equally_often(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a rank to ask for less because its own clock says so, the others would wait for ever; all end with rank 0's numbers."""
    said: list[list[Any]] = []
    monkeypatch.setattr(World, "sum", lambda self, values: values)

    def agree(self: World, value: Any) -> Any:
        said[-1].append(value)
        return value if self.is_main else said[0][len(said[-1]) - 1]

    monkeypatch.setattr(World, "agree", agree)
    monkeypatch.setattr(loop, "FEWEST_EVALUATED", 16)
    settings = []
    for rank, forward_s in ((0, 100.0), (1, 0.001)):
        said.append([])
        run = make(World(rank, 2, rank, 2, torch.device("cpu")), time_budget=3000.0)
        clocked = Clocked(run, monkeypatch, forward_s, step_s=1.0)
        clocked.fit()
        settings.append(recorded(run).settings)
    assert len(said[0]) == len(said[1]) > 0
    assert settings[0] == settings[1]


# ---------------------------------------------------------------------------------------------------------------- non-finite


def test_a_loss_that_turns_non_finite_stops_the_run_before_it_reaches_the_weights(make: MakeRun) -> None:
    run = make(max_steps=20, lr=1e30, clip=0.0, schedule="constant")
    with pytest.raises(NonFiniteError) as stopped:
        loop.Fit(run)()
    steps = list(recorded(run).metrics["train/loss"])
    assert all(math.isfinite(loss) for loss in recorded(run).metrics["train/loss"].values())
    sentence = str(stopped.value)
    assert f"at step {steps[-1] + 1}; all weights are finite, and the first layer whose output is not is stem." in sentence
    assert "--lr" in sentence and "\n" not in sentence
    assert stopped.value.exit_code == 3


def test_a_validation_loss_that_is_not_finite_fails_the_run(make: MakeRun) -> None:
    """The last step's weights are seen by no further training loss."""
    run = make(max_steps=1, lr=1e30, clip=0.0, schedule="constant")
    with pytest.raises(NonFiniteError, match=r"validation loss became \w+ after step 1; the first layer whose output is not finite is stem\."):
        loop.Fit(run)()
