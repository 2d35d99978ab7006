"""What an op is: a library that is compiled on the machine that uses it."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Say = Callable[[str], None]


@dataclass(frozen=True)
class Op:
    """How one library is named, built, loaded and tried; ops/__init__.py does the rest.

    `title` and `takes` say on screen what is built and how long that takes, `without` what training does where it cannot be had.
    `versions`: what a finished file must fit beside the processor. `missing`: what a build lacks here, as a sentence, or None.
    `build` writes NAME.so into the working folder, in a process of its own. `check` raises RuntimeError where a loaded op is wrong.
    """

    title: str
    takes: str
    without: str
    versions: Callable[[], dict[str, str]]
    missing: Callable[[], str | None]
    build: Callable[[], None]
    load: Callable[[Path], None]
    loaded: Callable[[], bool]
    check: Callable[[], None]


def compiler() -> list[str]:
    """The C++ compiler's command."""
    return (os.environ.get("CXX") or "c++").split()


def missing_compiler() -> str | None:
    """The sentence of a machine without C++ compiler, or None."""
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler ({' '.join(compiler())}) is on the PATH (Debian: apt-get install g++)"
    return None


def path_with_ninja() -> str:
    """The PATH with python's own folder: pip puts ninja there, and only an activated environment names it."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
