"""`deepscale export`: weights that --checkpoint-dir wrote, by the plain network's names, and back."""

import sys
from pathlib import Path

from deepscale import checkpoints, config


def main(arguments: list[str]) -> None:
    """Converts a weights file."""
    parser = config.parser("deepscale export", "Convert weights between the stacked layout and the plain network's per-block names.")
    parser.add_argument("source", type=Path, help=f"a checkpoint, a --checkpoint-dir (its newest), {checkpoints.WEIGHTS}, or an exported file")
    parser.add_argument("target", type=Path, help="the safetensors file to write")
    parser.add_argument("--stacked", action="store_true", help="write our stacked names instead of per-block names")
    parser.add_argument("--best", action="store_true", help="of a --checkpoint-dir: the checkpoint of best validation instead of the newest")
    given = parser.parse_args(arguments)
    tensors = checkpoints.convert(given.source, given.target, given.stacked, given.best, _warn)
    print(f"{given.target}: {tensors:,} tensors, {'stacked' if given.stacked else 'by per-block names'}")


def _warn(text: str) -> None:
    print(f"export: {text}", file=sys.stderr, flush=True)
