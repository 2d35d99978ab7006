"""Every setting of a run, once: frozen dataclasses with unit, meaning and default rule beside each field.

The command line is made from these classes (`parse`), the tracker's flat parameters too (`flat`). "auto" values are
resolved by the planner before anything is built; `None` means absent and 0.0 means zero.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deepscale import pipeline
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.errors import UsageError, unknown_choice
from deepscale.models import registry
from deepscale.parsing import (
    Every,
    integer,
    one_of,
    or_word,
    pairs_text,
    parse_blocks,
    parse_count,
    parse_depth,
    parse_duration,
    parse_every,
    parse_tags,
    real,
)

Auto = Literal["auto"]
AUTO: Auto = "auto"
StackSize = int | tuple[int, ...]  # blocks per stack: of every stage, or of each


def _auto(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return or_word("auto", parse, AUTO)


def _stack_size(text: str) -> StackSize:
    return parse_blocks(text) if "," in text else parse_count(text)


def _option(default: Any, text: str, parse: Callable[[str], Any] = str, short: dict[str, str] | None = None) -> Any:
    """`short`: switches that stand for a value, {"--switch": value}."""
    return field(default=default, metadata={"help": text, "parse": parse, "short": short or {}})


def _switch(default: bool | Auto, text: str) -> Any:
    return field(default=default, metadata={"help": text, "switch": True})


# ------------------------------------------------------------------------------------------------------------- settings

MODEL_NAMES = tuple(registry.MODELS)
OPTIMIZER_NAMES = ("adamw", "adam", "sgd")
ACTIVATION_NAMES = ("gelu", "relu", "silu", "tanh", "sigmoid")
NORM_NAMES = ("layernorm", "batchnorm", "rmsnorm", "none")  # ConvNeXt's
ALL_NORM_NAMES = (*NORM_NAMES, "tensornorm")
SKIP_NAMES = ("identity", "deepnorm", "reversible", "none")
INIT_NAMES = ("normal", "kaiming", "orthogonal", "torch", "delta-orthogonal", "paired", "mirrored", "fixup", "deepnorm")
# What a forward pass leaves for its backward (activations.py); the first two recompute no whole block.
ACTIVATION_POLICIES = ("keep", "selective", "recompute", "offload", "revolve")
REVERSIBLE_POLICIES = ("keep", "reconstruct")  # with --skip reversible
IN_SEGMENTS = ("recompute", "offload", "revolve")
DATASET_NAMES = ("auto", "cifar10", "cifar100", "fashionmnist", "folder", "synthetic")


class _Checked:
    """Settings given in code know their names as well as typed ones do."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            known, value = getattr(f.metadata.get("parse"), "known", None), getattr(self, f.name)
            if known and value not in known:
                raise unknown_choice(f"--{f.name.replace('_', '-')}", str(value), known)


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """The network. Defaults are ConvNeXt's; models/registry.py has those of the others. B batch, C channels of a stage, N blocks of a stage."""

    depth: int = _option(26, "layers, rounded up to the next that the network can have; ConvNeXt: stem + 3 per block + head", parse_depth)
    blocks: tuple[int, ...] | None = _option(None, "blocks per stage a,b,c,d; overrides --depth", parse_blocks)
    model: str = _option("convnext", f"network: {', '.join(MODEL_NAMES)}; each knows some of the settings here", one_of(MODEL_NAMES))
    width: int | Auto = _option(AUTO, "channels of stage 1, doubled at each stage; auto: 64 where it fits", _auto(integer(1)))
    patch_size: int | Auto = _option(AUTO, "side and stride of the stem's convolution, pixels; auto: 1 where time allows", _auto(integer(1)))
    kernel_size: int = _option(3, "side of the depthwise convolutions, pixels, odd", integer(1))
    activation: str = _option("gelu", f"activation of the blocks: {', '.join(ACTIVATION_NAMES)}", one_of(ACTIVATION_NAMES))
    norm: str = _option("layernorm", f"normalisation: {', '.join(NORM_NAMES)}; of mlp also tensornorm", one_of(ALL_NORM_NAMES))
    norm_scope: str = _option("all", "where --norm applies: all (stem, blocks, downsamplings, head) or blocks", one_of(("all", "blocks")))
    skip: str = _option(
        "identity",
        f"skip connection of every block: {', '.join(SKIP_NAMES)}; deepnorm: x + branch / blocks^(1/4); reversible: halves of the channels are "
        "coupled, and backward reconstructs what forward does not keep",
        one_of(SKIP_NAMES),
    )
    skip_scope: str = _option("blocks", "where --skip applies in vgg: blocks, or all (those that halve the image, too)", one_of(("blocks", "all")))
    skip_pairs: str | None = _option(
        None,
        "skip connections of mlp from hidden layer to hidden layer: 1-3,4-7 adds layer 1's output to layer 3's",
        or_word("none", pairs_text, None),
    )
    gradient_normalisation: bool = _switch(False, "in mlp: make the gradient at each hidden layer's output of mean 0 and deviation 1")
    init: str = _option("normal", f"initial weights: {', '.join(INIT_NAMES)}; kaiming is He's, torch its default, biases too", one_of(INIT_NAMES))
    init_std: float = _option(0.02, "deviation of --init normal", real(0.0))
    sigma_w: float | None = _option(
        None, "plain network: factor of its weights; none: 1, or with delta-orthogonal ones the critical value", or_word("none", real(0.0), None)
    )
    sigma_b: float | None = _option(
        None, "plain network: deviation of its biases; none: 0, or with delta-orthogonal weights the critical value", or_word("none", real(0.0), None)
    )
    layerscale_init: float | None | Auto = _option(
        AUTO,
        "initial LayerScale gamma: a number, or none for no gamma; auto: none with --skip none or deepnorm, else 0, and 1 with --init fixup",
        or_word("none", _auto(real(-1e6)), None),
    )
    layerscale_shape: str = _option("scalar", "gamma per block: one scalar, or one per channel", one_of(("scalar", "channel")))
    drop_path: float = _option(0.0, "stochastic depth rate of the last block, growing linearly from 0", real(0.0, 0.99))
    drop_path_mode: str = _option(
        "sample",
        "what stochastic depth drops a block for: single images (sample), or the whole micro batch (batch), whose block is then not computed",
        one_of(("sample", "batch")),
    )
    sync_batchnorm: bool = _switch(False, "share BatchNorm's batch statistics over ranks")

    def __post_init__(self) -> None:
        super().__post_init__()
        registry.check(self)
        if self.init != "normal" and self.init_std != 0.02:
            raise UsageError(f"--init-std {self.init_std:g} is for --init normal, and --init {self.init} was given; leave --init-std out")
        if self.kernel_size % 2 == 0:
            raise UsageError(f"--kernel-size {self.kernel_size} is even; an odd side keeps the resolution: type 3, 5 or 7")
        if self.skip == "none" and self.layerscale_init == 0.0:
            raise UsageError(
                "--skip none with --layerscale-init 0 leaves nothing to train: without a skip the only path is multiplied by "
                "gamma 0; type --layerscale-init none or 1"
            )
        if self.drop_path and self.drop_path_mode == "batch" and (self.skip == "none" or self.norm == "batchnorm"):
            why = "a dropped block has only its skip" if self.skip == "none" else "BatchNorm would have no batch to measure in a dropped block"
            typed = "--skip none" if self.skip == "none" else "--norm batchnorm"
            raise UsageError(f"--drop-path-mode batch is not possible with {typed}: {why}; type --drop-path-mode sample")
        if self.skip == "reversible" and self.width != AUTO and int(self.width) % 2:
            raise UsageError(f"--skip reversible couples two halves of the channels, and --width {self.width} is odd; type an even --width")
        if self.init == "fixup" and self.skip == "none":
            raise UsageError(
                "--init fixup with --skip none leaves nothing to train: the last layer of every block is 0, and without a skip the only "
                "path goes through it; type --skip identity, or another --init"
            )
        if self.init == "fixup" and self.gamma_init == 0.0:
            raise UsageError(
                "--init fixup with --layerscale-init 0 leaves nothing to train in the blocks: the last layer of every branch is 0, and so is "
                "gamma, and each hides the other from its gradient; type --layerscale-init 1 or none"
            )

    @property
    def gamma_init(self) -> float | None:
        """Initial LayerScale gamma, None for none; `auto` is the published code's 0, Fixup's 1, and none without a skip and with DeepNorm's."""
        if self.layerscale_init == AUTO:
            return None if self.skip not in ("identity", "reversible") else 1.0 if self.init == "fixup" else 0.0
        return self.layerscale_init

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Blocks of ConvNeXt's four stages; none of another network."""
        return (self.blocks or blocks_for_depth(self.depth)) if self.model == "convnext" else ()

    @property
    def built_depth(self) -> int:
        """Layers of the network that is really built."""
        return depth_of_blocks(self.blocks) if self.blocks else registry.MODELS[self.model].depth(self.depth)


