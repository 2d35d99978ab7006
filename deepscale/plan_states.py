"""What the engine holds for every parameter: weights, gradients, optimiser, and the buffers it moves them in.

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py) and measured (`deepscale bench plan`). Bytes are per rank; "whole" is 4
for every parameter, "share" a rank's part of it. "Flat" memory is a few large tensors, which return to the system when they are freed.
"""

from dataclasses import dataclass

from deepscale import engine_config
from deepscale.config import Config

ALLREDUCE = 4 * 500_000_000  # bytes that ZeRO 0 averages at once, DeepSpeed's constant


@dataclass(frozen=True)
class States:
    """Bytes per rank; weights, gradients and optimiser are what rests on device and host while gradients are there.

    buffers: on the device for good, for communication. gathered: whole parameters at a time, and what else passing gradients take.
    arrived, stepping: besides, at the end of backward, and during the step. start: the peak of all while the engine is built.
    disk: in files on a disk. holes: on a CPU, memory that the network's own tensors left. flat: whether they are flat buffers, not tensors
    of their own. piled: gradients stay where backward made them until its end.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    weights_host: int = 0
    gradients_host: int = 0
    optimizer_host: int = 0
    buffers: int = 0
    gathered: int = 0
    arrived: int = 0
    stepping: int = 0
    start: int = 0
    disk: int = 0
    holes: int = 0
    flat: bool = True
    piled: bool = False

    @property
    def host(self) -> int:
        """What rests on the host."""
        return self.weights_host + self.gradients_host + self.optimizer_host


def states_of(config: Config, parameters: int, ranks: int) -> States:
    """The engine's bytes for this many parameters."""
    whole, share = 4 * parameters, 4 * -(-parameters // ranks)
    zero = int(config.engine.zero)
    moments = 2 if config.recipe.optimizer != "sgd" else int(config.recipe.momentum > 0)  # that the optimiser has of every weight
    if config.engine.engine == "torch" or zero == 0:
        # DistributedDataParallel averages in buckets that together have the size of all gradients.
        averaged = 0 if ranks == 1 else whole if config.engine.engine == "torch" else min(whole, ALLREDUCE)
        return States(whole, whole, moments * whole, arrived=averaged, start=whole, flat=False, piled=True)
    bucket = 4 * engine_config.reduce_bucket(config)
    if config.engine.device != "cuda":  # a page that is never touched costs nothing
        bucket = min(whole, bucket)
    return _stage3(config, whole, share, bucket, ranks) if zero == 3 else _stage12(config, whole, share, bucket)


def _stage12(config: Config, whole: int, share: int, bucket: int) -> States:
    """Flat weights; of the share a master copy and AdamW's moments; gradients averaged in a bucket and copied to the share's buffer.

    Before the step that buffer is flattened into another. Offloaded, the host holds master copy, moments, gradients, and a copy of the
    share of the weights on its way to the device. The network's own tensors are copied to flat ones while the engine is built; malloc fills
    a part of the holes they leave again.
    """
    piled = config.engine.zero == 1
    if engine_config.resting(config).optimizer == "cpu":
        return States(whole, 0, 0, 0, share, 4 * share, gathered=bucket, start=2 * whole, holes=4 * whole // 5, piled=piled)
    start = 2 * (whole + share)
    return States(whole, share, 3 * share, gathered=bucket, stepping=share, start=start, holes=whole // 4, piled=piled)


def _stage3(config: Config, whole: int, share: int, bucket: int, ranks: int) -> States:
    """Of the share: weights, master copy, moments and a buffer of gradients. The bucket stays; to send it takes its size twice more.

    Before the step gradients are flattened once more; offloaded, that copy rests. The network's own tensors are taken apart one by one,
    and malloc fills the holes they leave again with whatever comes; with gradients on their way to the host about as much again.
    """
    rest = engine_config.resting(config)
    gathered = 4 * engine_config.gathered(config, ranks) + 2 * bucket
    holes = whole if ranks == 1 else 3 * whole // 2  # gathered parameters come and go as tensors of their own
    if "nvme" in rest:
        return _on_disk(config, rest, share, bucket, gathered, holes, ranks)
    weights, weights_host = (0, share) if rest.parameters == "cpu" else (share, 0)
    if rest.optimizer == "cpu":
        return States(weights, 0, 0, weights_host, 2 * share, 3 * share, buffers=bucket, gathered=gathered, holes=3 * whole // 2)
    return States(weights, share, 3 * share, weights_host, buffers=bucket, gathered=gathered, stepping=share, holes=holes)


def _on_disk(config: Config, rest: engine_config.Resting, share: int, bucket: int, gathered: int, holes: int, ranks: int) -> States:
    """Of the share: master copy, moments and a copy of large gradients in files, and, if they rest there, the large parameters.

    In memory stay gradients, the parameters that are too small, and the buffers through which all goes.
    """
    zero = engine_config.zero_section(config, ranks)
    large = 4 * engine_config.on_disk(config, ranks)
    group = 4 * min(share // 4, int(zero["sub_group_size"]) + engine_config.largest_part(config, ranks))
    buffers = int(zero["offload_optimizer"]["buffer_count"]) * group
    weights, weights_host, disk = 0, share, 3 * share + large
    if rest.parameters == "nvme":
        section = zero["offload_param"]
        weights_host, disk = share - large, disk + large
        buffers += 4 * int(section["buffer_count"]) * int(section["buffer_size"]) + ranks * group
    elif rest.parameters == "device":
        weights, weights_host = share, 0
    return States(weights, 0, 0, weights_host, share, buffers, buffers=bucket, gathered=gathered, disk=disk, holes=holes)
