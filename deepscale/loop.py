"""The training loop: one step, evaluation, and the run of steps between them.

The length of a run with a time budget is fixed after `CALIBRATION_STEPS` training steps at the schedule's first learning
rate; from then on the schedule ends exactly at the last step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from deepscale import nonfinite
from deepscale.config import AUTO, Config
from deepscale.data import Feed, Feeds
from deepscale.engine import Engine
from deepscale.engine_pipeline import PipelineEngine
from deepscale.errors import NonFiniteError
from deepscale.evaluation import evaluate, sums
from deepscale.models.components import commit_running_statistics
from deepscale.models.convnext import cross_entropy
from deepscale.models.network import Network, first_layer
from deepscale.optim import build_schedule, start
from deepscale.progress import Progress
from deepscale.records import Records
from deepscale.saving import Saving, Wishes
from deepscale.stop import PATIENCE_S, Stop
from deepscale.tracking import Tracker
from deepscale.world import World

CALIBRATION_STEPS = 3
EVALUATION_SHARE = 0.25  # of a time budget, at most
MARGIN = 0.97  # of the time left is planned with
GRADIENT_EVERY = 10  # steps between records of the first layer's gradient, as in the original study
FEWEST_EVALUATED = 500
ADVICE = "Type a lower --lr, or --layerscale-init 0, or --precision fp32"

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass
class Result:
    """What a run came to. Accuracies are shares of 1, times seconds."""

    steps: int = 0
    planned_steps: int = 0
    first_loss: float = math.nan
    first_gradient: float = math.nan
    gradient: float = math.nan
    loss: float = math.nan
    step_s: float = math.nan
    images_per_s: float = math.nan
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Run:
    """What one training run works with."""

    config: Config
    world: World
    model: Network
    engine: Engine
    feeds: Feeds
    tracker: Tracker
    progress: Progress
    records: Records
    stop: Stop = field(default_factory=Stop)
    saving: Saving | None = None


def train_step(
    engine: Engine, batches: Batches, accumulation: int, world: World, inspect: Callable[[Tensor], None], wishes: Sequence[float] = ()
) -> None:
    """One optimiser step over `accumulation` micro batches.

    `inspect` is called when the gradients are complete, not yet clipped and not yet used, with the step's sums over all
    ranks: (loss times images, correct, images, *wishes), float64. What it raises keeps the step from the weights.
    """
    if isinstance(engine, PipelineEngine):
        world.doing("passes")
        totals = engine.passes(batches)
    else:
        totals = _passes(engine, batches, accumulation, world)
    world.doing("gradients")
    inspect(world.sum(torch.cat([totals, torch.tensor(wishes, dtype=torch.float64, device=world.device)]) if wishes else totals))
    world.doing("update")
    engine.step()
    commit_running_statistics(engine.module)


def _passes(engine: Engine, batches: Batches, accumulation: int, world: World) -> Tensor:
    """Forward and backward passes of a step's micro batches: this rank's (loss times images, correct, images)."""
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    for micro in range(accumulation):
        world.doing("data")
        images, labels = next(batches)
        last = micro + 1 == accumulation
        world.doing("forward pass")
        logits = engine.forward(images, last)
        loss = cross_entropy(logits, labels)
        world.doing("backward pass")
        engine.backward(loss, last)
        totals += sums(logits, loss, labels)
    return totals


def endless(feed: Feed, done: int = 0) -> Batches:
    """Training batches, epoch after epoch, after the first `done`."""
    epoch, start = divmod(done, feed.steps)
    while True:
        yield from feed.epoch(epoch, start)
        epoch, start = epoch + 1, 0


def remembered(batches: Batches, images: list[Tensor]) -> Batches:
    """The same batches, whose images are added to a list as they are taken."""
    for batch in batches:
        images.append(batch[0])
        yield batch


class Fit:
    """The steps of a run, from the first to the last."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.result = Result()
        self.epoch_steps = max(1, run.feeds.train.steps // run.config.recipe.accumulation)
        self.first = first_layer(run.model)
        self.step = 0
        self.begin = time.monotonic()
        self.warm_s, self.warm_steps, self.cold = 0.0, 0, True  # of all steps but the first of a process, which allocates
        self.validated = 0  # the last step that was
        self.eval_limit: int | None = None  # images of a split, where a time budget limits them
        if run.saving is not None:
            run.saving.state = self.state
        self.wishes = Wishes(run.stop, run.saving, run.world)

    def __call__(self) -> Result:
        """Trains to the end, evaluates, and returns what came out. Raises Interrupted where somebody asked for an earlier end."""
        run, recipe = self.run, self.run.config.recipe
        batches = endless(run.feeds.train, self.step * recipe.accumulation)
        every = self._evaluate_every()
        run.stop.defer(PATIENCE_S if run.saving is None else None)
        try:
            steps = self.result.planned_steps or self._length() or self._measured(batches)
            if not self.result.planned_steps:
                run.records.length(steps)
            run.progress.total_steps = self.result.planned_steps = steps
            evaluated = run.feeds.validation.images + run.feeds.test.images
            run.tracker.parameters({"resolved_steps": steps, "resolved_eval_every": every, "resolved_eval_images": evaluated})
            schedule = build_schedule(run.engine.optimizer, recipe, steps, self.epoch_steps)
            for _ in range(min(self.step, steps - 1)):
                schedule.step()
            while True:
                if every and self.step % every == 0 and self.validated < self.step < steps:
                    self._validate()
                self._save_if_due()
                if self.step >= steps:
                    break
                self._one(batches)
                if self.step < steps:
                    schedule.step()
        finally:
            batches.close()  # type: ignore[attr-defined]
        if self.validated < self.step:
            self._validate()
        self.result.test = evaluate(run.engine, run.feeds.test, run.world, between=self._between)
        run.tracker.log({f"test/{name}": value for name, value in self.result.test.items()}, self.step)
        self.result.seconds = time.monotonic() - self.begin
        return self.result

    def _measured(self, batches: Batches) -> int:
        """Steps that a time budget allows, after the first few."""
        start(self.run.engine.optimizer, self.run.config.recipe)
        for _ in range(max(1, CALIBRATION_STEPS - self.step)):
            self._one(batches)
            self._end_if_asked()
        return self._calibrated()

    def _length(self) -> int | None:
        """Steps of the run, or None where a time budget decides."""
        recipe = self.run.config.recipe
        if recipe.max_steps is not None:
            return recipe.max_steps
        return None if recipe.time_budget is not None else recipe.epochs * self.epoch_steps

    def _evaluate_every(self) -> int:
        """Steps between validations; 0 for the end only."""
        every = self.run.config.recipe.eval_every
        return every if every != AUTO else self.epoch_steps

    def _calibrated(self) -> int:
        """Steps that fit into the time budget beside the evaluation, agreed over ranks."""
        run = self.run
        budget = run.config.recipe.time_budget
        assert budget is not None
        begin = time.monotonic()
        one = evaluate(run.engine, run.feeds.validation, run.world, batches=1)
        image_s = run.world.agree((time.monotonic() - begin) / max(1.0, one["images"]))
        wanted = run.feeds.validation.images + run.feeds.test.images
        if run.config.data.eval_images == AUTO and wanted * image_s > EVALUATION_SHARE * budget:
            most = max(FEWEST_EVALUATED, int(EVALUATION_SHARE * budget / image_s / 2))
            run.feeds.limit_evaluation(most)
            self.eval_limit = most
            wanted = run.feeds.validation.images + run.feeds.test.images
            run.progress.warn(
                f"validation and test read the first {most:,} images each of their class-balanced order: all of them would take more than "
                f"{EVALUATION_SHARE:.0%} of the time budget (--eval-images to choose)"
            )
        step_s = self.result.step_s + run.feeds.validation.images * image_s / self._evaluate_every()
        left = budget - (time.monotonic() - self.begin) - wanted * image_s
        longest = run.config.recipe.epochs * self.epoch_steps
        steps = self.step + max(1, min(longest, int(MARGIN * left / step_s)))
        steps = run.world.agree(steps)
        run.progress.say(f"{steps:,} steps of {step_s:.2g} s fit into the time budget of {budget:.0f} s")
        return steps

    def _one(self, batches: Batches) -> None:
        """One step and what is recorded of it."""
        run, result = self.run, self.result
        begin = time.monotonic()
        lr = run.engine.optimizer.param_groups[0]["lr"]
        metrics: dict[str, float] = {}
        seen: list[Tensor] = []
        run.world.doing.step = self.step + 1
        run.records.begin(self.step + 1)
        accumulation, wishes = run.config.recipe.accumulation, self.wishes.own()
        train_step(run.engine, remembered(batches, seen), accumulation, run.world, lambda sums: self._inspect(sums, metrics, seen), wishes)
        metrics |= run.records.finish()
        took = time.monotonic() - begin
        self.step += 1
        if not self.cold:
            self.warm_s, self.warm_steps = self.warm_s + took, self.warm_steps + 1
        self.cold = False
        images = int(run.config.data.batch_size)
        result.steps, result.loss = self.step, metrics["train/loss"]
        result.gradient = metrics.get("grad/first_layer_mean_abs", result.gradient)
        if self.step == 1:
            result.first_loss, result.first_gradient = result.loss, result.gradient
        result.step_s = self.warm_s / self.warm_steps if self.warm_steps else took
        result.images_per_s = images / result.step_s
        metrics |= {"train/lr": lr, "perf/step_s": took, "perf/images_per_s": images / took}
        run.tracker.log(metrics, self.step)
        left = (result.planned_steps - self.step) * result.step_s if result.planned_steps else None
        run.progress.update(self.step, loss=result.loss, accuracy=metrics["train/accuracy"], images_per_s=images / took, remaining_s=left)

    def _inspect(self, totals: Tensor, metrics: dict[str, float], images: list[Tensor]) -> None:
        """Between backward and step: a loss that is not finite stops the run; gradients are recorded where they are to be.

        What is read is read at once: on a GPU each reading waits for it.
        """
        first = self._first_layer() if self.step % GRADIENT_EVERY == 0 else {}
        loss, correct, count, again, ctrl_c, due, *means = torch.stack([*totals, *first.values()]).tolist()
        self.wishes.take(again, ctrl_c, due)
        metrics |= {"train/loss": loss / count, "train/accuracy": correct / count} | dict(zip(first, means, strict=True))
        if not math.isfinite(loss):
            raise stopped_at_nonfinite(self.run, self.step + 1, loss, images)
        self.run.records.gradients()

    def _first_layer(self) -> dict[str, Tensor]:
        """Mean |g| of the first layer's weight and bias, float64 scalars, as the original study plots them."""
        gradients = {name: self.run.engine.gradient(parameter) for name, parameter in self.first.named_parameters(recurse=False)}
        return {
            "grad/first_layer_mean_abs" + ("_bias" if name == "bias" else ""): gradient.abs().mean().double()
            for name, gradient in gradients.items()
            if gradient is not None
        }

    def _validate(self) -> None:
        run = self.run
        self.result.validation = found = evaluate(run.engine, run.feeds.validation, run.world, between=self._between)
        run.tracker.log({f"val/{name}": value for name, value in found.items()}, self.step)
        if not math.isfinite(found["loss"]):
            images, _ = next(run.feeds.validation.epoch(), (run.feeds.validation.blank(), None))
            layer = nonfinite.first_output(run.model, run.engine, run.world, [images])
            where = f"; the first layer whose output is not finite is {layer}" if layer else ""
            raise NonFiniteError(f"the validation loss became {found['loss']} after step {self.step}{where}. {ADVICE}")
        run.progress.say(
            f"step {self.step:,}: validation loss {found['loss']:.4f}, accuracy {found['accuracy']:.1%} of {found['images']:,.0f} images"
        )
        self.validated = self.step
        if run.saving is not None and run.saving.validated(found["accuracy"]) and self.step < self.result.planned_steps:
            run.saving.save(self.step, found["accuracy"])

    def _between(self) -> None:
        """Between two batches of an evaluation, which may take long."""
        self.wishes.ask()
        self._end_if_asked()

    def _save_if_due(self) -> None:
        self.wishes.save_if_due(self.step)
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        accuracy = self.result.validation["accuracy"] if self.validated == self.step and self.result.validation else None
        self.wishes.end_if_asked(self.step, self.result.planned_steps, accuracy)

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """(JSON, arrays) of what `load` takes to go on after this step in another process; nothing of the network."""
        records, arrays = self.run.records.state()
        result = {name: value for name, value in asdict(self.result).items() if not isinstance(value, float) or math.isfinite(value)}
        own = {"validated": self.validated, "eval_limit": self.eval_limit, "warm_s": self.warm_s, "warm_steps": self.warm_steps}
        seconds = time.monotonic() - self.begin
        return {"loop": own | {"step": self.step, "seconds": seconds, "result": result}, "records": records}, dict(arrays)

    def load(self, progress: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Takes over where `state` was, before the first step here."""
        own = progress["loop"]
        self.step, self.validated, self.eval_limit = own["step"], own["validated"], own["eval_limit"]
        self.warm_s, self.warm_steps = own["warm_s"], own["warm_steps"]
        self.begin = time.monotonic() - own["seconds"]
        self.result = Result(**own["result"])
        if self.eval_limit is not None:
            self.run.feeds.limit_evaluation(self.eval_limit)
        self.run.records.load(progress["records"], arrays)


def stopped_at_nonfinite(run: Run, step: int, loss: float, images: list[Tensor]) -> NonFiniteError:
    """The error for a loss that turned non-finite, naming the step and the layer; `images` are the step's micro batches on this rank."""
    run.records.stopped(step)
    where = nonfinite.culprit(run.model, run.engine, run.world, images)
    return NonFiniteError(f"the loss became {loss} at step {step}; {where}. {ADVICE}")