@dataclass(frozen=True)
class DataConfig(_Checked):
    """The images."""

    dataset: str = _option(AUTO, f"data set: {', '.join(DATASET_NAMES)}; auto: CIFAR-10, or synthetic where it cannot be had", one_of(DATASET_NAMES))
    data_dir: str = _option("data", "folder of the data sets; an image folder holds {train,test}/<class>/*")
    download: bool = _switch(True, "download a missing data set")
    feed: str = _option(AUTO, "what feeds the images: ffcv, tensors (in memory), or auto", one_of(("auto", "ffcv", "tensors")))
    synthetic_classes: int = _option(10, "classes of the synthetic data set", integer(2, 1000))
    batch_size: int | Auto = _option(AUTO, "images per optimiser step over all ranks; auto: 64 where time allows", _auto(integer(1)))
    grey: bool = _switch(False, "images in grey: ITU-R 601 luma, one channel")
    image_size: int | Auto = _option(
        AUTO,
        "side of the images, pixels; auto: the data set's own, of FashionMNIST 32 by a frame around its 28; another: by bilinear resampling",
        _auto(integer(1)),
    )
    augment: bool = _switch(True, "random crop (padding 4) and horizontal flip in training")
    color_jitter: float = _option(0.0, "brightness, contrast and saturation jitter; the original study: 0.2", real(0.0, 1.0))
    workers: int | Auto = _option(AUTO, "threads of the feed per rank", _auto(integer(1)))
    eval_images: int | Auto = _option(
        AUTO, "images of validation and of test that are evaluated; auto: all, or what the time budget allows", _auto(integer(1))
    )


