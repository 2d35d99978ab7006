"""The package imports with torch and numpy alone, and its module names shadow nothing."""

import pkgutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import deepscale

PACKAGE = Path(deepscale.__file__).parent
MODULES = sorted({"deepscale"} | {module.name for module in pkgutil.walk_packages([str(PACKAGE)], "deepscale.")})
OPTIONAL = [
    *("deepspeed", "ffcv", "matplotlib", "mlflow", "optuna", "pandas", "PIL", "plotly"),
    *("psutil", "ray", "rich", "safetensors", "torchvision", "tqdm", "yaml"),
]

# Refuses the optional packages as if they were not installed, then imports every module it is given.
PROGRAM = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r} (refused by the test)", name=name)

refused = sys.argv[1].split(",")
sys.meta_path.insert(0, Refuse())
failed = []
for name in sys.argv[2].split(","):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
sys.exit("\\n".join(failed) or 0)
"""


def test_every_module_imports_with_torch_and_numpy_alone() -> None:
    command = [sys.executable, "-c", PROGRAM, ",".join(OPTIONAL), ",".join(MODULES)]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_walk_finds_the_modules() -> None:
    assert {"deepscale.config", "deepscale.models.convnext", "deepscale.data.sources"} <= set(MODULES)


def test_no_module_is_named_like_one_of_python_or_of_a_dependency() -> None:
    """`deepspeed deepscale/train.py` puts the folder deepscale/ first on the path: a module there hides one of the same name."""
    own = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    others = {name for name, owners in packages_distributions().items() if set(owners) != {"deepscale"}}
    assert not own & set(sys.stdlib_module_names)
    assert not own & others
