"""A program: one training run as train.py makes it, on synthetic images and without a record; what was planned and what it took, as JSON.

Resident memory is counted over the process just before the network is built. Every rank prints its own.
"""

import json
from collections.abc import Sequence

import torch

from deepscale import config, errors, loop, memory, tracking, train, world
from deepscale.config import Config
from deepscale.engine import build_engine, hush, preload
from deepscale.progress import Progress
from deepscale.records import Records
from deepscale.tracking import open_tracker

SILENT = {"dataset": "synthetic", "feed": "tensors", "tracking": False, "record_every": 0, "threads": 1, "device": "cpu", "lr": 1e-4}


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the settings say, and prints the result in the last line."""
    command = config.parser("python -m deepscale.bench.planned", "Train for a few steps and compare with the plan.")
    command.add_argument("--settings", type=json.loads, required=True, help="settings by their flat names, as JSON")
    asked = Config().replace(**SILENT | command.parse_args(arguments).settings)
    hush(verbose=False)
    place = world.join(asked.engine)
    loading = tracking.preload()
    try:
        with Progress(0, enabled=False) as screen:
            prepared = train.prepare(asked, place, screen, loading)
            preload(asked)
            print(json.dumps(_measure(prepared, screen)), flush=True)
    finally:
        world.leave()


def _measure(run: train.Prepared, screen: Progress) -> dict[str, float]:
    """Network, engine, steps and evaluation, as train.train does them."""
    settings, place = run.plan.config, run.place
    tracker = open_tracker(settings.tracking, run_name="plan", parameters={}, tags={}, dataset=run.feeds.info, rank=place.rank, warn=screen.warn)
    base = memory.reset_peak(place.device)
    model = train.build_model(settings, run.feeds.info, place)
    engine = build_engine(model, settings, place, run.cpu_adam)
    memory.give_back()
    records = Records(model, engine, settings, tracker, screen)
    result = loop.Fit(loop.Run(settings, place, model, engine, run.feeds, tracker, screen, records))()
    return {
        "planned_bytes": run.plan.memory.total,
        "planned_s": run.plan.step_s or 0.0,
        "parameters": run.plan.memory.parameters,
        "base_bytes": base,
        "peak_bytes": memory.peak_bytes(torch.device("cpu")),
        "step_s": result.step_s,
    }


if __name__ == "__main__":
    main()
