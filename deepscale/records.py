"""A run's gradient flow: recorded on its schedule, judged as it goes, told to the tracker, and kept as files beside the run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepscale.config import Config
from deepscale.engine import Engine
from deepscale.errors import UsageError
from deepscale.gradflow.flow import FILE, Floats, Flow
from deepscale.gradflow.health import HEALTHY, NEVER, NONFINITE, Thresholds, Verdict, depth_curve, scalars, verdict
from deepscale.gradflow.recorder import Recorder
from deepscale.gradflow.schedule import record_steps
from deepscale.models.network import Network
from deepscale.paths import relative_to_here
from deepscale.progress import Progress
from deepscale.tracking import Tracker, as_text

# Curves against depth, whose MLflow step is the layer: charts of several runs overlay them.
CURVES = {"output_gradient": "output_grad_l2", "weight_gradient": "mean_abs", "signal_std": "output_std"}
CURVE_POINTS = 300
STEPS_PER_SATURATION = 16  # counting saturated activations costs twice the rest of a record
PICTURE, PAGE = "gradflow.png", "gradflow.html"


def counts_saturation(counted: int, step: int, last: int) -> bool:
    """Whether the record of a step counts saturated activations, after `counted` that did: the first, the last, one in 16 steps."""
    return counted <= step // STEPS_PER_SATURATION or step == last


class Records:
    """The records of one run. Every rank must call every method in step with the others."""

    def __init__(self, model: Network, engine: Engine, settings: Config, tracker: Tracker, progress: Progress) -> None:
        tracking = settings.tracking
        self.recorder = Recorder(model, engine=engine)
        self.engine, self.every, self.tracker, self.progress = engine, tracking.record_every, tracker, progress
        dropping = settings.model.drop_path > 0 and settings.model.drop_path_mode == "batch"
        self.thresholds = Thresholds(tracking.vanishing_ratio, tracking.exploding_ratio, dead_layers=NEVER if dropping else 1)
        self.steps: tuple[int, ...] = ()
        self.current: int | None = None
        self.counted = 0  # records with saturation
        self.verdicts: list[tuple[int, Verdict]] = []
        self.length(None)

    def length(self, total: int | None) -> None:
        """Chooses the steps to record in a run of `total` steps, None while that is not known."""
        schedule = record_steps(total, self.every, self.recorder.capacity, self.recorder.steps)
        self.steps = schedule.steps
        if schedule.thinned:
            self.progress.warn(f"only {len(self.steps):,} of the steps that --record-every {self.every} asks for are recorded: the record is full")

    def state(self) -> tuple[dict[str, Any], Mapping[str, Floats]]:
        """(JSON, arrays): what `load` takes to go on in another process. The arrays are copies."""
        numbers, values = self.recorder.state()
        verdicts = [[step, found.label, found.sentence] for step, found in self.verdicts]
        return {"recorder": numbers, "steps": list(self.steps), "counted": self.counted, "verdicts": verdicts}, {"records": values}

    def load(self, state: Mapping[str, Any], arrays: Mapping[str, Floats]) -> None:
        """Takes over what an interrupted run has recorded, and its choice of steps."""
        self.recorder.load(state["recorder"], arrays["records"])
        self.steps, self.counted = tuple(state["steps"]), int(state["counted"])
        self.verdicts = [(step, Verdict(label, sentence)) for step, label, sentence in state["verdicts"]]

    def begin(self, step: int) -> None:
        """Before a step (from 1): watches it, if it is to be recorded."""
        self.current = step if step in self.steps else None
        if self.current:
            saturation = counts_saturation(self.counted, step, self.steps[-1])
            self.counted += saturation
            self.recorder.begin(step, saturation)

    def gradients(self) -> None:
        """When the step's gradients are complete."""
        if self.current:
            self.recorder.gradients()

    def finish(self) -> dict[str, float]:
        """After the step: a recorded one's numbers for the tracker; warns where the gradient's flow has turned bad."""
        if not self.current:
            return {}
        self.recorder.finish()
        flow, step = self.recorder.flow(), self.current
        self._judge(flow, step)
        for moment in [*(["first"] if len(flow.steps) == 1 else []), *([f"step_{step}"] if step >= 10 and math.log10(step).is_integer() else [])]:
            self._curves(flow, moment)
        return scalars(flow)

    def stopped(self, step: int) -> None:
        """Records a step whose loss is not finite, before its gradients are lost."""
        self.recorder.gradients(None if self.current else step)
        self._judge(self.recorder.flow(), step)

    def keep(self, folder: Path, name: str, settings: Mapping[str, Any]) -> dict[str, str]:
        """Writes the file, the heatmap and the page of the run, gives them to the tracker, and returns rows for the summary."""
        texts = {key: as_text(value) for key, value in settings.items()}
        flow = self.recorder.flow({"run_name": name, "settings": texts, "verdicts": [[step, found.label] for step, found in self.verdicts]})
        if not len(flow.steps):
            return {}
        self._curves(flow, "last")
        last = self.verdicts[-1][1] if self.verdicts else verdict(flow, thresholds=self.thresholds)
        self.tracker.tags({"gradient_verdict": last.label, "gradient_verdict_text": last.sentence, **self._earlier(last)})
        try:
            self.tracker.file(flow.save(folder / FILE))
            self._show(flow, folder, name, texts, last)
        except UsageError as error:  # at the end of a run nothing is worth losing its summary for
            self.progress.warn(f"the gradient flow is not all written: {error}")
        rows = {"gradients": last.sentence}
        return rows | ({"records": f"{len(flow.steps)}, see {relative_to_here(folder / PAGE)}"} if (folder / PAGE).is_file() else {})

    def _show(self, flow: Flow, folder: Path, name: str, settings: dict[str, str], last: Verdict) -> None:
        from deepscale.gradflow.figures import heatmap
        from deepscale.report.page import write_page
        from deepscale.report.run import ReportRun

        run = ReportRun(name, self.tracker.run_id or folder.name, settings, verdict=last.label, verdict_text=last.sentence, flow=flow)
        self.tracker.file(write_page([run], folder / PAGE, single_file=True))
        self.tracker.file(heatmap(flow, folder / PICTURE))

    def _judge(self, flow: Flow, step: int) -> None:
        found = verdict(flow, thresholds=self.thresholds)
        if found.label == NONFINITE and self.engine.loss_scale() > 1.0:
            return  # fp16's loss scale finds its limit by overflowing; the step is skipped
        before = self.verdicts[-1][1].label if self.verdicts else HEALTHY
        self.verdicts.append((step, found))
        if found.label != before:
            say = self.progress.say if found.label == HEALTHY else self.progress.warn
            say(f"gradient flow at step {step:,}: {found.sentence}")

    def _earlier(self, last: Verdict) -> dict[str, str]:
        """Other verdicts than the last, each with its steps."""
        steps: dict[str, list[int]] = {}
        for step, found in self.verdicts:
            steps.setdefault(found.label, []).append(step)
        others = [f"{label} at steps {at[0]:,} to {at[-1]:,}" for label, at in steps.items() if label != last.label]
        return {"gradient_verdict_earlier": "; ".join(others)} if others else {}

    def _curves(self, flow: Flow, moment: str) -> None:
        for name, field in CURVES.items():
            for layer, value in depth_curve(flow, -1, field, CURVE_POINTS):
                self.tracker.log({f"depth_{moment}/{name}": value}, layer)
