"""The runs of a report: from MLflow by experiment, name or id, and from `gradflow.npz` files.

A run that is named must have a record that can be read; one of a whole experiment without such a record stands in the table, and a
warning says why.
"""

from collections.abc import Sequence
from pathlib import Path

from deepscale.errors import UsageError
from deepscale.gradflow.flow import FILE, read
from deepscale.gradflow.health import verdict
from deepscale.report.run import ReportRun, numbers_in
from deepscale.tracking_read import MlflowRun, Reader, why_no_record

# What MLflow's runs call the numbers of the report: last values of metrics.
FROM_METRICS = {
    "validation_accuracy": "val/accuracy",
    "test_accuracy": "test/accuracy",
    "validation_loss": "val/loss",
    "training_loss": "train/loss",
    "peak_memory_bytes": "perf/peak_memory_over_start_bytes",
}
STEP_S, FIRST_LAYER = "perf/step_s", "grad/first_layer_mean_abs"
KIND, SUMMARY = "kind", "summary"  # the tag of a run that trained nothing: it sums a sweep up
VERDICT, VERDICT_TEXT, OUTCOME = "gradient_verdict", "gradient_verdict_text", "outcome"


def named(names: Sequence[str], experiment: str | None) -> list[ReportRun]:
    """These runs: gradflow.npz files, folders of one, names or ids in MLflow. Raises UsageError where one has no record."""
    runs, reader = [], None
    for name in dict.fromkeys(names):
        path = Path(name)
        if path.suffix == ".npz" or path.is_file() or (path / FILE).is_file():
            runs.append(from_file(path / FILE if path.is_dir() else path))
            continue
        try:
            reader = reader or Reader()
            found = reader.run(name, experiment)
        except UsageError as error:
            if path.is_dir():
                raise UsageError(f"the folder {name} has no {FILE}; give a run's folder, its {FILE}, or its name in MLflow") from error
            raise
        run = from_mlflow(reader, found)
        if not run.has_record:
            raise UsageError(f"run {name!r} has no {FILE}: {run.problem}")
        run.load()  # a broken one is said now
        runs.append(run)
    return runs


def of_experiment(experiment: str) -> tuple[list[ReportRun], list[str]]:
    """The runs of an experiment, newest first, and a sentence for those without a record."""
    reader = Reader()
    found = [run for run in reader.runs(experiment) if run.data.tags.get(KIND) != SUMMARY]
    if not found:
        raise UsageError(f"the experiment {experiment!r} has no run; train one: deepspeed deepscale/train.py --experiment {experiment}")
    runs = [from_mlflow(reader, run) for run in found]
    missing: dict[str, list[str]] = {}
    for run in runs:
        if not run.has_record:
            missing.setdefault(run.problem, []).append(run.name)
    return runs, [
        f"no record of {len(names):,} of {len(runs):,} runs ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}): {why}"
        for why, names in missing.items()
    ]


def from_file(path: Path) -> ReportRun:
    """A run that is nothing but its record. Raises UsageError where it cannot be read."""
    flow = read(path)
    settings = flow.meta.get("settings", {})
    texts: dict[str, str] = {name: str(value) for name, value in settings.items()} if isinstance(settings, dict) else {}
    folder = path.absolute().parent.name
    name = str(flow.meta.get("run_name") or (folder if path.name == FILE else path.stem))
    judged = verdict(flow)
    return ReportRun(name, f"{folder}-{path.stem}", texts, {}, judged.label, judged.sentence, record=path)


def from_mlflow(reader: Reader, run: MlflowRun) -> ReportRun:
    """A run as MLflow has it so far."""
    tags, numbers = run.data.tags, numbers_in(run.data.metrics, FROM_METRICS)
    step_s = reader.median(run, STEP_S)
    record = reader.artifact(run, FILE)
    return ReportRun(
        name=run.info.run_name,
        id=run.info.run_id,
        settings=dict(run.data.params),
        numbers=numbers if step_s is None else numbers | {"step_s": step_s},
        verdict=tags.get(VERDICT, ""),
        verdict_text=tags.get(VERDICT_TEXT, ""),
        record=record,
        # The record holds the first layer at every recorded step; only where there is none yet is it read from the metrics.
        curves={} if record else {"first_layer": [(float(step), value) for step, value in reader.history(run, FIRST_LAYER)]},
        status=tags.get(OUTCOME, run.info.status).replace("_", " "),
        started_s=run.info.start_time / 1000,
        problem="" if record else why_no_record(run),
    )
