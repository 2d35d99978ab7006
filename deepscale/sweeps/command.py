"""`python tune/sweep.py SPACE.yaml`: every trial of a space as a training of its own, and the table of what they reached."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepscale import config, errors, resume
from deepscale.errors import UsageError
from deepscale.files import atomic
from deepscale.parsing import parse_count
from deepscale.paths import as_folder
from deepscale.sweeps import driver, preview, search, space, summary
from deepscale.sweeps.space import Space
from deepscale.sweeps.trial import Sweep, Unwritten
from deepscale.tracking_store import Store, cause, shown, store_uri

SPACE = "space.json"  # in the sweep's folder
KEYS = ("search", "samples", "scheduler", "seeds", "metric", "mode", "converged")


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a sweep, or what is left of it."""
    given, typed = _parser().parse_known_args(arguments)
    asked_space = _space(given, typed)
    search.check_scheduler(asked_space)
    asked = driver.Asked(
        given.address, given.nodes, given.gpus_per_trial, given.cpus_per_trial, given.ranks_per_trial, given.concurrent, given.max_failures
    )
    if given.dry_run:
        _preview(asked_space, asked)
        return
    name = given.name or asked_space.name
    folder = _folder(given, name, asked_space)
    own_stores = "MLFLOW_TRACKING_URI" not in os.environ and "SLURM_JOB_ID" in os.environ
    experiment = given.experiment or name
    with driver.cluster(asked) as ray:
        taken = driver.resources(driver.nodes_of(ray), asked)
        environment = Unwritten({key: value for key, value in os.environ.items() if key.startswith(("MLFLOW_", "DEEPSCALE_"))})
        if not own_stores:
            environment["MLFLOW_TRACKING_URI"] = store_uri()
            _make_experiment(experiment)
        sweep = Sweep(
            asked_space, name, experiment, str(folder), os.getcwd(), environment, search.count(asked_space),
            time.strftime("%Y%m%d-%H%M%S"), taken.ranks, taken.cpus, own_stores,
        )  # fmt: skip
        with atomic(folder / SPACE) as path:
            path.write_text(_as_json(asked_space))
        with driver.Stop(sweep.stop_file) as stop:
            known = driver.run(sweep, driver.searching(sweep), taken, asked, stop) if driver.unfinished(sweep) else []
    driver.record_ends(sweep)
    print()
    summary.show(name, folder, asked_space.question, own_stores)
    failed = [f"trial {result.config['number']}: {text}" for result in known if (text := _failure(result))]
    if failed:
        sentence = f"{len(failed):,} of {sweep.trials:,} trainings failed; type the same with --resume to try only these once more"
        raise errors.DeepscaleError("\n  ".join([sentence, *failed]))
    if left := driver.unfinished(sweep):
        raise errors.Interrupted(f"{left:,} of {sweep.trials:,} trials are left; type the same with --resume to go on", stop.code or errors.AGAIN)


def _preview(asked_space: Space, asked: driver.Asked) -> None:
    with driver.cluster(asked) as ray:
        nodes = driver.nodes_of(ray)
    taken = driver.resources(nodes, asked)
    fit = driver.room(nodes, taken) // taken.ranks
    preview.show(asked_space, taken.ranks, taken.cpus, min(fit, asked.concurrent or fit))


def _folder(given: Any, name: str, asked_space: Space) -> Path:
    """The sweep's folder. Raises UsageError for one that is taken, or of a sweep of other trials than those asked for."""
    if name != as_folder(name) or name.startswith("."):
        raise UsageError(f"--name {name} is no name of a folder; type letters, digits, - and _")
    folder: Path = given.folder.absolute() / name
    if not (folder / SPACE).exists():
        return folder
    if not given.resume:
        raise UsageError(f"there is a sweep {name} already, in {folder}; type --resume to go on with it, or --name NAME for a new one")
    before, now = json.loads((folder / SPACE).read_text()), json.loads(_as_json(asked_space))
    other = [key for key in now if before.get(key) != now[key]]
    if other:
        raise UsageError(f"the sweep in {folder} was begun with another {' and '.join(other)}; type the same as then, or --name NAME for a new one")
    return folder


