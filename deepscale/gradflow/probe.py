"""Gradient flow at initialisation: the network as planned, one or a few batches, forward and backward, no training.

LayerScale's gamma is none unless told: with the published 0 every block is closed at initialisation, whatever is inside it,
and a probe of activations or norms would compare nothing. The same images go through all variants.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepscale import config, kernel, plan
from deepscale.config import AUTO, Config, EngineConfig, ModelConfig, RecipeConfig
from deepscale.data.sources import load_source
from deepscale.data.splits import DatasetInfo
from deepscale.data.tensors import TrainFeed
from deepscale.engine import TorchEngine
from deepscale.errors import UsageError, unknown_choice
from deepscale.gradflow.flow import Flow
from deepscale.gradflow.health import NONFINITE, verdict
from deepscale.gradflow.recorder import Recorder
from deepscale.machine import measure_machine
from deepscale.models.convnext import cross_entropy
from deepscale.tracking import as_text
from deepscale.world import World, choose_device

TIME_S = 30.0  # that all passes may take on a CPU: about a minute with everything; sizes left open follow from it
MOST_VARIANTS = 24  # told apart in one figure
SCALES = 24  # halvings of fp16's loss scale, 2^16, before an overflow is taken for the network's own
# What a variant may differ in: what matters before the first step.
AXES = {f.name: f for f in dataclasses.fields(ModelConfig) if "parse" in f.metadata and f.name != "blocks"}
AXES |= {f.name: f for group in (EngineConfig, RecipeConfig) for f in dataclasses.fields(group) if f.name in ("precision", "seed")}
SELF_EXPLAINING = ("activation", "norm", "norm_scope")
SHARED = ("width", "patch_size", "batch_size", "precision", "threads")  # the same in all variants, unless compared

Batches = list[tuple[Tensor, Tensor]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One network: what tells it from the others, in words, and its settings."""

    label: str
    config: Config


@dataclass(frozen=True)
class Probed:
    """A variant's gradient flow, one record, and the seconds that its passes took."""

    variant: Variant
    flow: Flow
    seconds: float


def variants_of(asked: Config, compare: Sequence[str]) -> list[Variant]:
    """All combinations of `compare`, each "axis=value,value...", of the settings asked for; these alone without any.

    Raises UsageError, listing what is possible, for an unknown axis or value, and for a combination that contradicts itself.
    """
    axes = dict(_parse_axis(text) for text in compare)
    if len(axes) < len(compare):
        raise UsageError("--compare names an axis twice; give all its values at once, for example --compare activation=gelu,tanh")
    combinations = list(itertools.product(*axes.values()))
    if len(combinations) > MOST_VARIANTS:
        raise UsageError(f"--compare makes {len(combinations):,} variants, and a figure shows up to {MOST_VARIANTS}; leave some values out")
    if asked.model.layerscale_init == AUTO and "layerscale_init" not in axes:
        asked = asked.replace(layerscale_init=None)
    variants = []
    for values in combinations:
        chosen = dict(zip(axes, values, strict=True))
        try:
            variants.append(Variant(_label(chosen), asked.replace(**chosen)))
        except UsageError as error:
            raise UsageError(f"the variant {_label(chosen)} is not possible: {error}") from None
    return variants


def _parse_axis(text: str) -> tuple[str, tuple[object, ...]]:
    name, equals, values = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not equals or not values:
        raise UsageError(f"--compare {text!r} is not an axis with values; type for example --compare activation=gelu,tanh skip=identity,none")
    if name not in AXES:
        raise unknown_choice("--compare's axis", name, AXES)
    try:
        parsed = [AXES[name].metadata["parse"](value.strip()) for value in values.split(",")]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--compare {name}: {error}") from None
    return name, tuple(dict.fromkeys(parsed))


def _label(values: dict[str, object]) -> str:
    """What tells a variant from the others, short enough for a figure: "gelu, norm none, skip identity"."""
    words = {name: as_text(value) for name, value in values.items()}
    return ", ".join(word if name in SELF_EXPLAINING and word != "none" else f"{name} {word}" for name, word in words.items())


