"""Where a run's files lie, and the package's own: in a clone, and in an installed package.

A clone keeps `ds_configs/` at its top level, where a user looks for it; a wheel carries the same folder inside the package.
"""

import os
import re
import time
from pathlib import Path

from deepscale.errors import UsageError, unknown_choice

PACKAGE = Path(__file__).resolve().parent


def as_folder(run_name: str) -> str:
    """A run's name as that of a folder, at most 100 characters."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", run_name)[:100]


def run_folder(run_name: str) -> Path:
    """The folder of a run that begins now, beside all others in `runs/` of the working folder; not made yet."""
    return Path("runs").absolute() / f"{as_folder(run_name)}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def relative_to_here(path: Path) -> Path:
    """The path as one types it in the working folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def ds_config_folder() -> Path:
    """The folder of DeepSpeed's configuration files. Raises UsageError where it is missing."""
    candidates = (PACKAGE / "ds_configs", PACKAGE.parent / "ds_configs")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise UsageError(f"the folder ds_configs/ is missing beside {PACKAGE}; install deepscale again, or give --deepspeed_config FILE")


def ds_config_names() -> list[str]:
    """Names of the configuration files, without folder and ending."""
    return sorted(path.stem for path in ds_config_folder().glob("*.json"))


def ds_config_path(name: str) -> Path:
    """The file of a configuration: `zero2` -> .../ds_configs/zero2.json.

    Raises UsageError for an unknown name, listing the known ones.
    """
    path = ds_config_folder() / f"{name}.json"
    if not path.is_file():
        raise unknown_choice("DeepSpeed configuration", name, ds_config_names())
    return path