def _as_json(asked_space: Space) -> str:
    """What makes it the same sweep: not how the network runs, or where data lie."""
    values = dataclasses.asdict(asked_space)
    values["fixed"] = {name: text for name, text in values["fixed"].items() if name not in resume.FREE}
    return json.dumps(values, indent=1)


def _failure(result: Any) -> str:
    """Why a trial has failed, "" for one that has not."""
    text = (result.metrics or {}).get("error") or (str(result.error).strip().splitlines()[-1] if result.error else "")
    return str(text).removeprefix("RuntimeError: ")


def _parser() -> Any:
    command = config.parser(
        "python tune/sweep.py",
        "Train with every combination of settings, as many at a time as there are GPUs or cores. Other options are settings of deepscale/train.py.",
    )
    command.add_argument(
        "--grid", action="append", default=[], metavar="NAME=A,B", help="a setting and its values; several times, instead of a SPACE"
    )
    command.add_argument("--name", help="name of the sweep, its folder and its MLflow experiment (default: the space's)")
    command.add_argument("--experiment", help="MLflow experiment (default: the sweep's name)")
    command.add_argument("--folder", type=Path, default=Path("sweeps"), help="where sweeps lie; all nodes must see it (default: sweeps)")
    command.add_argument("--dry-run", action="store_true", help="print the trials, the memory and time planned for each and for all; train nothing")
    command.add_argument("--resume", action="store_true", help="go on with the sweep of this name where it has begun; what has ended stays")
    for key in KEYS:
        command.add_argument(f"--{key}", metavar="X", help=f"`{key}` of the space")
    cluster = command.add_argument_group("what a trial takes, and of which cluster")
    cluster.add_argument("--gpus-per-trial", type=float, help="GPUs of a trial: 1, 2, 8, or 0.5 to share one (default: 1 where there is one)")
    cluster.add_argument("--cpus-per-trial", type=parse_count, help="cores of a trial (default: 1 a rank, or the share of its GPUs)")
    cluster.add_argument("--ranks-per-trial", type=parse_count, help="processes of a trial (default: 1 for each of its GPUs)")
    cluster.add_argument("--concurrent", type=parse_count, help="most trials at a time (default: as many as fit)")
    cluster.add_argument("--max-failures", type=int, default=2, help="how often a trial that crashed is tried again (default: 2)")
    cluster.add_argument("--address", help="HOST:PORT of a Ray cluster (default: RAY_ADDRESS, else a cluster of this machine for the sweep alone)")
    cluster.add_argument("--nodes", type=parse_count, help="nodes to wait for, where the cluster is being started")
    return command


def _space(given: Any, typed: list[str]) -> Space:
    """The space that is asked for: a file among what is typed, or the grids."""
    files = [word for i, word in enumerate(typed) if word.endswith((".yaml", ".yml")) or (i == 0 and not word.startswith("-"))]
    if len(files) + bool(given.grid) != 1:
        raise UsageError("give one space, for example tune/spaces/small.yaml, or --grid layerscale_init=0,0.01,1")
    keys = {key: value for key in KEYS if (value := getattr(given, key)) is not None}
    overrides = [word for word in typed if word not in files]
    if given.grid:
        return space.of_axes(given.name or "sweep", given.grid, overrides, keys)
    return space.read(Path(files[0]), overrides, keys)


def _make_experiment(name: str) -> None:
    """The database and the experiment, once, before many trainings ask for them. Raises UsageError for a store that fails."""
    uri = store_uri()
    try:
        Store(uri, name, "", 0, run_id="").open()
    except ImportError:
        raise errors.MissingPackageError("mlflow", None, "a sweep") from None
    except Exception as error:
        raise UsageError(f"{shown(uri)} {cause(error)}; set MLFLOW_TRACKING_URI to a store that works") from None


if __name__ == "__main__":
    main(sys.argv[1:])
