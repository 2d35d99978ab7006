"""Studies: real rows by the real command, resumed, damaged, refused; what a page says, against plain arithmetic."""

import dataclasses
import json
import math
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepscale import cli, config
from deepscale.errors import UsageError
from deepscale.studies import page, runner, stored, toy
from deepscale.studies.page import amount
from deepscale.studies.runner import FAILED, End, Runner, missing
from deepscale.studies.study import CPU, FULL, PREVIOUS, SCALES, SMOKE, STUDIES, Case, Finding, Measured, Phase, Results, Scale, Study, load
from deepscale.sweeps.programs import INTERRUPTED, REFUSED
from deepscale.sweeps.tags import FINISHED, NON_FINITE, OUT_OF_MEMORY

TINY = {
    "dataset": "synthetic", "feed": "tensors", "depth": "14", "width": "4", "patch_size": "4", "batch_size": "16", "eval_images": "40",
    "engine": "torch", "kernel": "torch", "device": "cpu", "max_steps": "4",
}  # fmt: skip


def computed(settings: Mapping[str, str], seed: int) -> Measured:
    return Measured({"val/accuracy": float(settings["from"]) + 0.1 * seed, "never": math.nan}, {"train/loss": [(1, 2.5), (2, math.inf)]})


def too_large(settings: Mapping[str, str], seed: int) -> Measured:
    raise MemoryError


def weights_of(folder: Path, settings: Mapping[str, str], seed: int) -> Measured:
    return Measured({"bytes": float((folder / "model.safetensors").stat().st_size)})


CASES = (
    Case("computed", {"from": "0.6"}, {"val/accuracy": 0.52}, compute=computed),
    Case("too large", compute=too_large),
    Case("trained", published={"val/accuracy": 0.9, "train/loss": 1.25}, after=weights_of),
    Case("in two phases", phases=(Phase("first", {"max_steps": "2"}), Phase("second", {"depth": "26"}))),
    Case("diverges", {"lr": "1e30", "clip": "0"}),
    Case("refused", {"dataset": "cifar10", "data_dir": "nothing-here", "download": "false"}),
)
STUDY = Study(
    name="toy", title="A title", question="A question?", source="a source", cases=CASES, scales=dict.fromkeys(SCALES, Scale(TINY)),
    columns={"val/accuracy": "validation", "train/loss": "training loss", "bytes": "bytes of weights"},
    findings=(
        Finding("The computed one converges.", lambda found: found.converged("computed"), lambda found: f"it is {found.mean('computed')}"),
        Finding("The large one converges.", lambda found: found.converged("too large"), page.accuracies("too large")),
        Finding("The trained one converges.", lambda found: found.converged("trained"), page.accuracies("trained")),
    ),
    profiles=("mean_abs", "output_grad_l2"),
)  # fmt: skip


