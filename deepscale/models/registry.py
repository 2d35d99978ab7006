"""The networks that --model names: which settings each of them knows, how deep it can be, and how it is built.

A network is imported when it is built: the settings (config.py) know this table, and load without torch's modules.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from deepscale.depth import LAYERS_PER_BLOCK, blocks_for_depth
from deepscale.errors import UsageError

if TYPE_CHECKING:
    from deepscale.config import ModelConfig
    from deepscale.models.network import Network

StackSize = int | tuple[int, ...] | Literal["auto"]  # blocks per stack, of a network that has stacks


@dataclass(frozen=True)
class Images:
    """What a network takes and gives: images (B, channels, side, side) -> logits (B, classes)."""

    channels: int = 3
    side: int = 32
    classes: int = 10


@dataclass(frozen=True)
class Kind:
    """One network.

    build: makes it, without values yet. settings: those of ModelConfig that it knows beside `model`; another one is refused. defaults: of
    these where they are not ModelConfig's. values: what a setting can be here, where that is less than ModelConfig allows. depth: layers of
    the smallest network with at least so many; raises UsageError. shape: its size in words, for the summary.
    kept: what it keeps for backward, in words, where that is its own and no --activations.
    """

    build: Callable[["ModelConfig", Images, StackSize], "Network"]
    settings: frozenset[str]
    depth: Callable[[int], int]
    shape: Callable[["ModelConfig"], str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    kept: str = ""


def _depth_in_steps(name: str, first: int, step: int, example: int) -> Callable[[int], int]:
    """`Kind.depth` of a network with first, first + step, first + 2 * step ... layers."""

    def depth(asked: int) -> int:
        if asked < first:
            every = f" in steps of {step}" if step > 1 else ""
            raise UsageError(f"--depth {asked} is out of range: --model {name} has {first} layers or more{every}; type for example --depth {example}")
        return first + -(-(asked - first) // step) * step

    return depth


# --------------------------------------------------------------------------------------------------------------- networks


def _convnext(model: "ModelConfig", images: Images, stack_size: StackSize) -> "Network":
    from deepscale.models.convnext import ConvNeXt

    return ConvNeXt(model, classes=images.classes, channels=images.channels, stack_size=stack_size)


def _vgg(model: "ModelConfig", images: Images, stack_size: StackSize) -> "Network":
    from deepscale.models.vgg import VGG

    return VGG(model, images)


def _mlp(model: "ModelConfig", images: Images, stack_size: StackSize) -> "Network":
    from deepscale.models.mlp import MLP

    return MLP(model, images)


def _plain(model: "ModelConfig", images: Images, stack_size: StackSize) -> "Network":
    from deepscale.models.plain import Plain

    return Plain(model, classes=images.classes, channels=images.channels)


_BLOCK = ("activation", "norm", "norm_scope", "skip", "init", "init_std", "sync_batchnorm")  # what ConvNeXt's blocks are made of

MODELS: dict[str, Kind] = {
    "convnext": Kind(
        build=_convnext,
        settings=frozenset(
            {"depth", "blocks", "width", "patch_size", "kernel_size", "layerscale_init", "layerscale_shape", "drop_path", "drop_path_mode", *_BLOCK}
        ),
        depth=lambda asked: LAYERS_PER_BLOCK * sum(blocks_for_depth(asked)) + 2,
        shape=lambda model: f"{'+'.join(map(str, model.stage_blocks))} blocks",
        values={"norm": ("layernorm", "batchnorm", "rmsnorm", "none")},
    ),
    "vgg": Kind(
        build=_vgg,
        settings=frozenset({"depth", "width", "norm", "skip", "skip_scope", "init", "init_std", "sync_batchnorm"}),
        depth=_depth_in_steps("vgg", 8, 6, 38),
        shape=lambda model: f"{(model.built_depth - 8) // 6} processing and a reduction block in each of 3 stages",
        defaults={"depth": 38, "width": 32, "norm": "none", "skip": "none", "init": "torch"},
        values={"norm": ("none", "batchnorm"), "skip": ("none", "identity"), "init": ("torch", "normal", "kaiming", "orthogonal")},
    ),
    "mlp": Kind(
        build=_mlp,
        settings=frozenset(
            {"depth", "width", "activation", "norm", "skip", "skip_pairs", "gradient_normalisation", "init", "init_std", "sync_batchnorm"}
        ),
        depth=_depth_in_steps("mlp", 1, 1, 8),
        shape=lambda model: f"{model.depth - 1} hidden layers of {model.width}, and a head",
        defaults={"depth": 8, "width": 128, "activation": "sigmoid", "norm": "none", "skip": "none", "init": "torch"},
        values={"skip": ("none", "identity"), "init": ("torch", "normal", "kaiming", "orthogonal")},
    ),
    "plain": Kind(
        build=_plain,
        settings=frozenset({"depth", "width", "patch_size", "activation", "init", "init_std", "sigma_w", "sigma_b"}),
        depth=_depth_in_steps("plain", 3, 1, 1000),
        shape=lambda model: f"stem, {model.built_depth - 2:,} convolutions of width {model.width}, head",
        defaults={"depth": 100, "width": 16, "patch_size": 4, "activation": "tanh", "init": "delta-orthogonal"},
        values={"init": ("delta-orthogonal", "orthogonal", "normal", "kaiming", "torch")},
        kept="a stack's input kept, its layers recomputed",
    ),
}


# ------------------------------------------------------------------------------------------------------------- all of them


def build(model: "ModelConfig", images: Images, stack_size: StackSize = "auto") -> "Network":
    """The network without values yet, on torch's current device; `initialise` writes them. All `auto` must be resolved."""
    return MODELS[model.model].build(model, images, stack_size)


def defaults(name: str) -> dict[str, Any]:
    """Every setting of ModelConfig as it is where only --model is given."""
    from deepscale.config import ModelConfig

    own = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    return own | dict(MODELS[name].defaults) | {"model": name} if name in MODELS else own | {"model": name}


def unknown(name: str) -> frozenset[str]:
    """Settings of ModelConfig that a network does not know."""
    return frozenset(defaults(name)) - MODELS[name].settings - {"model"}


def refuse_unknown(name: str, setting: str) -> None:
    """Raises UsageError for a setting of ModelConfig that a network does not know."""
    if setting in unknown(name):
        flags = ", ".join(f"--{own.replace('_', '-')}" for own in defaults(name) if own in MODELS[name].settings)
        flag = f"--{setting.replace('_', '-')}"
        raise UsageError(f"{flag} is no setting of --model {name}, which knows {flags}; leave {flag} out")


def check(model: "ModelConfig") -> None:
    """Raises UsageError for settings that the network does not know or cannot have."""
    kind, usual = MODELS[model.model], {f.name: f.default for f in dataclasses.fields(model)}
    for name, value in ((f.name, getattr(model, f.name)) for f in dataclasses.fields(model)):
        if value != usual[name]:
            refuse_unknown(model.model, name)
        if value not in kind.values.get(name, (value,)):
            possible = ", ".join("none" if v is None else str(v) for v in kind.values[name])
            raise UsageError(f"--{name.replace('_', '-')} {value} is not possible with --model {model.model}; possible: {possible}")
    if model.blocks is None:
        kind.depth(model.depth)
