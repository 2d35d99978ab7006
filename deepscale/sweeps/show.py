"""`deepscale sweep`: the results of a sweep, out of MLflow, while it runs and afterwards."""

import sys
from pathlib import Path

from deepscale import config, merge
from deepscale.errors import UsageError, unknown_choice
from deepscale.paths import as_folder
from deepscale.sweeps import results, rows, table
from deepscale.sweeps.tags import ENDED
from deepscale.tracking_read import Reader
from deepscale.tracking_store import DEFAULT_STORE


def main(arguments: list[str]) -> None:
    """Runs `show` or `summary`."""
    known = {"show": show, "summary": summary}
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: deepscale sweep COMMAND [options]     (starting one: python tune/sweep.py tune/spaces/small.yaml)\n")
        print("  show     the table of a sweep, also while it runs; CSV; a small JSON file per trial")
        print("  summary  its figures and report page, also while it runs, and its summary run in MLflow")
        return
    if arguments[0] not in known:
        raise unknown_choice("the command", arguments[0], known)
    known[arguments[0]](arguments[1:])


def show(arguments: list[str]) -> None:
    """Prints the table, or writes it as files."""
    parser = config.parser("deepscale sweep show", "The results of a sweep: means over seeds, sorted by its metric.")
    parser.add_argument("name", metavar="NAME", help="name of the sweep, as MLflow's tag `sweep` has it")
    parser.add_argument("--trials", action="store_true", help="a line for each trial instead of means over seeds")
    parser.add_argument("--csv", action="store_true", help="the same as CSV, with all digits")
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="also write each ended trial as one JSON file: settings, numbers, curves, origin")
    parser.add_argument("--stores", nargs="+", type=Path, metavar="FOLDER", help=f"read every {DEFAULT_STORE} below folders instead of one store")
    given = parser.parse_args(arguments)
    sweep = results.read(given.name, readers(given.stores))
    print(table.as_csv(sweep, given.trials) if given.csv else table.text(sweep, given.trials), end="" if given.csv else "\n")
    if given.rows:
        written = rows.write(sweep, given.rows)
        print(f"{given.rows}: {len(written):,} new of {sum(row.outcome in ENDED for row in sweep.rows):,} ended trials", file=sys.stderr)


def summary(arguments: list[str]) -> None:
    """Writes figures, page and summary run, as the sweep itself does at its end."""
    parser = config.parser("deepscale sweep summary", "Write the figures and the report page of a sweep, and its summary run in MLflow.")
    parser.add_argument("name", metavar="NAME", help="name of the sweep, as MLflow's tag `sweep` has it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write (default: sweeps/NAME)")
    parser.add_argument("--stores", nargs="+", type=Path, metavar="FOLDER", help=f"read every {DEFAULT_STORE} below folders instead of one store")
    given = parser.parse_args(arguments)
    from deepscale.sweeps.summary import write

    sweep = results.read(given.name, readers(given.stores))
    print(write(sweep, given.out or Path("sweeps") / as_folder(given.name)).text())


def readers(folders: list[Path] | None) -> list[Reader]:
    """The store of the environment, or all that lie below folders. Raises UsageError."""
    if not folders:
        return [Reader()]
    stores = merge.found(folders)
    if not stores:
        raise UsageError(f"there is no {DEFAULT_STORE} below {', '.join(map(str, folders))}; give the folder of the sweep: --stores sweeps/NAME")
    return [Reader(f"sqlite:///{path}") for path in stores]