@dataclass(frozen=True)
class RecipeConfig(_Checked):
    """Optimiser, schedule and length."""

    optimizer: str = _option("adamw", f"what steps the weights: {', '.join(OPTIMIZER_NAMES)}", one_of(OPTIMIZER_NAMES))
    lr: float = _option(1e-3, "peak learning rate", real(0.0))
    weight_decay: float = _option(
        0.01, "weight decay of convolution and linear weights: decoupled with adamw, added to the gradient with adam and sgd", real(0.0)
    )
    beta1: float = _option(0.9, "Adam's beta1; the onecycle schedule cycles it 0.95 -> 0.85 -> 0.95", real(0.0, 0.9999))
    beta2: float = _option(0.999, "Adam's beta2", real(0.0, 0.99999))
    eps: float = _option(1e-8, "Adam's epsilon", real(0.0))
    momentum: float = _option(0.0, "momentum of --optimizer sgd; above 0 the onecycle schedule cycles it like beta1", real(0.0, 0.9999))
    schedule: str = _option("onecycle", "learning rate over the run: onecycle, cosine, constant", one_of(("onecycle", "cosine", "constant")))
    schedule_every: str = _option("step", "how often the schedule moves: every step, or every epoch", one_of(("step", "epoch")))
    min_lr: float = _option(0.0, "learning rate at which --schedule cosine ends", real(0.0))
    clip: float = _option(5.0, "largest global gradient norm; 0 switches clipping off", real(0.0))
    accumulation: int = _option(1, "micro batches per optimiser step", integer(1))
    epochs: int = _option(100, "passes over the training images", integer(1))
    max_steps: int | None = _option(None, "optimiser steps; ends the run before --epochs", or_word("none", integer(1), None))
    time_budget: float | None = _option(
        None, "length of training and evaluation: 90s, 5m, 2h; sets the number of steps", or_word("none", parse_duration, None)
    )
    eval_every: int | Auto = _option(AUTO, "optimiser steps between validations; auto: an epoch, and the end", _auto(integer(1)))
    freeze: int = _option(0, "layers, from the first on, that are not trained", integer(0))
    seed: int = _option(0, "initial values, data order and augmentation", integer(0, 2**31 - 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum and self.optimizer != "sgd":
            raise UsageError(f"--momentum {self.momentum:g} is for --optimizer sgd, and --optimizer {self.optimizer} was given; leave --momentum out")
        if self.min_lr and self.schedule != "cosine":
            raise UsageError(f"--min-lr {self.min_lr:g} is for --schedule cosine, and --schedule {self.schedule} was given; leave --min-lr out")
        if self.min_lr > self.lr:
            raise UsageError(f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}, where the schedule begins; type a lower --min-lr")


@dataclass(frozen=True)
class EngineConfig(_Checked):
    """How the network runs: engine, memory, precision."""

    engine: str = _option("deepspeed", "deepspeed, or torch for the same loop without it", one_of(("deepspeed", "torch")))
    zero: int | Auto = _option(AUTO, "DeepSpeed's ZeRO stage: 0, 1, 2 or 3", _auto(integer(0, 3)))
    offload: str = _option(
        AUTO, "where optimiser (ZeRO 1-3) and parameters (ZeRO-3) rest: none, cpu, nvme (a disk)", one_of(("auto", "none", "cpu", "nvme"))
    )
    nvme_path: str | None = _option(None, "folder on a local disk for --offload nvme; none: none", or_word("none", str, None))
    deepspeed_config: str | None = _option(None, "a DeepSpeed configuration file instead of the ones in ds_configs/")
    pipeline_stages: int = _option(
        1, "parts that the depth is cut into, each on ranks of its own, as many as divide the number of ranks; 1: every rank has all", integer(1)
    )
    precision: str = _option(
        AUTO, "of the blocks' branches: fp32, bf16, fp16; the residual stream stays float32", one_of(("auto", "fp32", "bf16", "fp16"))
    )
    activations: str = _option(
        AUTO,
        "what is kept for backward: keep (all), selective (what is dear to compute), recompute (a block's input per segment), "
        "offload (the same, in host memory), revolve (as many of these inputs as there are --slots, the others computed again from them), "
        "reconstruct (nothing, with --skip reversible); auto: the fastest that fits, or reconstruct",
        one_of((AUTO, *ACTIVATION_POLICIES, "reconstruct")),
        short={"--recompute": "recompute", "--no-recompute": "keep"},
    )
    stack_size: StackSize | Auto = _option(
        AUTO,
        "blocks per stack, which share their parameter tensors, or a,b,c,d per stage; auto: sqrt(blocks) in stage 3, as many parameters elsewhere",
        _auto(_stack_size),
    )
    segment: int | None | Auto = _option(
        AUTO,
        "blocks recomputed together, with --activations recompute, offload or revolve; auto: 4, or about sqrt(blocks / 10) where memory is short; "
        "given with --activations auto, a number means recompute, and none that no block is recomputed",
        or_word("none", _auto(integer(1)), None),
    )
    slots: StackSize | None | Auto = _option(
        AUTO,
        "inputs of segments that --activations revolve holds of every stage at a time, or a,b,c,d per stage; auto: those that need the fewest FLOPs "
        "in the memory that there is; given with --activations auto, a number means revolve",
        or_word("none", _auto(_stack_size), None),
    )
    device: str = _option(AUTO, "cuda, cpu, or auto", one_of(("auto", "cuda", "cpu")))
    kernel: str = _option(
        AUTO,
        "what computes the blocks: native (compiled once, for the CPU), torch (its operators), or auto",
        one_of(("auto", "native", "torch")),
    )
    threads: int | Auto = _option(AUTO, "CPU threads of a rank; auto: the cores shared out over the local ranks", _auto(integer(1)))
    hang_timeout: float | None = _option(
        1800.0, "longest wait of a rank for the others before the run ends, 90s, 30m or none", or_word("none", parse_duration, None)
    )
    local_rank: int = _option(-1, "set by DeepSpeed's launcher", int)
    verbose: bool = _switch(False, "show all messages of DeepSpeed and other libraries")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations in ("keep", "selective", "reconstruct") and self.segment not in (AUTO, None):
            raise UsageError(
                f"--segment {self.segment} is for --activations recompute, offload or revolve, and --activations {self.activations} was given; "
                f"leave --segment out, or type --activations recompute"
            )
        if self.activations in IN_SEGMENTS and self.segment is None:
            raise UsageError(
                f"--segment none recomputes no block, and --activations {self.activations} was given; leave --segment out, or type --activations keep"
            )
        if self.activations not in (AUTO, "revolve") and self.slots not in (AUTO, None):
            raise UsageError(
                f"{' '.join(typed('slots', self.slots))} is for --activations revolve, and --activations {self.activations} was given; "
                f"leave --slots out, or type --activations revolve"
            )
        if self.activations == "revolve" and self.slots is None:
            raise UsageError("--slots none holds no inputs, and --activations revolve was given; leave --slots out, or type --activations recompute")
        if self.activations == AUTO and self.slots not in (AUTO, None) and self.segment is None:
            raise UsageError(f"{' '.join(typed('slots', self.slots))} holds inputs of segments, and --segment none has none; leave one of them out")


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is recorded."""

    tracking: bool = _switch(True, "record the run in MLflow (MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
    experiment: str = _option("deepscale", "MLflow experiment")
    record_every: int | Auto = _option(
        AUTO, "optimiser steps between records of every layer's gradient; auto: dense early, sparse later; 0: none", _auto(integer(0))
    )
    vanishing_ratio: float = _option(1e-4, "the gradient vanishes where the first block's is below this share of the last block's", real(0.0, 1.0))
    exploding_ratio: float = _option(1e3, "the gradient explodes where a block's is more than this many times the last block's", real(1.0))
    run_name: str | None = _option(None, "name of the run; default: made of depth and what differs from the defaults")
    tags: tuple[str, ...] | None = _option(None, "MLflow tags of the run: question=depth,seen=yes", or_word("none", parse_tags, None))


@dataclass(frozen=True)
class CheckpointConfig(_Checked):
    """What is saved of a run while it runs, and where it goes on from."""

    checkpoint_every: Every | None = _option(
        None, "steps or time between checkpoints: 500steps, 90s, 10m; none: no checkpoints", or_word("none", parse_every, None)
    )
    checkpoint_dir: str | None = _option(
        None,
        "folder for the checkpoints and the trained weights (model.safetensors); "
        "by itself checkpoints/<what was asked> with --checkpoint-every or --resume auto, else nothing is saved",
    )
    resume: str = _option("never", "auto: go on from the newest checkpoint of --checkpoint-dir, if there is one; PATH: from this one; or never")
    init_from: str | None = _option(
        None,
        "weights to start from where they fit: a model.safetensors, a checkpoint, or a --checkpoint-dir of another run; none: none",
        or_word("none", str, None),
    )
    init_layers: int | None = _option(None, "of --init-from, how many layers from the first on; none: all", or_word("none", integer(1), None))
    keep: int = _option(2, "newest checkpoints that are kept, beside the best", integer(1))
    async_save: bool | Auto = _switch(AUTO, "write checkpoints while training goes on, from a copy in memory; auto: where the copy fits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_layers is not None and self.init_from is None:
            raise UsageError(f"--init-layers {self.init_layers} is for --init-from, which was not given; type --init-from FILE, too")


@dataclass(frozen=True)
class Config:
    """All settings of one training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        odd = f"--accumulation {self.recipe.accumulation}" if self.recipe.accumulation > 1 else ""
        odd = "--precision fp16" if self.engine.precision == "fp16" else odd
        if self.model.gradient_normalisation and odd:
            raise UsageError(f"{odd} scales the loss, and --gradient-normalisation lets no scale of it through; leave one of them out")
        self._check_reversible()
        pipeline.check(self)

    def _check_reversible(self) -> None:
        """Raises UsageError for what is kept for backward in a way that the skip connection does not have."""
        engine, reversible = self.engine, self.model.skip == "reversible"
        if not reversible and engine.activations == "reconstruct":
            raise UsageError(
                f"--activations reconstruct needs blocks whose input follows from their output, and --skip {self.model.skip} has none; "
                f"type --skip reversible, too, or --activations recompute"
            )
        if not reversible or (engine.activations in (AUTO, *REVERSIBLE_POLICIES) and {engine.segment, engine.slots} <= {AUTO, None}):
            return
        given = f"--segment {engine.segment}" if engine.segment not in (AUTO, None) else " ".join(typed("slots", engine.slots))
        given = f"--activations {engine.activations}" if engine.activations not in (AUTO, *REVERSIBLE_POLICIES) else given
        raise UsageError(
            f"{given} keeps inputs of blocks to compute them again, and --skip reversible reconstructs all inputs from one output; "
            f"leave it out, or type --activations reconstruct or keep"
        )

    def replace(self, **values: Any) -> "Config":
        """A copy with these settings changed, named flat: `config.replace(width=16, zero=2)`.

        Raises UsageError for a name that is no setting, listing the known ones.
        """
        unknown = set(values) - set(flat(self))
        if unknown:
            raise UsageError(f"setting {sorted(unknown)[0]!r} is not known; possible: {', '.join(flat(self))}")
        if values.get("model", self.model.model) != self.model.model:
            values = self._of_network(str(values["model"])) | values
        groups = {}
        for group in dataclasses.fields(self):
            part = getattr(self, group.name)
            own = {f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values}
            groups[group.name] = dataclasses.replace(part, **own)
        return Config(**groups)

    def _of_network(self, name: str) -> dict[str, Any]:
        """The network's settings as they are with another --model: its defaults, and what differs from those here."""
        before, now = registry.defaults(self.model.model), dataclasses.asdict(self.model)
        return registry.defaults(name) | {own: value for own, value in now.items() if value != before[own]}


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its flat name, in order of declaration."""
    parts = (getattr(config, group.name) for group in dataclasses.fields(config))
    return {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}


def as_json(config: Config) -> dict[str, Any]:
    """`flat` with values that JSON can hold; `from_json` takes them back one by one."""
    return {name: str(value) if isinstance(value, Every) else value for name, value in flat(config).items()}


def from_json(name: str, value: Any) -> Any:
    """A setting's value out of JSON."""
    if name == "checkpoint_every" and value is not None:
        return parse_every(value)
    return tuple(value) if isinstance(value, list) else value


def differing(config: Config) -> dict[str, Any]:
    """The settings that differ from their defaults, which are the network's own."""
    default = flat(Config()) | registry.defaults(config.model.model) | {"model": Config().model.model}
    return {name: value for name, value in flat(config).items() if value != default[name]}


def typed(name: str, value: Any) -> list[str]:
    """A setting as one types it: `typed("blocks", (1, 1, 5, 1))` is `["--blocks", "1,1,5,1"]`."""
    field = next(f for group in GROUPS for f in dataclasses.fields(group) if f.name == name)
    flag = name.replace("_", "-")
    if field.metadata.get("switch"):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", "none" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # argparse of Python 3.11 takes -1e-6 for an option
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> Any:
        raise UsageError(f"{message} (all settings: {self.prog} --help)")


def add_arguments(parser: argparse.ArgumentParser, *groups: type) -> None:
    """Adds one option per field of these dataclasses."""
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or "").splitlines()[0])
        for f in dataclasses.fields(group):
            flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
            names = [flag] + (["--" + f.name] if "_" in f.name else [])
            if f.metadata.get("switch"):
                section.add_argument(*names, help=text, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction)
            else:
                section.add_argument(*names, help=text, default=argparse.SUPPRESS, type=f.metadata["parse"], metavar="X", dest=f.name)
            for switch, value in f.metadata.get("short", {}).items():
                text = f"the same as {flag} {value}"
                section.add_argument(switch, help=text, default=argparse.SUPPRESS, action="append_const", const=(switch, f.name, value), dest=SHORT)


