"""One small interface over DeepSpeed and plain torch: forward, backward, step.

Both accumulate micro batches, clip and step the same optimiser, and both give the gradient of any parameter after the last
backward of a step: averaged over ranks, over the whole accumulated batch, before clipping.
"""

import contextlib
import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepscale import engine_config, engine_states
from deepscale.config import Config
from deepscale.engine_states import Held
from deepscale.models.components import LOW_PRECISION
from deepscale.nvme import states, transfer
from deepscale.nvme.folder import own_folder
from deepscale.nvme.states import Swapped
from deepscale.optim import build_optimizer
from deepscale.world import World

# torch's compiler and an optimiser, with which both merely decorate functions.
LATE = ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")


class Share(NamedTuple):
    """A rank's part of a parameter: elements `start` and following of the flat weight, and of its gradient. All ranks' make the whole."""

    start: int
    gradient: Tensor  # (k,)
    weight: Tensor  # (k,), the memory that the step changes, perhaps on another device than the gradient
    again: Callable[[], Tensor] | None = None  # where the weight is a copy of what rests on a disk: reads it anew


def replicated(parameter: nn.Parameter, rank: int = 0, size: int = 1) -> Share:
    """The rank's part of a parameter that every rank holds whole, with a gradient that every rank has (zeros where there is none)."""
    start, end = (parameter.numel() * r // size for r in (rank, rank + 1))
    weight = parameter.detach().reshape(-1)[start:end]
    gradient = torch.zeros_like(weight) if parameter.grad is None else parameter.grad.reshape(-1)[start:end]
    return Share(start, gradient, weight)


class LossScaleState(NamedTuple):
    """fp16's loss scale, and the steps since it last changed."""

    value: float
    steps: int


class Engine(Protocol):
    """What the loop needs."""

    name: str
    module: nn.Module
    optimizer: Optimizer
    settings: dict[str, Any]
    world: World

    def forward(self, images: Tensor, last: bool = True) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes), in the run's precision; `last` as in backward."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of one micro batch's mean loss; `last` ends the step's accumulation and averages over ranks."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The step's gradient, before clipping, unscaled; between the last backward and step. Every rank must ask."""
        ...

    def share(self, parameter: nn.Parameter) -> Share:
        """This rank's part of a parameter and of its gradient, as `gradient` gives it and when it may be asked for. Nothing is sent."""
        ...

    def held(self, parameter: nn.Parameter) -> Held:
        """This rank's part of a parameter and of the optimiser's state, between two steps. Nothing is sent."""
        ...

    def restored(self, scale: LossScaleState | None) -> None:
        """After what `held` gave was overwritten: brings the rest in line with it, and sets fp16's loss scale. Every rank must call."""
        ...

    def loss_scale(self) -> float:
        """What fp16 multiplies the step's loss by, and with it the gradients of activations; 1 otherwise."""
        ...

    def loss_scale_state(self) -> LossScaleState | None:
        """fp16's loss scale and what its rule remembers; None in other precisions."""
        ...

    def step(self) -> None:
        """Clips, steps, forgets the gradients."""
        ...


class TorchEngine:
    """Plain torch: the reference of the DeepSpeed engine, and the engine where DeepSpeed is absent."""

    name = "torch"

    def __init__(self, module: nn.Module, config: Config, world: World) -> None:
        self.module, self.world = module, world
        self.settings: dict[str, Any] = {}
        self.optimizer = build_optimizer(module, config.recipe)
        self.parameters = list(module.parameters())
        self.clip, self.accumulation = config.recipe.clip, config.recipe.accumulation
        self.dtype = LOW_PRECISION.get(config.engine.precision)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.engine.precision == "fp16")
        self.parallel = module
        if world.size > 1:
            self.parallel = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    def forward(self, images: Tensor, last: bool = True) -> Tensor:
        if isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            self.parallel.require_backward_grad_sync = last
        with torch.autocast(self.world.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits: Tensor = self.parallel(images)
        return logits

    def backward(self, loss: Tensor, last: bool) -> None:
        self.scaler.scale(loss / self.accumulation).backward()
        if last:
            self.scaler.unscale_(self.optimizer)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    def share(self, parameter: nn.Parameter) -> Share:
        return replicated(parameter, self.world.data_rank, self.world.data_size)

    def held(self, parameter: nn.Parameter) -> Held:
        return engine_states.replicated(parameter, self.optimizer)

    def restored(self, scale: LossScaleState | None) -> None:
        if scale is not None:
            set_scaler(self.scaler, scale)

    def loss_scale(self) -> float:
        return float(self.scaler.get_scale())

    def loss_scale_state(self) -> LossScaleState | None:
        return scaler_state(self.scaler)

    def step(self) -> None:
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def scaler_state(scaler: torch.amp.GradScaler) -> LossScaleState | None:
    """What torch's rule remembers, if the scaler scales."""
    return LossScaleState(float(scaler.get_scale()), int(scaler.state_dict()["_growth_tracker"])) if scaler.is_enabled() else None


def set_scaler(scaler: torch.amp.GradScaler, state: LossScaleState) -> None:
    """Makes torch's rule go on from a state; nothing happens where the scaler does not scale."""
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {"scale": state.value, "_growth_tracker": state.steps})


