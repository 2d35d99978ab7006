"""Reading a checkpoint into a run of any ZeRO stage and number of ranks."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepscale.checkpoints.stored import Checkpoint, Fragments
from deepscale.engine import Engine, LossScaleState
from deepscale.engine_states import kinds_of, set_steps
from deepscale.errors import UsageError
from deepscale.models.initial import seed_of
from deepscale.world import World


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape, of which ZeRO-3 may have left nothing."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's running statistics by name: what a network's state holds beside its parameters."""
    own = model.state_dict(keep_vars=True)
    return {name: value for name, value in own.items() if not isinstance(value, nn.Parameter)}


@torch.no_grad()
def restore(checkpoint: Checkpoint, model: nn.Module, engine: Engine, world: World, say: Callable[[str], None]) -> None:
    """Weights, moments, the optimiser's step, fp16's loss scale, running statistics and random states; every rank its own.

    Not the learning rate, which is the schedule's. At another number of ranks running statistics start from their average and random
    states are derived anew, which is said. Raises UsageError where the checkpoint is another network's; nothing is changed then.
    """
    manifest = checkpoint.manifest
    with Fragments(checkpoint.path, manifest) as fragments:
        _refuse_another_network(checkpoint, model, engine, fragments)
        for name, parameter in model.named_parameters():
            held = engine.held(parameter)
            for kind, own in {"weight": held.weight, **held.moments}.items():
                fragments.read_into(kind, name, held.start, own)
            if held.changed is not None:
                held.changed()
            if held.forward is not None:
                fragments.read_into("weight", name, *held.forward)
        for name, buffer in buffers_of(model).items():
            same = checkpoint.ranks == world.size
            buffer.copy_(fragments.files[world.rank].read(f"buffer/{name}") if same else fragments.averaged(name))
        _restore_random(checkpoint, fragments, world, say)
    set_steps(engine.optimizer, manifest["optimizer_steps"])
    engine.restored(None if manifest["loss_scale"] is None else LossScaleState(*manifest["loss_scale"]))


def _refuse_another_network(checkpoint: Checkpoint, model: nn.Module, engine: Engine, fragments: Fragments) -> None:
    if sorted(fragments.kinds) != sorted(kinds := ["weight", *kinds_of(engine.optimizer)]):
        before, now = (", ".join(names[1:]) or "nothing" for names in (fragments.kinds, kinds))
        raise UsageError(f"{checkpoint.path} is another optimiser's: it remembers {before}, and this one {now}; resume with the same --optimizer")
    stored = fragments.shapes | fragments.buffers
    own = {name: shape_of(parameter) for name, parameter in model.named_parameters()}
    own |= {name: buffer.shape for name, buffer in buffers_of(model).items()}
    for name in [*own, *stored]:
        if own.get(name) != stored.get(name):
            there, here = (tuple(shapes[name]) if name in shapes else "nothing" for shapes in (stored, own))
            raise UsageError(
                f"{checkpoint.path} is another network's: {name} is {there} there and {here} here; resume with the settings it was saved with"
            )


def _restore_random(checkpoint: Checkpoint, fragments: Fragments, world: World, say: Callable[[str], None]) -> None:
    """Stochastic depth's states: this rank's, or, at another number of ranks, ones that depend on the stored state, the step and the rank."""
    if checkpoint.ranks == world.size:
        file = fragments.files[world.rank]
        torch.set_rng_state(file.read("random/cpu"))
        if world.device.type == "cuda" and "random/cuda" in file.entries:
            torch.cuda.set_rng_state(file.read("random/cuda"), world.device)
        return
    stored = hashlib.sha256(fragments.files[0].read("random/cpu").numpy().tobytes()).digest()
    torch.manual_seed(seed_of(int.from_bytes(stored, "little"), f"rank {world.rank} of {world.size} from step {checkpoint.step}"))
    say(
        f"the checkpoint was saved on {checkpoint.ranks} ranks, this run has {world.size}: random states (stochastic depth) are derived from the "
        "stored one, running statistics (BatchNorm) start from the ranks' average"
    )
