"""The `deepscale` command: one subcommand per module, imported when it is called."""

import importlib
import sys
from collections.abc import Sequence

from deepscale import errors

# Subcommand -> (module with `main(arguments)`, what it does).
COMMANDS = {
    "data": ("deepscale.data.command", "prepare and describe a data set"),
    "prepare": ("deepscale.prepare", "leave data and DeepSpeed's ops ready for machines without internet or compiler"),
    "plan": ("deepscale.plan_command", "what a run will take, before it runs"),
    "bench": ("deepscale.bench", "measure start, step, memory and feed"),
    "evaluate": ("deepscale.evaluate", "accuracy and loss of a checkpoint, as the run measured them"),
    "export": ("deepscale.export", "weights by the plain network's names, and back"),
    "gradflow": ("deepscale.gradflow.command", "probe a network before training; the verdict of a recorded run"),
    "curves": ("deepscale.curves", "draw the curves of runs recorded in MLflow"),
    "merge": ("deepscale.merge", "copy the runs of many jobs' stores into one"),
    "sweep": ("deepscale.sweeps.show", "the results of a sweep, also while it runs"),
    "study": ("deepscale.studies.command", "the published studies, reproduced: runs what is missing, and writes a page beside their numbers"),
    "report": ("deepscale.report.command", "an offline page of runs: gradient against depth, table, heatmaps; sends what is unsent"),
}


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        width = max(len(name) for name in COMMANDS)
        print("usage: deepscale COMMAND [options]     (training: deepspeed deepscale/train.py --help)\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))
        return
    if given[0] not in COMMANDS:
        raise errors.unknown_choice("the command", given[0], COMMANDS)
    importlib.import_module(COMMANDS[given[0]][0]).main(given[1:])


if __name__ == "__main__":
    main()