class LossScale:
    """fp16's loss scale under ZeRO 1-3, by the rule of torch's GradScaler.

    DeepSpeed 0.19.8's own GradScaler there clips the gradients while they are still scaled, steps each parameter group and each
    rank's part for itself, so that some skip a step and others do not, and never lowers the scale once the clipped norm overflowed.
    """

    GROWTH_STEPS = 2000

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.value, self.steps = optimizer, 2.0**16, 0
        optimizer.torch_autocast_gradscaler = None
        optimizer.override_loss_scale(self.value)

    def update(self) -> None:
        """After a step: half the scale if the gradients overflowed, which skipped the step; twice after 2,000 that did not."""
        self.steps = 0 if self.optimizer.overflow else self.steps + 1
        if self.optimizer.overflow:
            self.value /= 2
        elif self.steps == self.GROWTH_STEPS:
            self.value, self.steps = self.value * 2, 0
        self.optimizer.override_loss_scale(self.value)


class DeepSpeedEngine:
    """DeepSpeed's engine with a resolved configuration (engine_config.py)."""

    name = "deepspeed"

    def __init__(self, module: nn.Module, config: Config, world: World, cpu_adam: bool = False) -> None:
        import deepspeed

        self.settings = engine_config.resolve(config, world.size, cpu_adam)
        engine_config.refuse_unknown(self.settings, engine_config.path_of(config))
        zero = self.settings["zero_optimization"]
        self.cut_up, offloaded = zero.get("stage") == 3, "offload_optimizer" in zero
        if config.engine.offload == "nvme":
            _rest_on_disk(zero)
        self.optimizer = build_optimizer(module, config.recipe, cpu_adam and offloaded)
        with quiet(config.engine.verbose):
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=self.settings)
        if world.size == 1 and zero.get("stage") == 0:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients together and apart again, to average them over one rank
        self.module = module
        self.swapped = Swapped(self.engine.optimizer) if getattr(self.engine.optimizer, "swap_optimizer", False) else None
        self.z0_scaler = self.engine.torch_autocast_z0_gradscaler
        own = getattr(self.engine.optimizer, "torch_autocast_gradscaler", None)
        self.scale = LossScale(self.engine.optimizer) if own is not None else None
        self.world = world

    def forward(self, images: Tensor, last: bool = True) -> Tensor:
        if self.swapped is not None:
            self.swapped.leave()
        logits: Tensor = self.engine(images)
        if self.cut_up and not torch.is_grad_enabled():
            # ZeRO-3 has gathered ahead for a backward pass that does not come, and would forget that these parameters are there.
            self.engine.optimizer.empty_partition_cache()
        return logits

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # counts the micro batch; DeepSpeed steps at the boundary only

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        gradient: Tensor | None
        if self.swapped is not None and hasattr(parameter, "ds_id"):
            gradient = self.swapped.whole_gradient(parameter)
        else:
            gradient = safe_get_full_grad(parameter)
        return None if gradient is None else self._unscaled(gradient)

    def share(self, parameter: nn.Parameter) -> Share:
        if hasattr(parameter, "ds_id"):
            own = _zero3_share(parameter, self.world.rank)
        elif hasattr(parameter, "_hp_mapping"):
            own = _zero12_share(parameter)
        else:
            own = replicated(parameter, self.world.data_rank, self.world.data_size)
        return own._replace(gradient=self._unscaled(own.gradient))

    def held(self, parameter: nn.Parameter) -> Held:
        if hasattr(parameter, "ds_id"):
            changed = self.swapped.bring(parameter) if self.swapped is not None else None
            return engine_states.zero3(parameter, self.world.rank, changed)
        if hasattr(parameter, "_hp_mapping"):
            return engine_states.zero12(parameter, self.engine.optimizer)
        return engine_states.replicated(parameter, self.optimizer)

    def restored(self, scale: LossScaleState | None) -> None:
        if self.swapped is not None:
            self.swapped.leave()
        if self.cut_up:
            # What is gathered now holds the old values; small parameters that a file keeps gathered are gathered again.
            self.engine.optimizer.checkpoint_event_prologue()
            self.engine.optimizer.checkpoint_event_epilogue()
        if scale is not None and self.scale is not None:
            self.scale.value, self.scale.steps = scale
            self.engine.optimizer.override_loss_scale(scale.value)
        if scale is not None and self.z0_scaler is not None:
            set_scaler(self.z0_scaler, scale)

    def loss_scale(self) -> float:
        if self.scale is not None:
            return self.scale.value
        return 1.0 if self.z0_scaler is None else float(self.z0_scaler.get_scale())

    def loss_scale_state(self) -> LossScaleState | None:
        if self.scale is not None:
            return LossScaleState(self.scale.value, self.scale.steps)
        return None if self.z0_scaler is None else scaler_state(self.z0_scaler)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        scale = self.loss_scale()
        return gradient if scale == 1.0 else gradient / scale

    def step(self) -> None:
        self.engine.step()
        if self.scale is not None:
            self.scale.update()


