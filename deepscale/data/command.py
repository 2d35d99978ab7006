"""`deepscale data`: prepares a data set and says what it is."""

import numpy as np

from deepscale.config import DATASET_NAMES, DataConfig, add_arguments, from_namespace, parser
from deepscale.data.sources import load_source
from deepscale.data.splits import Source


def main(arguments: list[str]) -> None:
    """Prepares the data set of these arguments and prints a table of it; `--beton` also writes FFCV's file.

    Raises UsageError where the data set cannot be had, and with `--beton` where FFCV cannot write.
    """
    command = parser("deepscale data", f"Prepare and describe a data set: {', '.join(DATASET_NAMES)}.")
    add_arguments(command, DataConfig)
    command.add_argument("--beton", action="store_true", help="also write the training images as FFCV's .beton, and verify it")
    values = command.parse_args(arguments)
    data = from_namespace(values).data
    source = load_source(data)
    describe(source)
    if values.beton:
        _write_beton(source, data)


def _write_beton(source: Source, data: DataConfig) -> None:
    from deepscale.data.beton import FeedUnavailable, beton_path, write_beton
    from deepscale.errors import UsageError

    path = beton_path(source, data)
    try:
        write_beton(source, path, print)
    except FeedUnavailable as error:
        raise UsageError(str(error)) from None
    print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB, verified")


def describe(source: Source) -> None:
    """Prints what a data set is, and the images of each class in its three splits."""
    from rich.console import Console
    from rich.table import Table

    info = source.info
    facts = Table(show_header=False, box=None)
    for name, value in (
        ("data set", f"{info.label} ({info.name})"),
        ("where", info.location),
        ("images", f"{info.train_images:,} training, {info.validation_images:,} validation, {info.test_images:,} test"),
        ("size", f"{info.image_size}x{info.image_size} pixels, {info.channels} channel{'s' if info.channels > 1 else ''}"),
        ("mean of 255", ", ".join(f"{value:g}" for value in info.mean)),
        ("std of 255", ", ".join(f"{value:g}" for value in info.std)),
        ("digest", info.digest),
    ):
        facts.add_row(name, value)
    counts = Table("class", *("training", "validation", "test"))
    for column in counts.columns[1:]:
        column.justify = "right"
    per_class = [np.bincount(split.labels, minlength=info.classes) for split in (source.train, source.validation, source.test)]
    for index, name in enumerate(info.class_names):
        counts.add_row(name, *(f"{count[index]:,}" for count in per_class))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(facts)
    console.print(counts)
