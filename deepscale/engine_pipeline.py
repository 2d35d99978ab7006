"""DeepSpeed's PipelineEngine behind the engines' interface: a rank has one stage of the network, the others' parts are on the meta device."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepscale import engine_config
from deepscale.config import Config
from deepscale.engine import DeepSpeedEngine, Share, quiet
from deepscale.engine_states import Held, kinds_of
from deepscale.evaluation import sums
from deepscale.models.convnext import cross_entropy
from deepscale.models.network import Network
from deepscale.optim import build_optimizer
from deepscale.world import World

Batches = Iterator[tuple[Tensor, Tensor]]


def materialise(model: Network, first: int, end: int, device: torch.device) -> None:
    """Gives a network on the meta device memory for these of its parts."""
    for part in model.parts()[first:end]:
        part.to_empty(device=device)


class StageParts(nn.Module):
    """Consecutive parts as one module. Between stages the stream is sent as rows, (B, H, W, C): a message has no other memory order."""

    def __init__(self, parts: Sequence[nn.Module], first: bool, last: bool) -> None:
        super().__init__()
        self.parts, self.first, self.last = nn.ModuleList(parts), first, last

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W), or rows of the stage before, -> rows, or logits."""
        x = x if self.first else x.permute(0, 3, 1, 2)
        for part in self.parts:
            x = part(x)
        return x if self.last else x.permute(0, 2, 3, 1).contiguous()


def own_parts(model: Network) -> list[nn.Module]:
    """The parts that have memory here."""
    return [part for part in model.parts() if not any(parameter.is_meta for parameter in part.parameters())]


class PipelineEngine(DeepSpeedEngine):
    """All micro batches of a step go through the stages in one call (`passes`); between it and `step` gradients are what other engines give."""

    def __init__(self, module: nn.Module, config: Config, world: World) -> None:
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        assert isinstance(module, Network)
        self.module, self.world, self.cut_up = module, world, False
        self.scale = self.z0_scaler = self.swapped = None
        self.settings = engine_config.resolve(config, world.data_size, False)
        engine_config.refuse_unknown(self.settings, engine_config.path_of(config))
        self.accumulation = config.recipe.accumulation
        self.first, self.last = world.stage == 0, world.stage == world.stages - 1
        self.totals = torch.zeros(3, dtype=torch.float64, device=world.device)
        parts = StageParts(own_parts(module), self.first, self.last)
        for parameter in parts.parameters():
            # Under ZeRO 0 DeepSpeed 0.19.8 clips by the norm of the first stage's gradients alone, and of those that say this of themselves.
            parameter.model_parallel = True  # type: ignore[attr-defined]
        self.optimizer = build_optimizer(parts, config.recipe)
        # One layer for each stage: where to cut is decided already, and DeepSpeed builds only the own.
        layers = [parts if stage == world.stage else LayerSpec(nn.Identity) for stage in range(world.stages)]
        with quiet(config.engine.verbose):
            # Evaluation's batches are larger than micro batches, so shapes are sent with every one.
            pipe = PipelineModule(layers, num_stages=world.stages, loss_fn=self._loss, partition_method="uniform", dynamic_shape=True)
            self.engine, *_ = deepspeed.initialize(model=pipe, optimizer=self.optimizer, config=self.settings)
        # The loop looks at the gradients before it steps.
        self.engine._INSTRUCTION_MAP = self.engine._INSTRUCTION_MAP | {OptimizerStep: lambda engine: None}
        if world.data_size == 1 and self.settings["zero_optimization"].get("stage") == 0:
            self.engine.pipeline_enable_backward_allreduce = False  # it would copy all gradients together and apart, to average them over one rank
        self.nothing = torch.empty(0, device=world.device)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits, labels)
        self.totals += sums(logits, loss, labels)
        return loss

    def passes(self, batches: Batches) -> Tensor:
        """Forward and backward passes of a step's micro batches: this rank's (loss times images, correct, images), of the last stage alone."""
        self.totals.zero_()
        if not (self.first or self.last):  # which DeepSpeed gives no images
            for _ in range(self.accumulation):
                next(batches)
        self.engine.train_batch(batches)
        return self.totals.clone()

    def forward(self, images: Tensor, last: bool = True) -> Tensor:
        """Without gradients: logits (B, classes) on the last stage, nothing (0,) on the others. All ranks must call."""
        self.engine.total_loss = None  # where DeepSpeed adds up what a pass gives
        batch = iter([(images, self.nothing)])
        _, logits = self.engine.eval_batch(
            batch, return_logits=True, compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=1
        )  # fmt: skip
        return self.nothing if logits is None else logits

    def backward(self, loss: Tensor, last: bool) -> None:
        raise RuntimeError("a pipeline runs forward and backward passes together: call passes()")

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.is_meta else super().gradient(parameter)

    def share(self, parameter: nn.Parameter) -> Share:
        return Share(0, self.nothing, self.nothing) if parameter.is_meta else super().share(parameter)

    def held(self, parameter: nn.Parameter) -> Held:
        if parameter.is_meta:
            return Held(0, self.nothing, dict.fromkeys(kinds_of(self.optimizer), self.nothing))
        return super().held(parameter)

    def gathered(self) -> dict[str, Tensor]:
        """The whole network's parameters on the CPU, each from the first rank that has it. Every rank must ask."""
        state = self.module.state_dict(keep_vars=True)
        there = self.world.gather({name for name, value in state.items() if not value.is_meta})
        found = {}
        for name, value in state.items():
            owner = next(rank for rank, names in enumerate(there) if name in names)
            whole = torch.empty(value.shape, device=self.world.device) if value.is_meta else value.detach().contiguous()
            dist.broadcast(whole, owner)
            found[name] = whole.cpu()
        return found

    def step(self) -> None:
        self.engine._exec_optimizer_step()
