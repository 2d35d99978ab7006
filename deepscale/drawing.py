"""What all figures share: matplotlib without a screen, and colours."""

from typing import Any

from deepscale.errors import MissingPackageError

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
