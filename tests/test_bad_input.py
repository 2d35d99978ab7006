"""Bad input to the training command: one sentence on standard error, exit code 2, and nothing left in the working folder.

`main` runs in this process; nothing here reaches DeepSpeed's engine, but for the last test, where the tracker fails and training goes on.
"""

import json
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepscale import errors, train, world

TINY = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "8", "--max-steps", "3",
    "--eval-images", "20", "--threads", "1", "--device", "cpu",
]  # fmt: skip

Refused = Callable[..., str]
pytestmark = pytest.mark.usefixtures("signals_as_before")


def files(folder: Path) -> list[Path]:
    """Everything below a folder, but for the locks of data folders."""
    return sorted(path for path in folder.rglob("*") if path.name != ".deepscale" and path.suffix != ".lock")


@pytest.fixture
def refused(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused("--depth", "3")` runs the command and gives the sentence it ends with, without "deepscale: " before it."""

    def run(*arguments: str) -> str:
        before = files(in_tmp_path)
        with pytest.raises(SystemExit) as ended:
            train.main([*TINY, *arguments])
        shown = capsys.readouterr()
        *others, sentence = shown.err.splitlines()
        assert ended.value.code == 2
        assert sentence.startswith("deepscale: ")
        assert not any(line.startswith("deepscale: ") for line in others)
        assert "Traceback" not in shown.err + shown.out
        assert files(in_tmp_path) == before
        return sentence.removeprefix("deepscale: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--depth 3", ["--depth 3", "14", "1,000,000"]),
        ("--depth 13", ["--depth 13", "14"]),
        ("--depth 1000001", ["--depth 1000001", "1,000,000"]),
        ("--depth deep", ["'deep'", "not a number", "--depth 1004"]),
        ("--depth 26.5", ["'26.5'", "not a number"]),
        ("--depth -26", ["--depth"]),
        ("--blocks 1,2,3", ["'1,2,3'", "four", "for example 1,1,5,1"]),
        ("--stack-size 4,2", ["--stack-size", "'4,2'", "four", "for example 1,1,5,1"]),
        ("--blocks 1,0,3,1", ["'1,0,3,1'", "at least 1"]),
        ("--activation swish", ["'swish'", "gelu, relu, silu, tanh, sigmoid"]),
        ("--norm groupnorm", ["'groupnorm'", "layernorm, batchnorm, rmsnorm, none"]),
        ("--skip dense", ["'dense'", "identity, deepnorm, reversible, none"]),
        ("--dataset imagenet", ["'imagenet'", "cifar10", "cifar100", "fashionmnist", "folder", "synthetic"]),
        ("--feed dali", ["'dali'", "ffcv"]),
        ("--schedule linear", ["'linear'", "onecycle, cosine, constant"]),
        ("--precision fp8", ["'fp8'", "bf16"]),
        ("--zero 4", ["4", "from 0 to 3"]),
        ("--width 0", ["0", "from 1", "auto"]),
        ("--batch-size none", ["'none'", "auto"]),
        ("--lr -1", ["-1"]),
        ("--lr nan", ["nan"]),
        ("--time-budget soon", ["'soon'", "5m"]),
        ("--time-budget 0", ["'0'", "90s"]),
        ("--kernel-size 4", ["--kernel-size 4", "odd"]),
        ("--skip none --layerscale-init 0", ["--skip none", "--layerscale-init", "multiplied by"]),
        ("--dept 26", ["--dept"]),
        ("26", ["26"]),
        ("--depth", ["--depth"]),
    ],
)
def test_an_option_that_cannot_be_meant(refused: Refused, arguments: str, words: list[str]) -> None:
    sentence = refused(*arguments.split())
    assert [word for word in words if word not in sentence] == [], sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--engine torch --zero 2", ["--engine torch", "ZeRO"]),
        ("--engine torch --offload cpu", ["--engine torch", "offload"]),
        ("--engine torch --deepspeed_config ds.json", ["--engine torch", "DeepSpeed file"]),
        ("--engine torch --offload nvme", ["--engine torch", "offload"]),
        ("--engine torch --nvme-path .", ["--nvme-path .", "--offload nvme"]),
        ("--engine torch --recompute --activations keep", ["--recompute is short for --activations recompute", "--activations keep was given"]),
        ("--engine torch --segment 4 --no-recompute", ["--segment 4", "--activations keep"]),
        ("--engine torch --batch-size 9 --accumulation 2", ["--batch-size 9", "1 ranks x 2 micro batches", "--batch-size 8"]),
        ("--engine torch --patch-size 5", ["--patch-size 5", "32 pixels", "1 to 4"]),
        ("--engine torch --depth 10000 --width 4096", ["10,001 layers", "--width 4096", "GiB are free", "fits"]),
        ("--engine torch --batch-size 20000", ["20,000", "18,000 training images", "--batch-size 4500"]),
    ],
)
def test_settings_that_do_not_go_together(refused: Refused, in_tmp_path: Path, arguments: str, words: list[str]) -> None:
    (in_tmp_path / "ds.json").write_text("{}")
    sentence = refused(*arguments.split())
    assert [word for word in words if word not in sentence] == [], sentence


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, "--zero 0 --offload cpu", ["--offload cpu", "stage 0", "--zero 2"]),
        (None, "--offload nvme", ["--offload nvme", "--nvme-path DIR"]),
        (None, "--offload nvme --nvme-path nowhere", ["--nvme-path nowhere", "does not exist", "mkdir"]),
        (None, "--offload nvme --nvme-path . --zero 2", ["--offload nvme", "stage 2", "--zero 3", "--offload cpu"]),
        (None, "--deepspeed_config missing.json", ["missing.json", "cannot be read", "--deepspeed_config"]),
        (None, "--deepspeed_config .", ["cannot be read"]),
        ("{'stage': 2}", "", ["ds.json", "not JSON", "line 1"]),
        ('{"zero_optimisation": {}}', "", ["ds.json", "'zero_optimisation'", "zero_optimization"]),
        ('{"zero_optimization": {"stage": 5}}', "", ["stage 5", "0, 1, 2, 3"]),
        ('{"zero_optimization": {"stage": 2, "stagee": 2}}', "", ["ds.json", "zero_optimization.stagee"]),
        ('{"zero_optimization": {"stage": 2}}', "--zero 3", ["ds.json", "stage 2", "--zero 3"]),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "--nvme-path .",
            ["ds.json", "the optimiser not", "offload_optimizer"],
        ),
        ('{"train_batch_size": 32}', "", ["ds.json", "train_batch_size 32", "--batch-size"]),
        ('{"gradient_clipping": 1.0}', "--clip 0", ["ds.json", "gradient_clipping 1.0", "--clip"]),
        ('{"bf16": {"enabled": true}}', "--precision fp32", ["ds.json", "bf16", "--precision fp32"]),
    ],
)
def test_deepspeed_files(refused: Refused, in_tmp_path: Path, content: str | None, arguments: str, words: list[str]) -> None:
    pytest.importorskip("deepspeed")
    if content is not None:
        (in_tmp_path / "ds.json").write_text(content)
        arguments += " --deepspeed_config ds.json"
    sentence = refused(*arguments.split())
    assert [word for word in words if word not in sentence] == [], sentence


# ------------------------------------------------------------------------------------------------------------ files and folders


@pytest.mark.parametrize("folder", ["file/below", "/proc/nowhere/checkpoints"])
def test_a_checkpoint_folder_that_cannot_be_written(refused: Refused, in_tmp_path: Path, folder: str) -> None:
    (in_tmp_path / "file").touch()
    sentence = refused("--checkpoint-dir", folder)
    assert folder in sentence and "cannot be written" in sentence and "--checkpoint-dir" in sentence


def images(folder: Path, classes: list[str]) -> None:
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(3):
                Image.fromarray(np.full((32, 32, 3), index, np.uint8)).save(folder / split / name / f"{index}.png")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashionmnist"])
def test_a_named_data_set_that_is_not_there_never_becomes_another(refused: Refused, in_tmp_path: Path, dataset: str) -> None:
    (in_tmp_path / "data").mkdir()
    sentence = refused("--engine", "torch", "--dataset", dataset, "--no-download")
    assert "data" in sentence and "--no-download" in sentence


def test_image_folders(refused: Refused, in_tmp_path: Path) -> None:
    (in_tmp_path / "empty").mkdir()
    images(in_tmp_path / "single", ["cat"])
    images(in_tmp_path / "broken", ["cat", "dog"])
    (in_tmp_path / "broken" / "train" / "dog" / "1.png").write_bytes(b"no picture")
    (in_tmp_path / "file").touch()
    for folder, words in {
        "empty": ["empty", "train"], "single": ["cat"], "broken": ["1.png", "1"], "missing": ["missing"], "file": ["file"], "file/below": ["file"],
    }.items():  # fmt: skip
        sentence = refused("--engine", "torch", "--dataset", "folder", "--data-dir", folder)
        assert [word for word in words if word not in sentence] == [], sentence


# ---------------------------------------------------------------------------------------------------------------- ranks, ports


def test_a_gpu_that_is_not_there(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cpu" in refused("--device", "cuda")


def test_a_port_in_use_is_named_with_a_free_one(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's port 29500 serves one run at a time."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        sentence = refused()
    assert f"port {port} is in use" in sentence and "--master_port" in sentence


def test_all_ranks_find_the_fault_and_one_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 1 waits for the launcher's signal, which the fault of rank 0 brings; without one it says the sentence, too."""
    waited: list[float] = []

    @errors.command
    def main() -> None:
        raise errors.UsageError("no such thing")

    def ended_meanwhile(seconds: float) -> None:
        waited.append(seconds)
        raise KeyboardInterrupt

    for rank, sleep, said in (("0", ended_meanwhile, True), ("1", ended_meanwhile, False), ("1", waited.append, True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(errors.time, "sleep", sleep)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err == ("deepscale: no such thing\n" if said else "")
    assert waited == [errors.RANK_0_FIRST_S] * 2


ENDS = [(errors.UsageError("x"), 2), (errors.NonFiniteError("x"), 3), (errors.OutOfMemoryError("x"), 4), (KeyboardInterrupt(), 130)]


@pytest.mark.parametrize(("error", "code"), ENDS)
def test_exit_codes(error: BaseException, code: int) -> None:
    @errors.command
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code


# -------------------------------------------------------------------------------------------------- the tracker may fail


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # inside MLflow
def test_training_goes_on_where_the_tracking_database_is_locked_or_unreachable(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both runs end with their summary, and say once that they are not recorded."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("deepscale.tracking_store.SQLITE_WAIT_S", 0.2)
    with closing(sqlite3.connect(in_tmp_path / "mlflow.db")) as holder:
        holder.execute("CREATE TABLE held (x)")
        holder.commit()
        holder.execute("BEGIN EXCLUSIVE")
        for uri in (f"sqlite:///{in_tmp_path}/mlflow.db", f"http://127.0.0.1:{world.free_port()}"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            train.main([*TINY, "--engine", "torch"])
            shown = capsys.readouterr()
            assert "summary" in shown.out and "3 in" in shown.out
            warnings = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
            assert len(warnings) == 1 and "track" in warnings[0].lower()
            assert "Traceback" not in shown.err
    kept = [json.loads(line) for path in in_tmp_path.rglob("unsent_metrics.jsonl") for line in path.read_text().splitlines()]
    assert sum("train/loss" in json.dumps(op) for op in kept) >= 6
