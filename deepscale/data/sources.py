"""Which data set a run gets."""

from collections.abc import Callable

from deepscale.config import DataConfig
from deepscale.data.splits import DatasetInfo, Source, Split
from deepscale.data.synthetic import synthetic

__all__ = ["DatasetInfo", "Source", "Split", "load_source"]


def load_source(data: DataConfig, say: Callable[[str], None] = print) -> Source:
    """The data set of these settings."""
    return synthetic()
