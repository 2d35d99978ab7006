"""`deepscale report`: writes the report of an experiment or of chosen runs; with --resend it sends what runs could not send."""

import os
import sys
from pathlib import Path

from deepscale import config
from deepscale.errors import MissingPackageError, UsageError
from deepscale.report import collect
from deepscale.report.page import SINGLE_FILE_RUNS, write_report
from deepscale.tracking_store import cause, import_mlflow, shown
from deepscale.tracking_writer import UNSENT_NAME, read_file, resend

EXPERIMENT = "deepscale"


def main(arguments: list[str]) -> None:
    """Writes the report, or sends what is unsent."""
    parser = config.parser("deepscale report", "Write a page about runs that opens in a browser without server and network.")
    parser.add_argument("--experiment", metavar="E", help=f"MLflow experiment (default: {EXPERIMENT}; with --runs: any)")
    parser.add_argument(
        "--runs", nargs="+", metavar="RUN", help="names or ids of runs in MLflow, gradflow.npz files or folders of one (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")
    parser.add_argument("--single-file", action="store_true", help=f"put everything into index.html; up to {SINGLE_FILE_RUNS} runs")
    parser.add_argument("--resend", action="store_true", help=f"send what lies in runs/*/{UNSENT_NAME} to MLflow, and write no report")
    given = parser.parse_args(arguments)
    if given.resend:
        resend_all(Path("runs"))
        return
    warnings: list[str] = []
    if given.runs:
        title = f"Experiment {given.experiment}" if given.experiment else ""
        runs = collect.named(given.runs, given.experiment)
    else:
        title = f"Experiment {given.experiment or EXPERIMENT}"
        runs, warnings = collect.of_experiment(given.experiment or EXPERIMENT)
    page = write_report(runs, given.out, title=title, warnings=warnings, single_file=given.single_file)
    for warning in warnings:
        print(f"deepscale: {warning}", file=sys.stderr)
    print(f"{page}: {len(runs):,} {'run' if len(runs) == 1 else 'runs'}, {_size(page)}; open it in a browser")


def resend_all(folder: Path) -> None:
    """Sends every file of unsent operations and says so. Raises UsageError where something could not be sent; nothing is lost."""
    files = sorted(folder.glob(f"*/{UNSENT_NAME}"))
    if not files:
        print(f"nothing to send: there is no {folder}/*/{UNSENT_NAME}")
        return
    try:
        import_mlflow()
    except ImportError:
        raise MissingPackageError("mlflow", None, "sending to MLflow") from None
    failed: list[str] = []
    down: dict[str, str] = {}  # a server that does not answer is asked once
    for path in files:
        _send(path, failed, down)
    if failed:
        raise UsageError(f"{'; '.join(failed)}; nothing is lost, type the same again: deepscale report --resend")


def _send(path: Path, failed: list[str], down: dict[str, str]) -> None:
    try:
        ops = read_file(path)
        header = next(op for op in reversed(ops) if op["op"] == "run")
        uri, name = header["tracking_uri"], header["run_name"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        failed.append(f"{path} is not a file of unsent records")
        return
    # The file holds no password; the environment does, where it names the same store.
    own = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if uri not in down:
        try:
            run_id, refused = resend(path, own if own and shown(own) == uri else None)
        except Exception as error:
            down[uri] = cause(error)
        else:
            count = sum(op["op"] != "run" for op in ops) - refused
            print(f"sent {count:,} records of {name} to {uri} (run {run_id})")
            if refused:
                failed.append(f"{uri} refused {refused:,} records of {name}, which stay in {path}")
            return
    failed.append(f"{path} stays: {uri} {down[uri]}")


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