def plan_all(variants: Sequence[Variant], batches: int, place: World, info: DatasetInfo) -> list[tuple[Variant, plan.Plan]]:
    """The variants without any `auto`, so that all their passes take about `TIME_S` on a CPU; sizes are those of the deepest.

    Raises UsageError where a variant does not fit.
    """
    machine = measure_machine(place)
    shape = {"channels": info.channels, "image_size": info.image_size, "classes": info.classes}

    def resolved(settings: Config) -> plan.Plan:
        engine = settings.engine
        choose = engine.activations == AUTO and engine.segment is not None and engine.slots == AUTO and settings.model.model == "convnext"
        least = "reconstruct" if settings.model.skip == "reversible" else "recompute"
        activations = least if choose else engine.activations
        settings = settings.replace(engine="torch", activations=activations, time_budget=TIME_S / len(variants) / batches / plan.STEP_SHARE)
        return plan.resolve(settings, place, machine, **shape)

    deepest = max(variants, key=lambda variant: variant.config.model.built_depth)
    chosen = config.flat(resolved(deepest.config).config)
    planned = []
    for variant in variants:
        own = config.flat(variant.config)
        # What was given by hand, and what is compared, is no longer `auto`.
        done = resolved(variant.config.replace(**{name: chosen[name] for name in SHARED if own[name] == AUTO}))
        planned.append((Variant(variant.label, done.config), done))
    return planned


def images_of(settings: Config, batches: int, place: World, say: Say) -> tuple[DatasetInfo, Callable[[int], Batches]]:
    """The data set, and a function that gives the first batches of its first epoch, of so many images each.

    Raises UsageError for a data set that is too small or not there.
    """
    source = load_source(settings.data, say)
    info = source.info

    def take(size: int) -> Batches:
        data, seed = settings.data, settings.recipe.seed
        if len(source.train.labels) < size * batches:
            raise UsageError(
                f"{batches} batches of {size} images are more than the {len(source.train.labels):,} of {info.label}; type a smaller --batches"
            )
        feed = TrainFeed(
            source.train, info, micro_batch=size, seed=seed, device=place.device, augment=data.augment, color_jitter=data.color_jitter
        )  # fmt: skip
        return list(itertools.islice(feed.epoch(0), batches))

    return info, take


def probe(variants: Sequence[Variant], batches: int, say: Say) -> Iterator[Probed]:
    """The gradient flow of each variant at its initial values, as soon as it is there.

    All are planned before the first network is built. Raises UsageError for what is not possible.
    """
    first = variants[0].config
    place = World(0, 1, 0, 1, torch.device(choose_device(first.engine)))
    variants = [Variant(variant.label, kernel.choose(variant.config, place, say, say)) for variant in variants]
    info, take = images_of(first, batches, place, say)
    planned = plan_all(variants, batches, place, info)
    if len(planned) == 1:
        for note in planned[0][1].notes:
            say(note)
    else:
        seconds = sum((done.step_s or 0.0) * batches for _, done in planned)
        say(f"{len(planned)} variants, {_sizes(planned[0][0].config)}" + (f", about {seconds:.2g} s in the blocks" if seconds else ""))
    for variant, _ in planned:
        torch.set_num_threads(int(variant.config.engine.threads))
        begin, size = time.perf_counter(), int(variant.config.data.batch_size)
        flow = gradient_flow(variant.config, info, take(size), place)
        flow.meta |= {"run_name": variant.label or f"probe {flow.depth:,}", "settings": described(variant.config), "data": info.label}
        flow.meta["probe"] = f"initial values, no training; {batches} x {size} images"
        yield Probed(variant, flow, time.perf_counter() - begin)


def gradient_flow(settings: Config, info: DatasetInfo, batches: Batches, place: World) -> Flow:
    """One record, step 0, of the mean loss over the batches, of a network whose settings hold no `auto`."""
    from deepscale.train import build_model

    model = build_model(settings, info, place)
    engine = TorchEngine(model, settings.replace(accumulation=len(batches)), place)
    for _ in range(SCALES):
        recorder = Recorder(model, engine=engine, records=1)
        recorder.begin(0)
        for i, (images, labels) in enumerate(batches):
            last = i + 1 == len(batches)
            engine.backward(cross_entropy(engine.forward(images, last), labels), last)
        recorder.gradients()
        flow = recorder.flow()
        if engine.loss_scale() <= 1.0 or verdict(flow).label != NONFINITE:
            break
        engine.step()  # only lowers fp16's loss scale: a step with an overflow is skipped
    return flow


def described(settings: Config) -> dict[str, str]:
    """The settings that a probe depends on, as text."""
    parts = (settings.model, settings.data, settings.engine)
    values = {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}
    hidden = ("data_dir", "deepspeed_config", "local_rank", "verbose", "download", "feed", "eval_images", "workers", "zero", "offload")
    return {name: as_text(value) for name, value in values.items() if name not in hidden} | {
        "seed": str(settings.recipe.seed),
        "vanishing_ratio": str(settings.tracking.vanishing_ratio),
        "exploding_ratio": str(settings.tracking.exploding_ratio),
    }


def _sizes(settings: Config) -> str:
    return f"width {settings.model.width}, patch {settings.model.patch_size}, batch {settings.data.batch_size}"
