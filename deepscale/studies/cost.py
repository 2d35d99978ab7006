"""What the rows of a study will cost, before they run: memory and time of each, as the planner expects them of this machine."""

import math
from collections.abc import Sequence

import torch

from deepscale.bench.report import markdown
from deepscale.errors import UsageError
from deepscale.machine import measure_machine
from deepscale.progress import gib, seconds
from deepscale.studies.row import BEFORE, Job
from deepscale.studies.study import Study
from deepscale.sweeps import preview
from deepscale.sweeps.preview import Planned
from deepscale.sweeps.space import Space, Trial
from deepscale.world import World


def show(study: Study, scale: str, jobs: Sequence[Job], concurrent: int) -> None:
    """Prints a line for each row, and what all of them take with so many at once. A few seconds for every size of network."""
    print(f"{study.name}, {scale} scale: {study.scale(scale).note or study.title}\n")
    table = [["case", "seed", "steps", "memory", "time"]]
    took, need = 0.0, [0]
    for job in jobs:
        planned = [plan(job, i) for i in range(len(job.phases))]
        problem = next((one.problem for one in planned if one.problem), "")
        own = sum(one.seconds for one in planned)
        took += 0.0 if problem or not math.isfinite(own) else own
        if not planned:
            amounts = ["", "", "seconds to minutes"]
        elif problem:
            amounts = ["", problem, ""]
        else:
            steps, device = sum(one.steps or 0 for one in planned), max(one.device for one in planned)
            need.append(max(one.host for one in planned))
            memory = gib(need[-1]) + (f" + GPU {gib(device)}" if device else "")
            amounts = [f"{steps:,}" if steps else "as time allows", memory, seconds(own)]
        table.append([job.key.case, str(job.key.seed), *amounts])
    print("\n".join(markdown(table, 1)))
    concurrent = min(concurrent, len(jobs))
    if took:
        print(f"\n{len(jobs):,} rows, {concurrent:,} at a time: about {seconds(took / concurrent)} on this machine\n")
    free, together = measure_machine(World(0, 1, 0, 1, torch.device("cpu"))).host_bytes, sum(sorted(need)[-concurrent:])
    if together > free:
        print(f"!!! {concurrent:,} at a time may need {gib(together)}, and {gib(free)} are free here: type a smaller --concurrent\n")


def plan(job: Job, index: int) -> Planned:
    """A phase as the planner expects it."""
    settings = {**BEFORE, **job.phases[index].settings, **job.free}
    threads = settings["threads"]
    space = Space(job.key.study, "", {}, {}, {})
    try:
        return next(preview.planned(space, [Trial(1, settings)], 1, int(threads) if threads.isdigit() else 1))
    except UsageError as error:
        return Planned(Trial(1, settings), problem=str(error))
