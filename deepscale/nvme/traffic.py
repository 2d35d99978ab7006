"""What a step moves between memory and the disk."""

from typing import NamedTuple

from deepscale import engine_config
from deepscale.config import Config
from deepscale.nvme.folder import speed_of


class Traffic(NamedTuple):
    """Bytes of a step, per rank."""

    read: int
    written: int


def traffic_of(config: Config, ranks: int, parameters: int) -> Traffic:
    """Of a run with --offload nvme: master weights and two moments come and go; large gradients go and come.

    Large parameters come for every forward and every backward pass, and go once.
    """
    rest = engine_config.resting(config)
    share, large = 4 * -(-parameters // ranks), 4 * engine_config.on_disk(config, ranks)
    read, written = 3 * share + large, 3 * share + large
    if rest.parameters == "nvme":
        read, written = read + 2 * config.recipe.accumulation * large, written + large
    return Traffic(read, written)


def disk_s(config: Config, ranks: int, parameters: int) -> float:
    """Seconds of a step that the disk takes, at the speed it is measured at; 0 without one."""
    if config.engine.offload != "nvme" or config.engine.nvme_path is None:
        return 0.0
    traffic, speed = traffic_of(config, ranks, parameters), speed_of(config.engine.nvme_path)
    return traffic.read / speed.read + traffic.written / speed.write
