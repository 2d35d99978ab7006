"""`deepscale plan`: what a run would build and take on this machine, without running it."""

import json
import sys

import torch

from deepscale import config, kernel, plan, world
from deepscale.config import GROUPS
from deepscale.machine import measure_machine
from deepscale.progress import gib


def main(arguments: list[str]) -> None:
    """Prints the plan of these settings."""
    parser = config.parser("deepscale plan", "What a run with these settings will build and take on this machine.")
    parser.add_argument("--classes", type=int, default=10, help="classes of the data set (default: 10)")
    parser.add_argument("--json", action="store_true", help="for scripts")
    config.add_arguments(parser, *GROUPS)
    given = parser.parse_args(arguments)
    asked = config.from_namespace(given)
    place = world.World(0, 1, 0, 1, torch.device(world.choose_device(asked.engine)))
    asked = kernel.choose(asked, place, _say, _say)
    planned = plan.resolve(asked, place, measure_machine(place), channels=3, image_size=32, classes=given.classes)
    memory = planned.memory
    if given.json:
        numbers = {"parameters": memory.parameters, "device_bytes": memory.device, "host_bytes": memory.states_host, "step_s": planned.step_s}
        print(json.dumps(numbers | {"settings": config.flat(planned.config)}, indent=2, default=str))
        return
    print("\n".join(planned.notes))
    print(f"parameters, gradients and optimiser {gib(memory.states_device + memory.states_host)}, activations kept {gib(memory.kept)}", end="")
    print(f", one recomputed segment {gib(memory.segment)}")


def _say(text: str) -> None:
    print(f"plan: {text}", file=sys.stderr, flush=True)