SHORT = "short switches"  # where a parsed command line holds them; no setting is called so
GROUPS = (ModelConfig, DataConfig, RecipeConfig, EngineConfig, TrackingConfig, CheckpointConfig)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser whose errors are `UsageError`s; abbreviations of options are refused."""
    return _Parser(prog=prog, description=description, allow_abbrev=False)


def from_namespace(values: argparse.Namespace) -> Config:
    """The settings of a parsed command line; options that are no setting are left out."""
    known = flat(Config())
    given = {name: value for name, value in vars(values).items() if name in known}
    said = {name: f"--{name.replace('_', '-')} {value}" for name, value in given.items()}
    for switch, name, value in getattr(values, SHORT, ()):
        if given.setdefault(name, value) != value:
            raise UsageError(f"{switch} is short for --{name} {value}, and {said[name]} was given, too; leave one of them out")
        said[name] = switch
    for name in given:
        registry.refuse_unknown(given.get("model", Config().model.model), name)
    return Config().replace(**given)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The settings of a command line. Raises UsageError with a sentence for bad input."""
    return parse_typed(arguments)[0]


def parse_typed(arguments: Sequence[str] | None = None, prog: str = "deepspeed deepscale/train.py") -> tuple[Config, frozenset[str]]:
    """(the settings of a command line, the names of those that were typed). Raises UsageError with a sentence for bad input."""
    command = parser(prog, "Train a ConvNeXt, or another network, of any depth. Every setting left out is `auto` or its default.")
    add_arguments(command, *GROUPS)
    values = command.parse_args(arguments)
    short = {name for _, name, _ in getattr(values, SHORT, ())}
    return from_namespace(values), frozenset((set(vars(values)) - {SHORT}) | short)
