"""What all figures share: matplotlib without a screen, and colours."""

from pathlib import Path
from typing import Any

from deepscale.errors import MissingPackageError, UsageError

# Okabe and Ito's palette, told apart by colour-blind readers and in both themes; the yellow is left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files. Raises MissingPackageError."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingPackageError("matplotlib", None, "drawing") from None
    return pyplot


def save(figure: Any, path: Path) -> Path:
    """Writes the figure as PNG, makes its folder, and closes the figure. Raises UsageError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error}); type another path") from None
    finally:
        pyplot().close(figure)
    return path
