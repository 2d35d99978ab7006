"""Everything that a training imports, imported once, for the process that a study forks its rows from."""

import os
from contextlib import suppress

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where there is a GPU nothing is forked (runner.py)
with suppress(ImportError):  # a row that needs it says so
    import deepspeed  # noqa: F401

from deepscale import train  # noqa: F401
from deepscale.config import Config
from deepscale.engine import preload
from deepscale.studies import warm  # noqa: F401

preload(Config())
