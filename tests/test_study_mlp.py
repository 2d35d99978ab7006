"""Study 3 as data: each case is the setting that ../shared describes, typed; what its findings make of rows."""

from pathlib import Path
from typing import Any

import pytest

from deepscale.config import differing, flat, parse
from deepscale.studies import mlp
from deepscale.studies.runner import missing
from deepscale.studies.study import CPU, FULL, SMOKE, Group, Results, Row

BASE: dict[str, Any] = {
    "model": "mlp", "optimizer": "sgd", "lr": 0.01, "weight_decay": 0.0, "schedule": "constant", "clip": 0.0, "batch_size": 512, "augment": False,
    "epochs": 100, "depth": 8, "width": 128, "momentum": 0.0, "init": "torch", "dataset": "fashionmnist", "image_size": 28,
}  # fmt: skip
SMALL = {"init": "normal", "init_std": 0.05}
# What differs from the baseline, as the original states it.
EXPECTED: dict[str, list[dict[str, Any]]] = {
    "baseline": [{}],
    "1 weights of deviation 1": [{"init": "normal", "init_std": 1.0}],
    "1 weights of deviation 10": [{"init": "normal", "init_std": 10.0}],
    "2 ReLU": [{**SMALL, "activation": "relu", "lr": 1e-3}],
    "3 Adam": [{"optimizer": "adam", "lr": 1e-3}],
    "4a BatchNorm and Adam": [{**SMALL, "norm": "batchnorm", "optimizer": "adam", "lr": 1e-3}],
    "4b norm of the whole tensor": [{**SMALL, "norm": "tensornorm"}],
    "5 skip connections": [{**SMALL, "skip_pairs": "1-3,4-7"}],
    "6 layer by layer": [
        {**SMALL, "depth": 3},
        {**SMALL, "depth": 5, "init_layers": 2, "freeze": 2}, {**SMALL, "depth": 5},
        {**SMALL, "depth": 7, "init_layers": 4, "freeze": 4}, {**SMALL, "depth": 7},
        {**SMALL, "init_layers": 6, "freeze": 6}, SMALL,
    ],
    "7 normalised gradient": [{**SMALL, "gradient_normalisation": True, "lr": 1e-3}],
}  # fmt: skip
OF_THE_RUNNER = {
    "seed", "experiment", "run_name", "tags", "checkpoint_dir", "checkpoint_every", "resume", "keep", "threads", "feed", "init_from",
}  # fmt: skip


def test_every_case_is_typed_as_the_original_states_it(tmp_path: Path) -> None:
    jobs = missing(mlp.STUDY, FULL, Results(mlp.STUDY, FULL, {}), tmp_path, tmp_path, seeds=(42,))
    assert [job.case.name for job in jobs] == list(EXPECTED)
    for job in jobs:
        assert len(job.phases) == len(EXPECTED[job.case.name])
        for i, expected in enumerate(EXPECTED[job.case.name]):
            typed = parse(job.arguments(i))
            chosen, values = {**BASE, **expected}, flat(typed)
            assert {name: values[name] for name in chosen} == chosen, (job.case.name, i)
            assert differing(typed).keys() <= chosen.keys() | OF_THE_RUNNER, (job.case.name, i)
            before = str(job.place(job.phases[i - 1]) / "model.safetensors") if i else None
            assert typed.checkpoint.init_from == before


def test_every_scale_can_be_typed(tmp_path: Path) -> None:
    for scale, rows in ((SMOKE, 10), (CPU, 30), (FULL, 30)):
        assert len(missing(mlp.STUDY, scale, Results(mlp.STUDY, scale, {}), tmp_path, tmp_path)) == rows


def results(**accuracies: float) -> Results:
    """Rows with such validation accuracies and a gradient that falls by half at every layer."""
    groups = {}
    profiles = {"mean_abs": {"1": [(layer, 2.0**layer) for layer in range(1, 9)], "90": [(1, 5.0), (7, 5.0), (8, 5.0)]}}
    for case in mlp.STUDY.cases:
        value = accuracies.get(case.name.split()[0], accuracies["others"])
        row = Row(case.name, 0, "finished", {"val/accuracy": value}, profiles=profiles)
        groups[case.name] = Group(case, (row,), mlp.STUDY.converged)
    return Results(mlp.STUDY, CPU, groups)


def test_findings_say_what_trains() -> None:
    found = results(baseline=0.11, others=0.4, **{"5": 0.1})
    answers = [finding.holds(found) for finding in mlp.STUDY.findings]
    remedies = [True] * 9
    remedies[6] = False
    assert answers == [True, False, *remedies, False]  # half at every layer: 1/64 from the last hidden layer to the first
    assert mlp.ratio(found, "baseline") == pytest.approx(2.0**-6)
    assert mlp.STUDY.findings[0].measured is not None and "11.0%" in mlp.STUDY.findings[0].measured(found)
    nothing = Results(mlp.STUDY, CPU, {})
    assert all(finding.holds(nothing) is None and not (finding.measured and finding.measured(nothing)) for finding in mlp.STUDY.findings)
    better = results(baseline=0.3, others=0.4)
    assert [mlp.STUDY.findings[i].holds(better) for i in (0, -1)] == [False, True]