def run(study: Study, folder: Path, files: Path, **options: Any) -> list[End]:
    return Runner(missing(study, CPU, stored.read(study, CPU, files), folder, files, **options), 2, print)()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, End]]]:
    """Every kind of row, run once: (folder of the files, how each has ended)."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder / "rows", {end.job.case.name: end for end in run(STUDY, folder / "work", folder / "rows")}


def test_every_row_ends_as_it_should(rows: tuple[Path, dict[str, End]]) -> None:
    _, ends = rows
    assert {name: end.outcome for name, end in ends.items()} == {
        "computed": FINISHED, "too large": OUT_OF_MEMORY, "trained": FINISHED, "in two phases": FINISHED, "diverges": NON_FINITE, "refused": REFUSED,
    }  # fmt: skip
    assert "nothing-here" in ends["refused"].text


def test_rows_are_files_that_hold_what_was_trained(rows: tuple[Path, dict[str, End]]) -> None:
    folder, ends = rows
    found = {content["case"]: content for path in folder.glob("*.json") if (content := json.loads(path.read_text()))}
    assert set(found) == {name for name, end in ends.items() if end.outcome != REFUSED}
    trained = found["trained"]
    assert (trained["study"], trained["scale"], trained["seed"], trained["outcome"], trained["converged"]) == ("toy", CPU, 0, FINISHED, False)
    assert trained["typed"] == TINY
    assert trained["settings"]["width"] == "4"
    assert [step for step, _ in trained["curves"]["train/loss"]] == [1, 2, 3, 4]
    assert trained["numbers"]["parameters"] == int(trained["settings"]["parameters"])
    assert trained["numbers"]["bytes"] > 4 * trained["numbers"]["parameters"]
    assert set(trained["profiles"]) == {"mean_abs", "output_grad_l2"}
    assert trained["profiles"]["mean_abs"]["1"][-1][0] == 14  # the head
    assert trained["hardware"]["cores"] >= 1
    assert re.fullmatch("[0-9a-f]{40}", trained["commit"] or "0" * 40)
    assert str(Path.home()) not in json.dumps(found) or Path.home() == Path("/")
    assert found["computed"]["numbers"] == {"perf/seconds": found["computed"]["numbers"]["perf/seconds"], "val/accuracy": 0.6, "never": None}
    assert found["computed"]["curves"]["train/loss"] == [[1, 2.5], [2, None]]
    assert (found["diverges"]["converged"], found["too large"]["converged"]) == (False, None)


def test_phases_follow_one_another(rows: tuple[Path, dict[str, End]]) -> None:
    folder, ends = rows
    row = json.loads((folder / "cpu_in_two_phases_seed=0.json").read_text())
    assert [step for step, _ in row["curves"]["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert row["settings"]["built_depth"] == "26"  # the last one's
    assert row["numbers"]["first: val/accuracy"] is not None
    job = ends["in two phases"].job
    later = dataclasses.replace(job, phases=(job.phases[0], Phase("second", {"checkpoint_dir": PREVIOUS})))
    assert str(job.place(job.phases[0])) in later.arguments(1)


def test_runs_are_in_mlflow_by_study_case_and_seed(rows: tuple[Path, dict[str, End]]) -> None:
    from deepscale.tracking_read import Reader

    runs = Reader(f"sqlite:///{rows[0].parent / 'mlflow.db'}").runs("study-toy")
    told = {(run.data.tags["case"], run.data.tags["seed"], run.data.tags["outcome"]) for run in runs}
    assert {("computed", "0", "finished"), ("trained", "0", "finished"), ("diverges", "0", "non_finite")} <= told


def test_what_is_done_is_not_run_again_and_what_has_failed_is(rows: tuple[Path, dict[str, End]]) -> None:
    jobs = missing(STUDY, CPU, stored.read(STUDY, CPU, rows[0]), rows[0].parent / "work", rows[0])
    assert [job.case.name for job in jobs] == ["refused"]
    jobs = missing(STUDY, CPU, stored.read(STUDY, CPU, rows[0]), rows[0].parent / "work", rows[0], seeds=(0, 1), only="trained")
    assert [(job.case.name, job.key.seed) for job in jobs] == [("trained", 1)]


def test_the_page_says_what_the_rows_hold(rows: tuple[Path, dict[str, End]], tmp_path: Path) -> None:
    found = stored.read(STUDY, CPU, rows[0])
    text = page.write(found, tmp_path / "pages", rows[0]).read_text()
    head, *lines = page.table(found)
    by_case = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert (by_case["computed"]["validation"], by_case["computed"]["published validation"], by_case["computed"]["converged"]) == (
        "60.00 %", "52.00 %", "yes",
    )  # fmt: skip
    assert by_case["trained"]["published training loss"] == "1.2500"
    assert by_case["too large"]["not finished"] == "1 out of memory"
    assert (by_case["too large"]["converged"], by_case["diverges"]["converged"]) == ("–", "no")
    answers = {line[0]: line[1:] for line in page.findings(found)}
    assert answers["The computed one converges."] == ["holds", "it is 0.6"]
    assert answers["The large one converges."][0] == "not tested at this scale"
    assert answers["The trained one converges."][0] == "does not hold"
    for said in ("# A title", "A question?", "a source", "deepscale study toy --out docs/studies", "52.00 %", "not tested at this scale"):
        assert said in text


def test_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, cases=CASES[:1], scales={CPU: Scale(seeds=(0, 1, 2))})
    for seed in range(3):
        content = {"study": "toy", "scale": CPU, "case": "computed", "typed": {"from": "0.6"}, "seed": seed, "outcome": FINISHED, "curves": {}}
        content |= {"settings": {}, "numbers": {"val/accuracy": 0.4 + 0.1 * seed**2}}
        (tmp_path / f"{seed}.json").write_text(json.dumps(content))
    group = stored.read(study, CPU, tmp_path)["computed"]
    values = [0.4, 0.5, 0.8]
    assert group.mean("val/accuracy") == pytest.approx(statistics.fmean(values))
    assert group.deviation("val/accuracy") == pytest.approx(float(np.std(values, ddof=1)))
    assert group.converged() == (1, 3)  # 0.5 is not above 50 %
    assert page.mean(group, "val/accuracy") == "56.67 ± 20.82 %"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda row: "{", "is damaged"),
        (lambda row: "[]", "is no row of a study"),
        (lambda row: json.dumps({**row, "numbers": []}), "is no row of a study: numbers is of another kind"),
        (lambda row: json.dumps({**row, "study": "vgg"}), "is no row of the study toy: it says study 'vgg'"),
        (lambda row: json.dumps({**row, "case": "gone"}), "is of the case 'gone'"),
        (lambda row: json.dumps({**row, "typed": {**TINY, "max_steps": "5"}}), "was made with max_steps 5, and the study has max_steps 4 now"),
    ],
)
def test_a_damaged_or_foreign_file_gives_a_sentence(
    change: Callable[[dict[str, Any]], str], sentence: str, rows: tuple[Path, dict[str, End]], tmp_path: Path
) -> None:
    path = tmp_path / "row.json"
    path.write_text(change(json.loads((rows[0] / "cpu_trained_seed=0.json").read_text())))
    with pytest.raises(UsageError, match=f"row.json {re.escape(sentence)}"):
        stored.read(STUDY, CPU, tmp_path)
    path.write_text(json.dumps({**json.loads((rows[0] / "cpu_trained_seed=0.json").read_text()), "typed": {**TINY, "width": "04"}}))
    assert len(stored.read(STUDY, CPU, tmp_path).rows) == 1  # the same setting typed in another way


def test_a_row_that_was_interrupted_goes_on(in_tmp_path: Path) -> None:
    """Asked to end once a checkpoint is there; the next start goes on from it, to the same end as without."""
    long = Study(
        name="depth", title="", question="", source="", columns={"val/accuracy": ""}, cases=(Case("long"),),
        scales={CPU: Scale({**TINY, "max_steps": "80", "checkpoint_every": "5steps"})},
    )  # fmt: skip
    folder, files = in_tmp_path / "work", in_tmp_path / "rows"
    jobs = missing(long, CPU, stored.read(long, CPU, files), folder, files)
    first = Runner(jobs, 1, print)

    def ask() -> None:
        while not any(jobs[0].place(jobs[0].phases[0]).glob("step-*")):
            time.sleep(0.01)
        first._heard(15, None)

    threading.Thread(target=ask, daemon=True).start()
    assert [end.outcome for end in first()] == [INTERRUPTED]
    assert not files.exists()
    assert [end.outcome for end in run(long, folder, files)] == [FINISHED]
    assert "going on after step" in jobs[0].output.read_text()
    row = json.loads(jobs[0].file.read_text())
    assert [row["curves"]["train/loss"][-1][0], row["steps"]] == [80, 80]
    assert not any(jobs[0].place(jobs[0].phases[0]).glob("step-*"))  # only the weights are kept
    assert (jobs[0].place(jobs[0].phases[0]) / "model.safetensors").is_file()


def test_a_half_finished_folder_of_other_settings_is_refused(in_tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, cases=(Case("broken"),))
    place = in_tmp_path / "work" / "toy" / "cpu_broken_seed=0" / "checkpoints" / "step-00000002"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{")
    (end,) = run(study, in_tmp_path / "work", in_tmp_path / "rows")
    assert end.outcome in (FINISHED, REFUSED)  # the training says what it thinks of it: a damaged checkpoint is none
    assert "step-00000002" in end.job.output.read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_whole(name: str, tmp_path: Path) -> None:
    study = load(name)
    assert study.name == name
    assert study.title and study.question and study.source
    assert {SMOKE, CPU, FULL} == set(study.scales)
    for scale in SCALES:
        cases = study.of_scale(scale)
        assert cases
        assert len({stored.Key(name, scale, case.name, 0).name for case in cases}) == len(cases)
        assert set(study.scale(scale).changes) | set(study.scale(scale).once) <= {case.name for case in study.cases}
        nothing = Results(study, scale, {})
        missing(study, scale, nothing, tmp_path, tmp_path)  # parses the settings of every row as train.py does
        assert [finding.holds(nothing) for finding in study.findings] == [None] * len(study.findings)
        assert all(isinstance(finding.measured(nothing), str) for finding in study.findings if finding.measured)
        assert not any(figure.draw(nothing, tmp_path / "figure.png") for figure in study.figures)
    assert "published" in " ".join(page.table(Results(study, CPU, {}))[0]) or not any(case.published for case in study.of_scale(CPU))


def test_the_toy_network_s_gradients_against_plain_arithmetic() -> None:
    norms, losses, before = toy.train({"activation": "sigmoid", "x": "1", "steps": "2"}, 7)
    torch.manual_seed(7)
    layers = [torch.nn.Linear(a, b) for a, b in zip(toy.SIZES, toy.SIZES[1:], strict=False)]
    weights = [layer.weight.detach().double().numpy() for layer in layers]
    biases = [layer.bias.detach().double().numpy() for layer in layers]
    for step in range(2):
        outputs, sums = [np.array([1.0])], []
        for weight, bias in zip(weights, biases, strict=True):
            sums.append(weight @ outputs[-1] + bias)
            outputs.append(1 / (1 + np.exp(-sums[-1])))
        back = 2 * outputs[-1]  # of (y - 0)^2
        assert losses[step] == pytest.approx(float(outputs[-1][0] ** 2), rel=1e-5)
        for i in reversed(range(5)):
            back = back * outputs[i + 1] * (1 - outputs[i + 1])
            gradient = np.outer(back, outputs[i])
            assert norms[step][i] == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-4)
            back, bias_gradient = weights[i].T @ back, back
            weights[i], biases[i] = weights[i] - toy.LR * gradient, biases[i] - toy.LR * bias_gradient
        if step == 0:
            assert before == pytest.approx(sums[0].tolist(), rel=1e-5)


def test_toy_s_smoke_row_by_the_command(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["study", "toy", "--scale", "smoke", "--only", toy.SIGMOID, "--concurrent", "1"]
    cli.main(arguments)
    assert "1 rows to run" in capsys.readouterr().out
    text = (in_tmp_path / "studies" / "toy" / "toy-smoke.md").read_text()
    assert "8.44e7 times" in text and "3.46e-5" in text
    assert (in_tmp_path / "studies" / "toy" / "toy-smoke-norms.png").stat().st_size > 10_000
    cli.main(arguments)
    assert "to run" not in capsys.readouterr().out
    row = json.loads(next((in_tmp_path / "studies" / "smoke" / "toy").glob("*.json")).read_text())
    ratios = [math.inf if value is None else value for _, value in row["curves"]["FC5/FC1"]]
    assert row["numbers"]["FC5/FC1 median"] == pytest.approx(sorted(ratios)[round((len(ratios) - 1) / 2)], rel=1e-5)
    next((in_tmp_path / "studies" / "smoke" / "toy").glob("*.json")).write_text("{")
    assert sentence(capsys, arguments).count("is damaged") == 1


def test_components_are_read_from_the_sweep(tmp_path: Path) -> None:
    found = stored.read(load("components"), CPU, tmp_path)
    assert len(found.rows) == 48
    rows = [json.loads(path.read_text()) for path in (stored.results_folder() / "components-110").glob("*.json")]
    own = [row["numbers"]["val/accuracy"] for row in rows if row["varied"] == {"activation": "tanh", "norm": "none", "skip": "identity"}]
    assert found["tanh, no norm, skip"].mean("val/accuracy") == pytest.approx(statistics.fmean(own))
    answers = {line[0]: line[1] for line in page.findings(found)}
    assert [answer for said, answer in answers.items() if said.startswith("Without skip connections nothing trains")] == ["holds"]
    assert [answer for said, answer in answers.items() if said.startswith("sigmoid with LayerNorm")] == ["does not hold"]


def test_limit_reads_what_bench_depth_has_measured() -> None:
    from deepscale.studies import limit

    bench = json.loads((stored.results_folder() / "bench" / "depth.json").read_text())
    for record in bench["records"]:
        numbers = limit.measured(bench, record["policy"]).numbers
        assert f"{numbers[limit.LAYERS]:,}" == record["deepest that trained, layers"]
        assert numbers["peak, GiB"] == pytest.approx(record["peak, GiB"])
    with pytest.raises(UsageError, match="tried no policy offload"):
        limit.measured(bench, "offload")


def sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """What a command that is refused says on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert said.startswith("deepscale: ")
    return said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "the study 'nothing' is not known; possible: toy, depth,"),
        (["depth", "--only", "3 layers"], "study depth's case '3 layers' is not known; possible: 26 layers,"),
        (["depth", "--lr", "1"], "--lr is the study's to say"),
        (["depth", "--scale", "large"], "invalid choice: 'large'"),
        (["depth", "--seeds", "1,x"], "'1,x' is no list of seeds"),
        (["depth", "--page", "--rows", "."], "depth holds no rows of cpu scale; leave --page out to run them"),
        (["layerscale", "--rows", "."], "layerscale-110 holds no rows yet: .* type python tune/sweep.py tune/spaces/layerscale.yaml"),
    ],
)
def test_bad_input_gives_a_sentence(arguments: list[str], said: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(said, sentence(capsys, ["study", *arguments]))
    assert not list(in_tmp_path.iterdir())


def test_a_missing_data_set_gives_a_sentence_once(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first row is refused, and the others, which would be too, are not tried."""
    said = sentence(
        capsys, ["study", "depth", "--rows", "rows", "--seeds", "0,1", "--concurrent", "1", "--data-dir", "nothing-here", "--no-download"]
    )
    assert said.count("nothing-here") == 1
    assert not Path("rows").exists()


def test_full_scale_says_what_it_costs_and_asks(in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepscale.sweeps.preview.measure_step_s", lambda *_, **__: 2.0)
    arguments = ["study", "depth", "--scale", "full", "--only", "26 layers", "--rows", "rows", "--seeds", "0"]
    assert "type deepscale study depth --scale full --yes to start it" in sentence(capsys, arguments)
    cli.main([*arguments, "--dry-run"])
    out = capsys.readouterr().out
    assert re.search(r"26 layers +\| +0 \| +70,300 \| +[0-9.]+ GiB \| +1 d ", out)
    assert not list(in_tmp_path.iterdir())


def test_the_list_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["study", "list"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in STUDIES)


def test_a_study_says_nothing_that_train_py_refuses() -> None:
    study = dataclasses.replace(STUDY, cases=(Case("wrong", {"width": "-3"}),))
    with pytest.raises(UsageError, match=r"study toy, cpu wrong seed=0: argument --width"):
        missing(study, CPU, Results(study, CPU, {}), Path("work"), Path("rows"))
    study = dataclasses.replace(STUDY, cases=(Case("wrong", {"colour": "blue"}),))
    with pytest.raises(UsageError, match="study toy, cpu wrong seed=0: setting 'colour' is not known"):
        missing(study, CPU, Results(study, CPU, {}), Path("work"), Path("rows"))


def test_a_row_elsewhere_is_left_alone(in_tmp_path: Path) -> None:
    from filelock import FileLock

    study = dataclasses.replace(STUDY, cases=CASES[:1])
    place = in_tmp_path / "work" / "toy" / "cpu_computed_seed=0"
    place.mkdir(parents=True)
    with FileLock(place / "lock"):
        (end,) = run(study, in_tmp_path / "work", in_tmp_path / "rows")
    assert (end.outcome, FAILED) == (runner.ELSEWHERE, "failed")


def test_amounts() -> None:
    assert [amount(value) for value in (338500, 0.08712, 1.652e14, 3.46e-9, 0.0, math.inf, 123.4)] == [
        "338,500", "0.0871", "1.65e14", "3.46e-9", "0", "infinite", "123",
    ]  # fmt: skip


def test_settings_of_a_study_are_typed_as_on_the_command_line() -> None:
    own = Study(
        name="depth", title="", question="", source="", columns={}, cases=(Case("a", {"depth": "26"}),),
        scales={CPU: Scale({"depth": "110", "lr": "1"}, changes={"a": {"lr": "0.5"}})},
    )  # fmt: skip
    assert own.settings(CPU, own.case("a")) == {"depth": "26", "lr": "0.5"}
    (job,) = missing(own, CPU, Results(own, CPU, {}), Path("work"), Path("rows"))
    assert config.parse(job.arguments(0)).recipe.lr == 0.5
