"""Every `auto` of a run resolved from what it will take: bytes (plan_memory.py), seconds (plan_time.py), and the choices (plan_choices.py)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deepscale.config import AUTO, Config, ModelConfig, typed
from deepscale.depth import STAGES
from deepscale.engine_config import stage_and_offload
from deepscale.errors import UsageError
from deepscale.machine import Machine
from deepscale.models import registry
from deepscale.models.convnext import default_stack_size
from deepscale.plan_choices import choose
from deepscale.plan_memory import FITS, Memory, fits, memory_of
from deepscale.plan_network import Images, data_ranks, flops_of, images_of
from deepscale.plan_pipeline import bubble
from deepscale.plan_time import CORE_FLOPS, measure_step_s
from deepscale.progress import gib
from deepscale.world import World

WIDTHS = (64, 32, 16, 8)
PATCHES = (1, 2, 4)
BATCHES = (64, 32, 16, 8)
STEP_SHARE = 1 / 40  # of the time budget that one step may take
STEP_LIMIT_S = 10.0  # without a time budget
# Threads must pay: a network of small operators that gains little from them stalls tenfold as soon as another process takes a core.
THREADS_GAIN = 1.5
COPIED = 12  # bytes a parameter in a checkpoint: weight and two moments
KEPT = {
    "keep": "activations kept",
    "selective": "a part of the activations kept",
    "recompute": "activations recomputed",
    "offload": "activations recomputed from inputs on the host",
    "revolve": "activations and most of their inputs recomputed",
    "reconstruct": "activations reconstructed from outputs",
}


@dataclass(frozen=True)
class Plan:
    """A configuration without any `auto`, what it is expected to take, and the reasons, a line each.

    copy: bytes per rank of the copy from which checkpoints are written while training goes on, beside `memory`; 0 without one.
    """

    config: Config
    memory: Memory
    copy: int
    step_s: float | None
    notes: tuple[str, ...]


def step_limit_s(config: Config) -> float:
    """The longest step that the planner accepts without a GPU."""
    return config.recipe.time_budget * STEP_SHARE if config.recipe.time_budget else STEP_LIMIT_S


def resolve(config: Config, world: World, machine: Machine, *, channels: int, image_size: int, classes: int) -> Plan:
    """Resolves every `auto`; a value given by hand always stays. The same on all ranks.

    Raises UsageError where nothing fits, naming what would.
    """
    config = settled(config, machine)
    _refuse_many_ranks(config, data_ranks(config, machine.ranks))
    shape = {"channels": channels, "image_size": image_size, "classes": classes}
    candidates = [c for c in _sizes(config, world.size) if _possible(c, image_size, world.size)]
    if not candidates:
        raise _impossible(config, image_size, world.size)
    fitting = [c for c in (choose(c, machine, **shape) for c in candidates) if _fits(c, machine, shape)]
    if not fitting:
        raise _too_large(config, machine, shape)
    chosen, step_s = _fast_enough(fitting, world, shape) if world.device.type == "cpu" else (fitting[0], None)
    chosen, step_s = world.agree((chosen, step_s))
    memory = memory_of(chosen, world.size, **shape)
    asked = chosen.checkpoint
    copy = COPIED * memory.parameters // world.size if asked.checkpoint_dir is not None and asked.async_save is not False else 0
    notes = _explain(chosen, memory, machine, step_s, len(fitting) < len(candidates))
    if copy:
        notes += (f"checkpoints are written while training goes on, from a copy of {gib(copy)} where that fits",)
    return Plan(chosen, memory, copy, step_s, notes)


def largest(config: Config, ranks: int) -> Config:
    """The settings with every open size at what the planner would like best."""
    return next(_sizes(config, ranks))


def _fits(config: Config, machine: Machine, shape: dict[str, int]) -> bool:
    return fits(memory_of(config, machine.ranks, **shape), machine)


def _refuse_many_ranks(config: Config, ranks: int) -> None:
    blocks = sum(config.model.stage_blocks)
    if ranks > blocks > 0:
        raise UsageError(
            f"{ranks:,} ranks are more than the {blocks:,} blocks of {config.model.built_depth:,} layers, and some would have none to share; "
            f"type at most {blocks:,} ranks, or a larger --depth"
        )


def settled(config: Config, machine: Machine) -> Config:
    """Device, precision, ZeRO as far as they do not hang on sizes. Raises UsageError for settings that contradict each other."""
    stage, offload = stage_and_offload(config)
    if config.engine.engine == "torch":
        if stage not in (AUTO, 0) or offload in ("cpu", "nvme") or config.engine.deepspeed_config:
            raise UsageError("--engine torch has no ZeRO, offload or DeepSpeed file; leave them out, or leave --engine torch out")
        stage, offload = 0, "none"
    precision = config.engine.precision
    if precision == AUTO:
        precision = "bf16" if machine.bf16 else "fp32"
    threads = config.engine.threads if config.engine.threads != AUTO or machine.device == "cpu" else torch.get_num_threads()
    workers = config.data.workers if config.data.workers != AUTO else max(1, min(8, torch.get_num_threads()))
    config = config.replace(device=machine.device, precision=precision, zero=stage, offload=offload, threads=threads, workers=workers)
    if config.model.model != "convnext":
        return _settled_without_stacks(config)
    blocks = config.model.stage_blocks
    size = config.engine.stack_size if config.engine.stack_size != AUTO else default_stack_size(blocks)
    kernel = "native" if config.engine.kernel == "native" else "torch"
    return config.replace(
        stack_size=size, kernel=kernel, depth=config.model.built_depth, blocks=blocks, layerscale_init=config.model.gamma_init
    )  # fmt: skip


def _settled_without_stacks(config: Config) -> Config:
    """The same for a network whose blocks are modules of their own. Raises UsageError for what is done with stacks."""
    model, engine = config.model, config.engine
    for name, given, possible in (
        ("activations", engine.activations, (AUTO, "keep")),
        ("segment", engine.segment, (AUTO, None)),
        ("slots", engine.slots, (AUTO, None)),
        ("stack_size", engine.stack_size, (AUTO, 1)),
    ):
        if given not in possible:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{' '.join(typed(name, given))} is for the stacks of --model convnext, and --model {model.model} was given; leave {flag} out"
            )
    open_ = {name: value for name, value in registry.defaults(model.model).items() if getattr(model, name) == AUTO}
    return config.replace(**open_ | {"depth": model.built_depth, "stack_size": 1, "kernel": "torch"})


def _sizes(config: Config, ranks: int) -> Iterator[Config]:
    """Candidates from the largest to the smallest: width falls first, then resolution, then batch.

    Batches are the nearest to those of BATCHES that divide over ranks and micro batches.
    """
    model, data, parts = config.model, config.data, data_ranks(config, ranks) * config.recipe.accumulation
    widths = WIDTHS if model.width == AUTO else (model.width,)
    patches = PATCHES if model.patch_size == AUTO else (model.patch_size,)
    batches = tuple(dict.fromkeys(max(1, round(b / parts)) * parts for b in BATCHES)) if data.batch_size == AUTO else (data.batch_size,)
    if model.model != "convnext":
        yield config.replace(batch_size=batches[0])
        return
    for width in widths:
        yield config.replace(width=width, patch_size=patches[0], batch_size=batches[0])
    for patch in patches[1:]:
        yield config.replace(width=widths[-1], patch_size=patch, batch_size=batches[0])
    for batch in batches[1:]:
        yield config.replace(width=widths[-1], patch_size=patches[-1], batch_size=batch)


def _possible(config: Config, image_size: int, ranks: int) -> bool:
    patch, batch = config.model.patch_size, config.data.batch_size
    assert isinstance(batch, int)
    large_enough = config.model.model != "convnext" or image_size // int(patch) >= 2 ** (STAGES - 1)
    return batch % (data_ranks(config, ranks) * config.recipe.accumulation) == 0 and large_enough


def _impossible(config: Config, image_size: int, ranks: int) -> UsageError:
    ranks = data_ranks(config, ranks)
    parts = ranks * config.recipe.accumulation
    if isinstance(config.data.batch_size, int) and config.data.batch_size % parts:
        nearest = max(1, round(config.data.batch_size / parts)) * parts
        return UsageError(
            f"--batch-size {config.data.batch_size} does not divide over {ranks} ranks x {config.recipe.accumulation} micro batches; "
            f"type a multiple of {parts}, for example --batch-size {nearest}"
        )
    largest = image_size // 2 ** (STAGES - 1)
    if largest < 1:
        return UsageError(f"images of {image_size} pixels are too small for three halvings; possible: from {2 ** (STAGES - 1)} pixels on")
    return UsageError(f"--patch-size {config.model.patch_size} leaves nothing of {image_size} pixels after three halvings; possible: 1 to {largest}")


def _too_large(config: Config, machine: Machine, shape: dict[str, int]) -> UsageError:
    """The sentence for a network that cannot fit: what it needs, what is free, and the largest width that fits."""
    smallest = choose(list(_sizes(config, machine.ranks))[-1], machine, **shape)
    needed = memory_of(smallest, machine.ranks, **shape)
    width = int(smallest.model.width) if smallest.model.model == "convnext" else 0
    what = (
        f"{smallest.model.built_depth:,} layers at --width {width}"
        if width
        else f"{smallest.model.built_depth:,} layers of --model {smallest.model.model}"
    )
    if machine.device == "cpu":
        short = f"{what} need {gib(needed.total)}, and {gib(machine.host_bytes)} are free"
    else:
        short = f"{what} need {gib(needed.device)} on the device, and {gib(machine.device_bytes)} are free"
        if needed.host > FITS * machine.host_bytes:
            short = f"{what} need {gib(needed.host)} on the host, and {gib(machine.host_bytes)} are free"
    while width > 1:
        width //= 2
        if _fits(choose(config.replace(**_sizes_of(smallest) | {"width": width}), machine, **shape), machine, shape):
            return UsageError(f"{short}; --width {width} fits")
    return UsageError(f"{short}, nor is there a width that fits; type a smaller --depth or --batch-size")


def _sizes_of(config: Config) -> dict[str, int]:
    return {"width": int(config.model.width), "patch_size": int(config.model.patch_size), "batch_size": int(config.data.batch_size)}


def _fast_enough(candidates: list[Config], world: World, shape: dict[str, int]) -> tuple[Config, float | None]:
    """The first candidate whose measured step is short enough, else the fastest, and its seconds; None where there is nothing to choose by them."""
    if len(candidates) == 1 and candidates[0].engine.threads != AUTO:
        return candidates[0], None
    limit = step_limit_s(candidates[0])
    peak = CORE_FLOPS * torch.get_num_threads()
    measured = []
    for config in candidates:
        images = images_of(config, world.size, **shape)
        if config.recipe.accumulation * flops_of(config, world.size, **shape).total / peak > limit and config is not candidates[-1]:
            continue
        measured.append(_with_threads(config, world, images))
        if measured[-1][0] <= limit:
            break
    step_s, config = min(measured, key=lambda pair: (pair[0] > limit, pair[0]))
    return config, step_s


def _with_threads(config: Config, world: World, images: Images) -> tuple[float, Config]:
    """(seconds of a step, the configuration with its threads): one, where the others do not gain enough."""
    if config.engine.threads != AUTO:
        return measure_step_s(config, world, images), config
    most = torch.get_num_threads()
    if most == 1:
        return measure_step_s(config, world, images), config.replace(threads=1)
    many = measure_step_s(config, world, images)
    try:
        torch.set_num_threads(1)
        one = measure_step_s(config, world, images)
    finally:
        torch.set_num_threads(most)
    return (many, config.replace(threads=most)) if one > THREADS_GAIN * many else (one, config.replace(threads=1))


def _explain(chosen: Config, memory: Memory, machine: Machine, step_s: float | None, cut: bool) -> tuple[str, ...]:
    """The few lines that say what is built and why."""
    model, engine = chosen.model, chosen.engine
    lines = [f"{model.built_depth:,} layers: {_shape(model)}, {memory.parameters:,} parameters"]
    threads = f"{engine.threads} thread{'s' if engine.threads != 1 else ''} a rank"
    known = registry.MODELS[model.model].settings
    parts = [f"{word} {value}" for word, name, value in (("width", "width", model.width), ("patch", "patch_size", model.patch_size)) if name in known]
    sizes = ", ".join([*parts, f"batch {chosen.data.batch_size}"])
    if model.model != "convnext":
        lines.append(sizes + (f": about {step_s:.2g} s a step with {threads}" if step_s is not None else ""))
    elif step_s is not None:
        why = f"about {step_s:.2g} s a step with {threads}; the limit is {step_limit_s(chosen):.3g} s without a GPU"
        lines.append(f"{sizes}: {why}")
    else:
        lines.append(f"{sizes}{': the largest that fits' if cut else ''}")
    zero = (
        "plain torch"
        if engine.engine == "torch"
        else f"ZeRO {engine.zero}" + {"cpu": ", offload to the CPU", "nvme": ", offload to a disk"}.get(engine.offload, "")
    )
    how = f"{machine.device} x {machine.ranks}, {engine.precision}, {zero}, {registry.MODELS[model.model].kept or KEPT[engine.activations]}"
    if engine.slots is not None:
        slots = engine.slots if isinstance(engine.slots, tuple) else (engine.slots,)
        how += f" (segments of {engine.segment}, {' '.join(map(str, slots))} slots)"
    if model.model != "convnext":
        how += "; counted, not calibrated"
    if engine.pipeline_stages > 1:
        lines.append(_waiting(engine.pipeline_stages, chosen.recipe.accumulation))
    if machine.device == "cpu":
        lines.append(f"{how}: {gib(memory.total)} planned over the process as it is, of {gib(machine.host_bytes)} free")
    else:
        host = f", {gib(memory.host)} on the host" if memory.host else ""
        lines.append(f"{how}: {gib(memory.device)} planned of {gib(machine.device_bytes)} free{host}")
    return tuple(lines)


def _waiting(stages: int, micro_batches: int) -> str:
    """What a pipeline's stages wait, and, where that is much, what makes it less."""
    share, said = bubble(stages, micro_batches), f"{micro_batches} micro batch{'es' if micro_batches > 1 else ''} a step"
    advice = f"; with --accumulation {4 * stages} they would wait {bubble(stages, 4 * stages):.0%}" if micro_batches < 2 * stages else ""
    return f"{stages} pipeline stages, {said}: each waits for others {share:.0%} of the time{advice}"


def _shape(model: ModelConfig) -> str:
    """What the layers are."""
    if model.model != "convnext":
        return registry.MODELS[model.model].shape(model)
    blocks = " + ".join(f"{b:,}" for b in model.stage_blocks)
    return f"{blocks} blocks in 4 stages of width {' '.join(str(int(model.width) * 2**s) for s in range(STAGES))}"
