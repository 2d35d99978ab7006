"""`deepscale gradflow`: probe a network before it is trained, or read what a run recorded."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from deepscale import config
from deepscale.config import DataConfig, EngineConfig, ModelConfig, RecipeConfig, TrackingConfig
from deepscale.errors import UsageError, unknown_choice
from deepscale.gradflow.flow import FILE, Flow, load
from deepscale.gradflow.health import scalars, verdict
from deepscale.paths import relative_to_here, run_folder
from deepscale.progress import Progress

PICTURE, PAGE = "probe.png", "probe.html"
ENGINE = ("precision", "activations", "stack_size", "segment", "slots", "device", "threads")  # settings of the engine that a probe has
LIMITS = ("vanishing_ratio", "exploding_ratio")
COLUMNS = {
    "step": "step",
    "first/last": "grad/first_last_ratio",
    "decades/1,000 layers": "grad/slope_decades_per_1000_layers",
    "stem mean |g|": "grad/first_layer_mean_abs",
    "least": "grad/min_mean_abs",
    "largest": "grad/max_mean_abs",
}


def main(arguments: list[str]) -> None:
    """Runs `probe` or `show`."""
    known = {"probe": _probe, "show": _show}
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: deepscale gradflow COMMAND [options]\n")
        print("  probe  gradient flow at initialisation, without training: one network or variants side by side")
        print("  show   the verdict and the numbers of every record of a run")
        return
    if arguments[0] not in known:
        raise unknown_choice("the command", arguments[0], known)
    known[arguments[0]](arguments[1:])


def _probe(arguments: list[str]) -> None:
    parser = config.parser("deepscale gradflow probe", "Gradient flow at initialisation, without training.")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="AXIS=VALUES", help="variants, for example activation=gelu,tanh skip=identity,none"
    )
    parser.add_argument("--batches", type=int, default=1, metavar="N", help="batches whose mean loss is taken (default: 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of figure, page and records (default: a new one in runs/)")
    config.add_arguments(parser, ModelConfig, DataConfig, _some(EngineConfig, ENGINE), _some(RecipeConfig, ("seed",)), _some(TrackingConfig, LIMITS))
    given = parser.parse_args(arguments)
    if given.batches < 1:
        raise UsageError(f"--batches {given.batches} is no number of batches; type 1 or more")
    asked = config.from_namespace(given)
    from deepscale.gradflow.probe import probe, variants_of

    variants = variants_of(asked, given.compare)
    folder = _made((given.out or run_folder(f"probe-{asked.model.built_depth}")).absolute())
    probed: dict[str, Flow] = {}
    with Progress(0, enabled=True) as screen:
        screen.say("gradient flow at initialisation, no training")
        if all(variant.config.model.gamma_init is None for variant in variants):
            screen.say("LayerScale gamma none (--layerscale-init 0 as published)")
        for result in probe(variants, given.batches, screen.say):
            label, flow = result.variant.label, result.flow
            print(f"{label + ': ' if label else ''}{verdict(flow).sentence}; {_signal(flow)} ({result.seconds:.1f} s)", flush=True)
            flow.save(folder / _plain(label) / FILE)
            probed[label or f"{flow.depth:,} layers"] = flow
        for path in _pictures(probed, folder):
            print(relative_to_here(path))


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made ({error.strerror or error}); type another --out") from None
    return folder


def _pictures(probed: dict[str, Flow], folder: Path) -> tuple[Path, Path]:
    """The figure and the page of all variants."""
    from deepscale.gradflow.figures import overlay
    from deepscale.report.page import SINGLE_FILE_RUNS, write_page
    from deepscale.report.run import ReportRun

    depths = sorted({flow.depth for flow in probed.values()})
    gammas = {flow.meta["settings"]["layerscale_init"] for flow in probed.values()}
    title = f"initialisation, {' to '.join(f'{depth:,}' for depth in dict.fromkeys((depths[0], depths[-1])))} layers"
    title += f", LayerScale gamma {gammas.pop()}" if len(gammas) == 1 else ""
    found = {label: verdict(flow) for label, flow in probed.items()}
    figure = overlay({f"{label}: {found[label].label}": flow for label, flow in probed.items()}, folder / PICTURE, title=title)
    runs = [
        ReportRun(label, _plain(label), flow.meta["settings"], verdict=found[label].label, verdict_text=found[label].sentence, flow=flow)
        for label, flow in probed.items()
    ]
    return figure, write_page(runs, folder / PAGE, single_file=len(runs) <= SINGLE_FILE_RUNS, title=f"Gradient flow at {title}")


def _signal(flow: Flow) -> str:
    """How the signal goes forward, beside the gradient that goes back."""
    std = np.asarray(flow.output_std[-1], np.float64)
    zero = np.flatnonzero(std == 0)
    where = f", exactly 0 from layer {flow.block_depths[zero[0]]:,} on" if len(zero) else ""
    return f"signal's standard deviation {std[0]:.2g} -> {std[-1]:.2g}{where}"


def _plain(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", label)


def _some(group: type, names: tuple[str, ...]) -> type:
    """The settings of these names, as a group of their own for the command line."""
    fields = [f for f in dataclasses.fields(group) if f.name in names]
    own = dataclasses.make_dataclass(group.__name__, [(f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata)) for f in fields])
    own.__doc__ = group.__doc__
    return own


def _show(arguments: list[str]) -> None:
    parser = config.parser("deepscale gradflow show", "The verdict and the numbers of every record of a run.")
    parser.add_argument("run", help="a gradflow.npz, the folder of one, or the id or name of a run in MLflow")
    given = parser.parse_args(arguments)
    flow = load(given.run)
    rows = [[*COLUMNS, "verdict"]]
    for record, step in enumerate(flow.steps.tolist()):
        numbers = {"step": step, **scalars(flow, record)}
        rows.append([_cell(numbers.get(key)) for key in COLUMNS.values()] + [verdict(flow, record).label])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows))
    print(verdict(flow).sentence)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
