"""Reading a checkpoint into a run of any ZeRO stage and number of ranks."""

from collections.abc import Callable

from deepscale.checkpoints.stored import Checkpoint
from deepscale.engine import Engine
from deepscale.models.convnext import ConvNeXt
from deepscale.world import World


def restore(checkpoint: Checkpoint, model: ConvNeXt, engine: Engine, world: World, say: Callable[[str], None]) -> None:
    """Weights, moments, the optimiser's step, fp16's loss scale, running statistics and random states; every rank its own.

    Not the learning rate, which is the schedule's. At another number of ranks running statistics start from their average and random
    states are derived anew, which is said. Raises UsageError where the checkpoint is another network's.
    """
    raise NotImplementedError
