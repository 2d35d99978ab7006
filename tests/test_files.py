"""Files are there complete or not at all (deepscale/files.py)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepscale.errors import UsageError
from deepscale.files import atomic


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_file_takes_its_name_when_complete_with_the_umasks_permissions(tmp_path: Path) -> None:
    """Also where a library puts a file of its own in the temporary one's place, for the owner alone, as safetensors does."""
    path = tmp_path / "made" / "file"
    with atomic(path) as temporary:
        own = temporary.with_name("own")
        os.close(os.open(own, os.O_CREAT | os.O_WRONLY, 0o600))
        own.write_text("new")
        own.replace(temporary)
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "new" and [file.name for file in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("not a number"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_there_and_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises((UsageError, ValueError, KeyboardInterrupt)) as caught, atomic(path, "type another --out") as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path} cannot be written (No space left on device); type another --out"
    else:
        assert caught.value is error


def test_it_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, then name, then the folder's list of names."""
    order = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def rename(source: Path, target: Path) -> None:
        order.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert order == [temporary.name, "renamed", tmp_path.name]