def _zero12_share(parameter: Any) -> Share:
    """The fragment of a parameter whose optimiser state ZeRO 1 or 2 has put on this rank; empty where there is none."""
    weight, mapping = parameter.detach().reshape(-1), parameter._hp_mapping
    if mapping is None:
        return Share(0, weight[:0], weight[:0])
    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)
    return Share(start, gradient.to(weight.device), weight[start : start + numel])


def _zero3_share(parameter: Any, rank: int) -> Share:
    """This rank's partition of a parameter that ZeRO-3 has cut up, without the padding of the last one."""
    piece = parameter.ds_tensor.ds_numel
    start = min(rank * piece, parameter.ds_numel)
    numel = min(piece, parameter.ds_numel - start)
    zero = parameter._z3_optimizer
    gradient = states.gradient(parameter) if zero.swap_optimizer else zero.get_local_fp32_grad_for_param(parameter)
    again = functools.partial(states.weight, parameter, numel) if states.on_disk(parameter) else None
    weight = again() if again else parameter.ds_tensor.detach().reshape(-1)[:numel]
    return Share(start, gradient.reshape(-1)[:numel], weight, again)


def _rest_on_disk(zero: dict[str, Any]) -> None:
    """Makes DeepSpeed move what rests on the disk by our own reads and writes, to a folder of this rank's."""
    transfer.install()
    sections = [zero[key] for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device") == "nvme"]
    own = str(own_folder(sections[0]["nvme_path"]))
    for section in sections:
        section["nvme_path"] = own


def preload(config: Config) -> None:
    """Imports now what AdamW's constructor and deepspeed.initialize would import: 0.2 GB that are not the network's."""
    for name in LATE if config.engine.engine == "deepspeed" else LATE[:1]:
        with contextlib.suppress(ImportError):  # versions that do not have it do not import it
            importlib.import_module(name)


def build_engine(module: nn.Module, config: Config, world: World, cpu_adam: bool = False) -> Engine:
    """The engine that the planned configuration names."""
    if config.engine.engine == "torch":
        return TorchEngine(module, config, world)
    if world.stages > 1:
        from deepscale.engine_pipeline import PipelineEngine

        return PipelineEngine(module, config, world)
    return DeepSpeedEngine(module, config, world, cpu_adam)


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Keeps DeepSpeed's start from talking: its log lines below errors and what it prints to standard output."""
    if verbose:
        yield
        return
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import has set the level back
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield


def hush(verbose: bool) -> None:
    """Sets the log levels of the libraries underneath; called before they are imported."""
    if not verbose:
        for name in ("DeepSpeed", "deepspeed", "torch.distributed", "numba"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=r"(deepspeed|torch)\b.*")
            # Attributed to our lines: a schedule that catches up on calibration steps or on a step that fp16 skipped, and DDP's new name
            # for an argument that torch 2.11 only knows by the old one.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
