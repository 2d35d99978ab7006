"""`deepscale prepare`: data and ops in their folders, the lines for compute nodes, and a sentence for what cannot be done."""

from pathlib import Path

import numpy as np
import pytest

from deepscale import prepare
from deepscale.errors import UsageError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 2 classes, 8 training and 2 test images each."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def ops_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is there, without a compiler's minute; test_ops.py has the real one."""
    monkeypatch.setattr(prepare, "ensure_ops", lambda names, say, folder: dict.fromkeys(names))
    monkeypatch.setattr(prepare, "check_without_compiler", lambda name, folder: None)


def test_it_ends_with_what_to_type_on_compute_nodes(images: Path, tmp_path: Path, ops_ready: None, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.main(["--dataset", "folder", "--data-dir", str(images), "--feed", "tensors", "--ops-dir", str(tmp_path / "ops dir")])
    output = capsys.readouterr().out
    assert f"export DEEPSCALE_OPS_DIR='{tmp_path / 'ops dir'}'" in output
    assert f"--no-download --data-dir {images} --dataset folder" in output
    assert (tmp_path / "ops dir").is_dir()


def test_an_op_that_cannot_be_had_is_named_with_the_reason(images: Path, ops_ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "ensure_ops", lambda names, say, folder: dict.fromkeys(names, "no C++ compiler"))
    with pytest.raises(UsageError, match=r"kernel of the blocks is not ready: no C\+\+ compiler") as caught:
        prepare.main(["--dataset", "folder", "--data-dir", str(images), "--feed", "tensors"])
    assert caught.value.exit_code == 2


def test_an_op_that_fails_its_check_is_not_ready(images: Path, ops_ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "check_without_compiler", lambda name, folder: "one step differs")
    with pytest.raises(UsageError, match="one step differs"):
        prepare.main(["--dataset", "folder", "--data-dir", str(images), "--feed", "tensors"])


def test_without_data_and_download_auto_is_no_synthetic_set(tmp_path: Path, ops_ready: None) -> None:
    with pytest.raises(UsageError, match="CIFAR-10"):
        prepare.main(["--data-dir", str(tmp_path / "empty"), "--no-download", "--ops-dir", str(tmp_path / "ops")])


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--ops-dir .* cannot be written"):
        prepare.main(["--dataset", "synthetic", "--ops-dir", str(tmp_path / "file" / "ops")])


def test_a_library_that_is_none_fails_the_check(tmp_path: Path) -> None:
    """The real check, in its own process: nothing is built there, so an empty folder gives the reason."""
    reason = prepare.check_without_compiler("cpu_adam", tmp_path)
    assert reason is not None and "compiler" in reason
