"""`deepscale evaluate` and `deepscale export` on what a run has left: the run's own accuracy, and weights that the plain network loads."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepscale import checkpoints
from deepscale.cli import main
from deepscale.config import Config
from deepscale.models.reference import PlainConvNeXt
from deepscale.studies import used
from deepscale.train import main as train

SETTINGS: dict[str, Any] = {"depth": 26, "width": 4, "patch_size": 4, "batch_size": 16, "dataset": "synthetic", "layerscale_init": 0.1}
TYPED = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
RUN = ["--max-steps", "6", "--eval-every", "2", "--eval-images", "100", "--checkpoint-every", "2steps", "--checkpoint-dir", "weights", "--keep", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    """A run with checkpoints of steps 2, 4 and 6; tests work in its folder."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(empty_store, folder / "mlflow.db")
    with chdir(folder):
        train([*TYPED, *RUN, "--engine", "torch", "--feed", "tensors", "--threads", "1", "--lr", "0.01"])
        yield folder


@pytest.fixture(autouse=True)
def _signals(signals_as_before: None) -> None:
    pass


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["evaluate", *arguments, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def recorded(folder: Path, split: str, step: int) -> dict[str, float]:
    """What the run told MLflow."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        rows = database.execute("SELECT key, value FROM metrics WHERE step = ? AND key LIKE ?", (step, f"{split}/%")).fetchall()
    return {key.split("/")[1]: value for key, value in rows}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_every_checkpoint_has_the_accuracy_that_the_run_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = set()
    for step in (2, 4, 6):
        found = evaluated(capsys, f"weights/step-{step:08d}", "--split", "validation")
        said = recorded(folder, "val", step)
        assert (found["step"], found["split"], found["images"]) == (step, "validation", 100)
        assert found["accuracy"] == said["accuracy"] and found["loss"] == pytest.approx(said["loss"], rel=1e-6)
        losses.add(found["loss"])
    assert len(losses) == 3
    said = recorded(folder, "test", 6)
    for path in ("weights", "weights/model.safetensors"):  # the newest, and the file of the run's end
        found = evaluated(capsys, path)
        assert found["accuracy"] == said["accuracy"] and found["loss"] == pytest.approx(said["loss"], rel=1e-6)
    assert evaluated(capsys, "weights", "--eval-images", "7")["images"] == 7


def test_the_best_checkpoint_is_the_one_of_best_validation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = {step: recorded(folder, "val", step)["accuracy"] for step in (2, 4, 6)}
    found = evaluated(capsys, "weights", "--best", "--split", "validation")
    assert found["accuracy"] == max(accuracies.values()) == accuracies[found["step"]]


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(folder / "weights", copy)
    file = copy / "step-00000006" / "rank-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    main(["evaluate", str(copy)])
    printed = capsys.readouterr()
    assert "step-00000004 after step 4: test accuracy" in printed.out and "100 images of synthetic" in printed.out
    assert f"{copy / 'step-00000006'} is damaged" in printed.err
    assert "no intact checkpoint" in refused(capsys, "evaluate", str(copy / "step-00000006"))
    main(["export", str(copy), str(tmp_path / "out.safetensors")])
    assert "is damaged" in capsys.readouterr().err


def test_an_exported_checkpoint_is_what_the_plain_network_loads(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal logits in float64; by our own names the state of the run's file; and the same accuracy from what was exported."""
    target, stacked = tmp_path / "plain.safetensors", tmp_path / "stacked.safetensors"
    main(["export", "weights/step-00000006", str(target)])
    main(["export", "weights", str(stacked), "--stacked"])
    assert "by per-block names" in capsys.readouterr().out
    settings = Config().replace(**SETTINGS)
    plain = PlainConvNeXt(settings.model, classes=10)
    plain.load_state_dict(load_file(target), strict=True)
    ours = checkpoints.trained(folder / "weights").network()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (model.double().eval()(images) for model in (plain, ours))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert expected.std() > 0
    written, final = load_file(stacked), load_file(folder / "weights" / "model.safetensors")
    assert written.keys() == final.keys() and all(torch.equal(written[name], final[name]) for name in final)
    assert evaluated(capsys, str(target))["loss"] == pytest.approx(recorded(folder, "test", 6)["loss"], rel=1e-6)


def test_without_the_least_used_blocks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Leaving out none changes nothing; all blocks are named with their use; more than there are and nonsense are refused in a sentence."""
    found = evaluated(capsys, "weights", "--without-blocks", "0,3,50%,8")
    assert [row["blocks"] for row in found["without"]] == [0, 3, 4, 8]
    assert found["without"][0]["loss"] == found["loss"] and found["without"][0]["use"] == 0.0
    assert len({row["loss"] for row in found["without"]}) == 4
    assert list(found["use"])[-1] == "stages.3.blocks.0" and sorted(found["use"].values())[2] == found["without"][1]["use"] > 0
    main(["evaluate", "weights", "--without-blocks", "25%"])
    assert "without the 2 least used of 8 blocks, which move the stream by up to" in capsys.readouterr().out
    for typed, words in (("9", "more than the network's 8 blocks"), ("half", "type for example 10,25%,50%"), ("101%", "no share")):
        assert words in refused(capsys, "evaluate", "weights", "--without-blocks", typed)


def test_the_study_of_use_measures_every_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Use and gamma of all 8 blocks at steps 2, 4 and 6; accuracy without none of them is the run's, without all that of a network without blocks."""
    found = used.measure(folder / "weights", {}, 0)
    for field in ("use", "gamma"):
        assert list(found.profiles[field]) == ["2", "4", "6"]
        assert all([layer for layer, _ in points] == [4, 7, 10, 13, 16, 19, 22, 25] for points in found.profiles[field].values())
    last = {name: dict(points)["6"] for name, points in ((field, found.profiles[field]) for field in ("use", "gamma"))}
    whole = evaluated(capsys, "weights", "--without-blocks", "0,8")
    assert [value for _, value in last["use"]] == pytest.approx(list(whole["use"].values()), rel=1e-4)
    for name in (used.LEAST, used.ANY):
        curve = dict(found.curves[name])
        assert (curve[0], curve[100]) == tuple(row["accuracy"] for row in whole["without"])
    assert 0 <= found.numbers[used.NEEDED] <= found.numbers[used.BLOCKS] == 8 and 1 <= found.numbers[used.EFFECTIVE] <= 8
    assert (used.effective([2.0, 2.0, 0.0]), used.effective([3.0]), used.effective([0.0])) == (pytest.approx(2), pytest.approx(1), 0.0)


def test_bad_input_is_a_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, "evaluate", "nowhere")
    assert "nowhere" in refused(capsys, "export", "nowhere", str(tmp_path / "out"))
    assert "holds no checkpoint and no model.safetensors" in refused(capsys, "evaluate", str(tmp_path))
    assert "names no checkpoint of best validation" in refused(capsys, "evaluate", str(tmp_path), "--best")
    state, metadata = checkpoints.read(folder / "weights" / "model.safetensors")
    described = json.loads(metadata["deepscale"])
    for change, words in (
        ({"data": {**described["data"], "digest": "0" * 64}}, "was trained on other images (digest 000000000000) than synthetic"),
        ({"data": {"dataset": "synthetic"}}, "does not say what it was trained on ('data_dir' is missing)"),
        ({"data": {**described["data"], "dataset": "cifar100", "data_dir": str(tmp_path)}}, "--data-dir FOLDER"),
        ({"classes": 11}, "does not hold the tensors of the network it describes"),
    ):
        checkpoints.write(tmp_path / "other.safetensors", state, {**metadata, "deepscale": json.dumps(described | change)})
        assert words in refused(capsys, "evaluate", str(tmp_path / "other.safetensors"))
    assert not (tmp_path / "out").exists()
