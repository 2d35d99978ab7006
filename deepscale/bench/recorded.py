"""A program: training steps of one network in a fresh process, with and without records of its gradient flow; CPU seconds as JSON.

The plain network of separate modules has no recorder: its steps are recorded the naive way, one `safe_get_full_grad` and one norm for
each of its parameter tensors.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deepscale import config, errors, world
from deepscale.bench import networks
from deepscale.bench.deep import run_program, timed
from deepscale.engine import DeepSpeedEngine
from deepscale.gradflow.recorder import Recorder
from deepscale.loop import train_step

KINDS = ("none", "norms", "blocks", "full")


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say, and prints the result in the last line."""
    run_program("python -m deepscale.bench.recorded", arguments, {"warm-up": 0, "rounds": 1}, _measure)


def _measure(values: argparse.Namespace, settings: config.Config, place: world.World) -> dict[str, Any]:
    plain = values.network == "plain"
    engine = DeepSpeedEngine(networks.build(settings, plain=plain), settings, place)
    training = networks.Training(engine, place, networks.random_batch(values.batch_size, channels_last=not plain))
    return (_naive if plain else _recorded)(training, values.warm_up, values.rounds)


def _recorded(training: networks.Training, warm_up: int, rounds: int) -> dict[str, Any]:
    """Steps of all kinds in turn: (CPU seconds of the steps, and, of those with norms alone, of the record itself)."""
    recorder = Recorder(training.engine.module, engine=training.engine)
    steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    reading: list[float] = []

    def step(kind: str, number: int) -> None:
        if kind in ("blocks", "full"):
            recorder.begin(number, activations=kind == "full")

        def inspect(totals: Tensor) -> None:
            totals.tolist()
            if kind != "none":
                cpu, _ = timed(lambda: recorder.gradients(number if kind == "norms" else None))
                if kind == "norms":
                    reading.append(cpu)

        train_step(training.engine, training.batches, 1, training.world, inspect)
        if kind != "none":
            cpu, _ = timed(recorder.finish)
            if kind == "norms":
                reading[-1] += cpu

    for number in range(1 - warm_up, rounds + 1):
        for kind in KINDS[number % 4 :] + KINDS[: number % 4]:
            cpu, _ = timed(lambda: step(kind, number))  # noqa: B023 - called at once
            if number > 0:
                steps[kind].append(cpu)
    layers = len(recorder.layout.names)
    return {"step_cpu_s": steps, "norms_cpu_s": reading[-rounds:], "record_bytes": recorder.values.nbytes, "layers": layers}


def _naive(training: networks.Training, warm_up: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of one norm per parameter tensor, asked of DeepSpeed, after the gradients of a step."""
    from deepspeed.utils import safe_get_full_grad

    parameters = list(training.engine.module.parameters())
    reading: list[float] = []

    def read(totals: Tensor) -> None:
        reading.append(timed(lambda: [safe_get_full_grad(p).norm().item() for p in parameters])[0])

    for number in range(warm_up + rounds):
        print(f"step {number + 1}", file=sys.stderr, flush=True)
        train_step(training.engine, training.batches, 1, training.world, read)
    return {"norms_cpu_s": reading[-rounds:], "tensors": len(parameters)}


if __name__ == "__main__":
    main()
