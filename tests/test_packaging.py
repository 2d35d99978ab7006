"""What is installed, and what the repository must not hold."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import REPOSITORY

from deepscale.errors import UsageError
from deepscale.paths import ds_config_names, ds_config_path

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def packages(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements}


def tracked() -> list[Path]:
    """The files that git knows, or would take."""
    command = ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no git here: {done.stderr.strip()}")
    return [path for name in done.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


def lines_with(pattern: str) -> list[str]:
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPOSITORY)}:{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]
    return found


def test_a_plain_install_trains_with_deepspeed_and_mlflow() -> None:
    assert {"torch", "torchvision", "deepspeed", "mlflow", "numpy"} <= packages(PROJECT["dependencies"])
    assert "torch>=2.11" in PROJECT["dependencies"]


def test_the_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert packages(extras["ffcv"]) == {"ffcv"}
    assert {"ray", "optuna"} <= packages(extras["sweep"])
    assert extras["all"] == ["deepscale[ffcv,sweep]"]
    assert {"pytest", "ruff", "mypy"} <= packages(extras["dev"])


def test_the_command_is_installed() -> None:
    assert PROJECT["scripts"] == {"deepscale": "deepscale.cli:main"}
    assert [entry.value for entry in entry_points(group="console_scripts", name="deepscale")] == ["deepscale.cli:main"]


def test_the_licence_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (REPOSITORY / "LICENSE").read_text()


def test_no_lock_file_and_no_host_of_a_package_registry() -> None:
    assert not [path.name for path in tracked() if re.search(r"(^|[.-])lock(\.|$)|-lock\.json$", path.name)]
    assert not lines_with(r"pypi\.(org|io)|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|registry\.npmjs\.org")


def test_no_absolute_path_of_a_machine() -> None:
    assert not lines_with(r"(?<![\w.~$}])/(home|root|Users|work|scratch)/\w")


def test_the_wheel_has_the_deepspeed_configurations_and_the_kernels_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(REPOSITORY)
    wheel = tmp_path / hatchling.build_wheel(str(tmp_path))
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    program = "from deepscale.paths import ds_config_names, ds_config_path as p; [print(p(n)) for n in ds_config_names()]"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    expected = [tmp_path / "installed" / "deepscale" / "ds_configs" / f"{name}.json" for name in ds_config_names()]
    assert [Path(line) for line in done.stdout.splitlines()] == expected
    assert (tmp_path / "installed" / "deepscale" / "models" / "native" / "block.cpp").is_file()


def test_an_unknown_configuration_lists_the_known() -> None:
    assert ds_config_path(ds_config_names()[0]).is_file()
    with pytest.raises(UsageError, match=ds_config_names()[0]):
        ds_config_path("zero9")
