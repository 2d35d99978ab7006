"""Before a run with --offload nvme: is there room, is it right, how fast is it."""

from collections.abc import Callable

from deepscale import engine_config
from deepscale.config import Config
from deepscale.nvme import folder
from deepscale.nvme.check import check
from deepscale.nvme.traffic import disk_s
from deepscale.progress import gib, seconds
from deepscale.world import World


def ready(config: Config, place: World, cpu_adam: bool, needed: int, parameters: int, say: Callable[[str], None]) -> None:
    """Says what the disk of a planned run holds and takes, `needed` bytes a rank. Raises UsageError where it is too small, or training wrong."""
    path = str(config.engine.nvme_path)
    folder.refuse_full(path, needed, place.local_size)
    check(config, engine_config.resolve(config, place.size, cpu_adam), place, cpu_adam)
    speed, step_s = folder.speed_of(path), disk_s(config, place.size, parameters)
    rates = f"it reads {speed.read / 1e9:.2f} and writes {speed.write / 1e9:.2f} GB/s, which is {seconds(step_s)} of a step"
    say(f"{gib(needed)} a rank rest in {path}: {rates}; two steps with it are equal to plain torch's")
