"""A grid of trainings with Ray Tune, each in a process of its own: on this machine, or on the Ray cluster of RAY_ADDRESS.

    python tune/sweep.py --grid layerscale_init=0,0.01,1 --depth 26 --max-steps 300

`--grid NAME=A,B,C` may be given several times; every other option goes to deepscale/train.py as it is. A start, not the whole thing:
a full grid of one process per trial, no search, no early stopping. Each trial records in MLflow (without MLFLOW_TRACKING_URI in a store
of its own, `deepscale merge FOLDER` brings them together) and keeps its checkpoints, so that a sweep which is interrupted goes on: type
the same again. Ends with a table; exit code 75 where it was interrupted.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepscale import config, errors
from deepscale.progress import show_summary
from deepscale.tracking_read import Reader
from deepscale.tracking_store import import_mlflow

ACCURACY = "val/accuracy"
NODES_WAIT_S = 180.0
# Whatever ends Ray's worker asks the training to stop, which then keeps a checkpoint.
END_WITH_PARENT = ["setpriv", "--pdeathsig", "TERM"]
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # a trial is a world of its own


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the grid, or what is left of it."""
    command = config.parser("python tune/sweep.py", "Train with every combination of settings, as many at a time as there are GPUs or cores.")
    command.add_argument(
        "--grid", action="append", required=True, metavar="NAME=A,B", help="a setting of deepscale/train.py and its values; several times"
    )
    command.add_argument("--name", default="sweep", help="name of the sweep: MLflow experiment and first word of the runs (default: sweep)")
    command.add_argument("--folder", type=Path, default=Path("sweeps"), help="where its state, stores and checkpoints lie; all nodes must see it")
    command.add_argument("--trial-cpus", type=int, default=1, help="cores for each trial")
    command.add_argument("--nodes", type=int, default=1, help="nodes to wait for")
    given, training = command.parse_known_args(arguments)
    grid = dict(_values(text) for text in given.grid)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for settings in combinations:
        config.parse([*training, *_options(settings)])  # what is wrong is said before anything starts
    try:
        import ray
        from ray import tune
    except ImportError:
        raise errors.MissingPackageError("ray", "sweep", "a sweep") from None
    address = os.environ.get("RAY_ADDRESS")
    # A bare init would join whatever cluster it finds.
    ray.init(address=address or "local", log_to_driver=False, **({} if address else {"include_dashboard": False}))
    _wait_for_nodes(ray, given.nodes)
    folder = given.folder.absolute() / given.name
    fixed = {"training": training, "name": given.name, "folder": str(folder), "cwd": os.getcwd(), "threads": given.trial_cpus}
    gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))
    trainable = tune.with_resources(tune.with_parameters(trial, fixed=fixed), {"cpu": given.trial_cpus, "gpu": gpus})
    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(str(folder), trainable, restart_errored=True)
    else:
        space = {name: tune.grid_search(values) for name, values in grid.items()}
        tuner = tune.Tuner(trainable, param_space=space, run_config=tune.RunConfig(given.name, storage_path=str(folder.parent), verbose=0))
    results = {_label(result.config): result for result in tuner.fit()}
    ended = {label: result.metrics[ACCURACY] for label, result in results.items() if ACCURACY in (result.metrics or {})}
    errors_of = {label: str(result.error).strip().splitlines()[-1] for label, result in results.items() if result.error and label not in ended}
    show_summary(
        {label: f"{ended[label]:.2%}" if label in ended else errors_of.get(label, "not ended") for label in results},
        f"{given.name}: validation accuracy",
    )
    failed = [text for text in errors_of.values() if f"exit code {errors.AGAIN}" not in text]
    if failed:
        raise errors.DeepscaleError(f"{len(failed):,} of {len(combinations):,} trainings failed; type the same again to try only these once more")
    if len(ended) < len(combinations):
        raise SystemExit(errors.AGAIN)


def trial(settings: dict[str, Any], fixed: dict[str, Any]) -> None:
    """One training, in the worker of Ray that was given its cores and GPU; reports its last validation accuracy."""
    from ray import tune

    label = _label(settings)
    place = Path(fixed["folder"]) / "trials" / label.replace(" ", "_")
    place.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in RANK}
    environment["OMP_NUM_THREADS"] = str(fixed["threads"])
    uri = environment.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    names = [
        "--experiment",
        fixed["name"],
        "--run-name",
        f"{fixed['name']} {label}",
        "--checkpoint-dir",
        str(place / "checkpoints"),
        "--resume",
        "auto",
    ]
    with (place / "output.txt").open("a") as output:
        process = subprocess.Popen(
            [*END_WITH_PARENT, sys.executable, "-m", "deepscale.train", *fixed["training"], *_options(settings), *names],
            cwd=fixed["cwd"], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if process.wait():
            raise RuntimeError(f"the training ended with exit code {process.returncode}, see {output.name}")
    import_mlflow()
    run = Reader(uri).run(names[names.index("--run-name") + 1], fixed["name"])
    tune.report({ACCURACY: run.data.metrics[ACCURACY]})


def _values(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise errors.UsageError(f"--grid {text} is not a setting and its values; type for example --grid layerscale_init=0,0.01,1")
    return name.replace("-", "_"), values.split(",")


def _options(settings: dict[str, str]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def _label(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _wait_for_nodes(ray: Any, count: int) -> None:
    limit = time.monotonic() + NODES_WAIT_S
    while (there := sum(node["Alive"] for node in ray.nodes())) < count:
        if time.monotonic() > limit:
            raise errors.UsageError(f"only {there} of {count} nodes have joined the Ray cluster within {NODES_WAIT_S:.0f} s")
        time.sleep(0.5)
    print(f"sweep: {there} nodes, {ray.cluster_resources().get('CPU', 0):.0f} cores, {ray.cluster_resources().get('GPU', 0):.0f} GPUs", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
