"""`deepscale export`: weights that --checkpoint-dir wrote, by the plain network's names, and back."""

from pathlib import Path

from deepscale import checkpoints, config


def main(arguments: list[str]) -> None:
    """Converts a weights file."""
    parser = config.parser("deepscale export", "Convert weights between the stacked layout and the plain network's per-block names.")
    parser.add_argument("source", type=Path, help=f"a {checkpoints.WEIGHTS} of --checkpoint-dir, or an exported file")
    parser.add_argument("target", type=Path, help="the safetensors file to write")
    parser.add_argument("--stacked", action="store_true", help="write our stacked names instead of per-block names")
    given = parser.parse_args(arguments)
    tensors = checkpoints.convert(given.source, given.target, given.stacked)
    print(f"{given.target}: {tensors:,} tensors, {'stacked' if given.stacked else 'by per-block names'}")
