"""Is training with states on this disk right? Two steps of a small network with them there, against plain torch, in the run's own process group.

DeepSpeed 0.19.8 by itself is wrong (transfer.py), without an error; no other version is known. So every run begins with this, a second or two.
"""

import copy
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from deepscale.config import Config
from deepscale.engine import quiet
from deepscale.errors import UsageError
from deepscale.nvme import transfer
from deepscale.nvme.folder import own_folder
from deepscale.optim import build_optimizer
from deepscale.world import World

STEPS = 2
MIB_OF_FLOATS = 2**18  # below this many elements on a rank DeepSpeed leaves a tensor in memory
TOLERANCE = 1e-3  # of the greatest change of a weight; float32 gives 1e-4 at the published learning rate, bfloat16 or a wrong gradient about 1


class Part(nn.Module):
    """A loss whose gradient by every weight w is w + c, with a c of its own."""

    def __init__(self, *numels: int) -> None:
        super().__init__()
        for i, numel in enumerate(numels):
            self.register_parameter(f"weight_{i}", nn.Parameter(torch.sin(torch.arange(float(numel)) * (i + 1))))
            self.register_buffer(f"c_{i}", torch.cos(torch.arange(float(numel)) * (i + 1)))

    def forward(self, loss: Tensor) -> Tensor:
        """Adds to a loss."""
        own = dict(self.named_buffers())
        for name, weight in self.named_parameters():
            loss = loss + (weight * (0.5 * weight + own[f"c_{name[-1]}"])).sum()
        return loss


class Network(nn.Module):
    """Tensors on both sides of 1 MiB a rank, of sizes that no alignment divides, in several modules."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        large = ranks * (MIB_OF_FLOATS + 1001)
        self.parts = nn.ModuleList([Part(77, large), Part(large + 13 * ranks, 1003, large), Part(5)])

    def forward(self, loss: Tensor) -> Tensor:
        """The sum of all parts' losses and `loss`."""
        for part in self.parts:
            loss = part(loss)
        return loss


def check(config: Config, settings: dict[str, Any], place: World, cpu_adam: bool = False) -> None:
    """Raises UsageError, on every rank, where the weights differ. settings: DeepSpeed's, filled for the run, with its disk."""
    found, expected = _with_disk(config, settings, place, cpu_adam), _without(config, place, cpu_adam)
    worst, name = 0.0, ""
    for key, before in Network(place.size).named_parameters():
        apart = ((found[key] - expected[key]).abs().max() / (expected[key] - before).abs().max()).item()
        worst, name = max((worst, name), (float("inf") if apart != apart else apart, f"{key} of {before.numel():,} elements"))
    worst, name = max(place.gather((worst, name)))
    if not worst <= TOLERANCE:
        raise UsageError(
            f"training with --offload nvme is wrong here: after {STEPS} steps of a small network {name} is {worst:.2g} of its change away from where "
            f"plain torch is; type --offload cpu (ds_configs/zero3_offload.json)"
        )


def _with_disk(config: Config, settings: dict[str, Any], place: World, cpu_adam: bool) -> dict[str, Tensor]:
    """The weights after DeepSpeed's steps."""
    import deepspeed

    transfer.install()
    own = own_folder(str(config.engine.nvme_path))
    model = Network(place.size)
    with quiet(config.engine.verbose):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, config.recipe, cpu_adam), config=_for_this(settings, place, model, str(own))
        )
    start = torch.zeros((), device=place.device)
    for _ in range(STEPS):
        engine.backward(engine(start))
        engine.step()
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            weights[name] = parameter.detach().cpu().clone()
    engine.destroy()
    shutil.rmtree(own, ignore_errors=True)
    return weights


def _for_this(settings: dict[str, Any], place: World, model: nn.Module, path: str) -> dict[str, Any]:
    """The run's settings with batches and buffers of this network's, unclipped, in float32."""
    own = copy.deepcopy(settings)
    own |= {"train_batch_size": place.size, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    own["torch_autocast"]["enabled"] = False
    zero = own["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            zero[key]["nvme_path"] = path
    if zero.get("offload_param", {}).get("device") == "nvme":
        zero["offload_param"] |= {"buffer_size": max(p.numel() for p in model.parameters()), "buffer_count": 8}
    return own


def _without(config: Config, place: World, cpu_adam: bool) -> dict[str, Tensor]:
    """The weights after the same steps of plain torch, on the CPU, where the optimiser is stepped."""
    model = Network(place.size)
    optimizer = build_optimizer(model, config.recipe, cpu_adam)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.zeros(())).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
