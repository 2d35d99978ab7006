"""What a run will take, before it runs, and every `auto` resolved from that.

Memory is counted in bytes from the shapes; time is measured: one block of each stage runs forward and backward on this
machine, times the blocks of the stage. Legend: M = B * H * W rows of a stage, C its channels.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deepscale.activations import policy_of
from deepscale.config import AUTO, IN_SEGMENTS, Config, EngineConfig, ModelConfig
from deepscale.depth import STAGES
from deepscale.engine_config import stage_and_offload
from deepscale.errors import UsageError
from deepscale.machine import Machine
from deepscale.models.components import LOW_PRECISION
from deepscale.models.convnext import block_spec, count_parameters, default_stack_size, smallest_segment
from deepscale.models.stack import BlockStack
from deepscale.world import World

GIB = 2**30
WIDTHS = (64, 32, 16, 8)
PATCHES = (1, 2, 4)
BATCHES = (64, 32, 16, 8)
FAST_SEGMENT = 4  # blocks recomputed together whose activations stay in a core's cache
STEP_SHARE = 1 / 40  # of the time budget that one step may take
STEP_LIMIT_S = 10.0  # without a time budget
FITS = 0.9  # of the memory that is free
MEASURE_S = 0.1
# Threads must pay: a network of small operators that gains little from them stalls tenfold as soon as another process takes a core.
THREADS_GAIN = 1.5
# No core runs faster than this in float32: a candidate whose FLOPs need longer is not worth measuring.
CORE_FLOPS = 150e9
KEPT = {
    "keep": "activations kept",
    "selective": "a part of the activations kept",
    "recompute": "activations recomputed",
    "offload": "activations recomputed from inputs on the host",
}
BRANCH_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes per rank of a training step. `states` are parameters, gradients and optimiser."""

    parameters: int
    states_device: int
    states_host: int
    kept: int
    segment: int

    @property
    def device(self) -> int:
        """Bytes on the device at the peak."""
        return self.states_device + self.kept + self.segment

    @property
    def total(self) -> int:
        """Bytes on device and host."""
        return self.device + self.states_host


@dataclass(frozen=True)
class Plan:
    """A configuration without any `auto`, what it is expected to take, and the reasons, a line each."""

    config: Config
    memory: Memory
    step_s: float | None
    notes: tuple[str, ...]


def memory_of(config: Config, ranks: int, channels: int, image_size: int, classes: int) -> Memory:
    """Bytes of a step of a configuration whose sizes are resolved.

    Per parameter: 4 bytes of weight, 4 of gradient, 8 of AdamW's moments, and 4 more of ZeRO's flat master copy. Per row and
    channel a block keeps its input (4 bytes) and xhat, h and f(h) (9 branch elements). A kept input is all that
    recomputation leaves of a segment.
    """
    model, engine = config.model, config.engine
    assert isinstance(model.width, int) and isinstance(config.data.batch_size, int) and isinstance(engine.zero, int)
    parameters = count_parameters(model, classes, channels)
    share = [parameters if engine.zero < stage else -(-parameters // ranks) for stage in (3, 2, 1)]
    weights, gradients, moments = 4 * share[0], 4 * share[1], (8 + (4 if engine.zero else 0)) * share[2]
    offloaded = (moments + gradients if engine.offload == "cpu" else 0) + (weights if engine.offload == "cpu" and engine.zero == 3 else 0)
    micro = config.data.batch_size // config.recipe.accumulation // ranks
    segment = segment_of(config)
    kept, largest = 0, 0
    for blocks, rows, width in stage_shapes(model, micro, image_size):
        block = rows * width * (4 + 9 * BRANCH_BYTES[engine.precision])
        kept += -(-blocks // segment) * rows * width * 4 if segment else blocks * block
        largest = max(largest, segment * block, 14 * rows * width * 4)
    return Memory(parameters, weights + gradients + moments - offloaded, offloaded, kept, largest)


def segment_of(config: Config) -> int:
    """Blocks recomputed together; 0 where none are."""
    return int(config.engine.segment or 0) if config.engine.activations in IN_SEGMENTS else 0


def stage_shapes(model: ModelConfig, micro_batch: int, image_size: int) -> Iterator[tuple[int, int, int]]:
    """(blocks, rows M, channels C) of each stage."""
    assert isinstance(model.width, int) and isinstance(model.patch_size, int)
    side = image_size // model.patch_size
    for s in range(STAGES):
        yield model.stage_blocks[s], micro_batch * side**2, model.width * 2**s
        side //= 2


def flops_of(config: Config, micro_batch: int, image_size: int) -> float:
    """Floating point operations of the blocks' 1x1 convolutions, forward and backward, of one micro batch."""
    passes = 4 if config.engine.activations in IN_SEGMENTS else 3
    return float(sum(passes * 16 * blocks * rows * width**2 for blocks, rows, width in stage_shapes(config.model, micro_batch, image_size)))


def measure_step_s(config: Config, world: World, image_size: int) -> float:
    """Seconds of one optimiser step's blocks: one block of each stage timed on this machine.

    The mean of `MEASURE_S` per stage, not the best: on a busy machine threads that wait for each other are what a step costs.
    """
    assert isinstance(config.data.batch_size, int)
    micro = config.data.batch_size // config.recipe.accumulation // world.size
    side = image_size // config.model.patch_size  # type: ignore[operator]
    total = 0.0
    low = LOW_PRECISION.get(config.engine.precision)
    for blocks, _, width in stage_shapes(config.model, micro, image_size):
        # Ranks measure on their own, and not equally often: nothing may wait for another.
        spec = dataclasses.replace(block_spec(config.model, width), sync_batchnorm=False)
        stack = policy_of(config).apply(BlockStack(spec, 0, 1)).to(world.device)
        stack.kernel = config.engine.kernel
        for parameter in stack.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(micro, width, side, side, device=world.device).contiguous(memory_format=torch.channels_last).requires_grad_()
        runs, spent = -1, 0.0  # the first run is not counted: it allocates
        while runs < 1 or (spent < MEASURE_S and runs < 50):
            _synchronise(world)
            begin = time.perf_counter()
            with torch.autocast(world.device.type, dtype=low, enabled=low is not None):
                stack(x).backward(x.detach())
            _synchronise(world)
            runs, spent = runs + 1, spent + (time.perf_counter() - begin if runs >= 0 else 0.0)
        total += blocks * spent / runs
        side //= 2
    return total * config.recipe.accumulation


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def step_limit_s(config: Config) -> float:
    """The longest step that the planner accepts without a GPU."""
    return config.recipe.time_budget * STEP_SHARE if config.recipe.time_budget else STEP_LIMIT_S


def resolve(config: Config, world: World, machine: Machine, *, channels: int, image_size: int, classes: int) -> Plan:
    """Resolves every `auto`; a value given by hand always stays. The same on all ranks.

    Raises UsageError where nothing fits, naming what would.
    """
    config = _engine_choices(config, machine)
    shape = {"channels": channels, "image_size": image_size, "classes": classes}
    candidates = [c for c in _sizes(config, world.size) if _possible(c, image_size, world.size)]
    if not candidates:
        raise _impossible(config, image_size, world.size)
    fitting = [c for c in (_memory_choices(c, machine, **shape) for c in candidates) if _fits(c, machine, **shape)]
    if not fitting:
        raise _too_large(config, machine, shape)
    chosen, step_s = _fast_enough(fitting, world, image_size) if world.device.type == "cpu" else (fitting[0], None)
    chosen, step_s = world.agree((chosen, step_s))
    memory = memory_of(chosen, world.size, **shape)
    return Plan(chosen, memory, step_s, _explain(chosen, memory, machine, step_s, len(fitting) < len(candidates)))


def _engine_choices(config: Config, machine: Machine) -> Config:
    """Device, precision, ZeRO as far as they do not hang on sizes."""
    stage, offload = stage_and_offload(config)
    if config.engine.engine == "torch":
        if stage not in (AUTO, 0) or offload == "cpu" or config.engine.deepspeed_config:
            raise UsageError("--engine torch has no ZeRO, offload or DeepSpeed file; leave them out, or leave --engine torch out")
        stage, offload = 0, "none"
    precision = config.engine.precision
    if precision == AUTO:
        precision = "bf16" if machine.bf16 else "fp32"
    threads = config.engine.threads if config.engine.threads != AUTO or machine.device == "cpu" else torch.get_num_threads()
    workers = config.data.workers if config.data.workers != AUTO else max(1, min(8, torch.get_num_threads()))
    blocks = config.model.stage_blocks
    size = config.engine.stack_size if config.engine.stack_size != AUTO else default_stack_size(blocks)
    return (
        config.replace(device=machine.device, precision=precision, zero=stage, offload=offload, threads=threads, workers=workers, stack_size=size)
        .replace(kernel="native" if config.engine.kernel == "native" else "torch")
        .replace(depth=config.model.built_depth, blocks=blocks, layerscale_init=config.model.gamma_init)
    )


def _sizes(config: Config, ranks: int) -> Iterator[Config]:
    """Candidates from the largest to the smallest: width falls first, then resolution, then batch.

    Batches are the nearest to those of BATCHES that divide over ranks and micro batches.
    """
    model, data, parts = config.model, config.data, ranks * config.recipe.accumulation
    widths = WIDTHS if model.width == AUTO else (model.width,)
    patches = PATCHES if model.patch_size == AUTO else (model.patch_size,)
    batches = tuple(dict.fromkeys(max(1, round(b / parts)) * parts for b in BATCHES)) if data.batch_size == AUTO else (data.batch_size,)
    for width in widths:
        yield config.replace(width=width, patch_size=patches[0], batch_size=batches[0])
    for patch in patches[1:]:
        yield config.replace(width=widths[-1], patch_size=patch, batch_size=batches[0])
    for batch in batches[1:]:
        yield config.replace(width=widths[-1], patch_size=patches[-1], batch_size=batch)


def _possible(config: Config, image_size: int, ranks: int) -> bool:
    patch, batch = config.model.patch_size, config.data.batch_size
    assert isinstance(patch, int) and isinstance(batch, int)
    return batch % (ranks * config.recipe.accumulation) == 0 and image_size // patch >= 2 ** (STAGES - 1)


def _impossible(config: Config, image_size: int, ranks: int) -> UsageError:
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


def _memory_choices(config: Config, machine: Machine, **shape: int) -> Config:
    """Recomputation, ZeRO stage and offload: the fastest of what was left open that fits, else the smallest."""
    stages = [config.engine.zero] if config.engine.zero != AUTO else ([0, 2, 3] if machine.ranks == 1 else [1, 2, 3])
    offloads = [config.engine.offload] if config.engine.offload != AUTO else (["none", "cpu"] if machine.device == "cuda" else ["none"])
    least = smallest_segment(config.model.stage_blocks)
    segments = [config.engine.segment] if config.engine.segment != AUTO else [FAST_SEGMENT, least]
    options = [
        config.replace(zero=stage, offload=offload, activations=activations, segment=segment)
        for offload in offloads
        for stage in stages
        for activations in _policies(config.engine)
        for segment in (segments if activations in IN_SEGMENTS else [None])
        if not (stage == 0 and offload == "cpu") and not (machine.ranks == 1 and config.engine.zero == AUTO and (stage != 0) != (offload == "cpu"))
    ]
    return next((option for option in options if _fits(option, machine, **shape)), options[-1])


def _policies(engine: EngineConfig) -> tuple[str, ...]:
    """The policies that may be taken, the fastest first; a segment given by hand says whether blocks are recomputed."""
    if engine.activations != AUTO:
        return (engine.activations,)
    if engine.segment != AUTO:
        return ("keep",) if engine.segment is None else ("recompute",)
    return "keep", "recompute"


def _fits(config: Config, machine: Machine, **shape: int) -> bool:
    memory = memory_of(config, machine.ranks, **shape)
    if machine.device == "cpu":
        return memory.total <= FITS * machine.host_bytes
    return memory.device <= FITS * machine.device_bytes and memory.states_host <= FITS * machine.host_bytes


def _too_large(config: Config, machine: Machine, shape: dict[str, int]) -> UsageError:
    """The sentence for a network that cannot fit: what it needs, what is free, and the largest width that fits."""
    smallest = _memory_choices(list(_sizes(config, machine.ranks))[-1], machine, **shape)
    needed = memory_of(smallest, machine.ranks, **shape).total
    free = machine.device_bytes if machine.device == "cuda" else machine.host_bytes
    width = smallest.model.width
    while isinstance(width, int) and width > 1:
        width //= 2
        if _fits(_memory_choices(smallest.replace(width=width, activations=AUTO), machine, **shape), machine, **shape):
            return UsageError(
                f"{smallest.model.built_depth:,} layers at --width {smallest.model.width} need {needed / GIB:.1f} GiB, "
                f"and {free / GIB:.1f} GiB are free; --width {width} fits"
            )
    return UsageError(
        f"{smallest.model.built_depth:,} layers need {needed / GIB:.1f} GiB even at width {smallest.model.width}, and {free / GIB:.1f} GiB are free; "
        f"type a smaller --depth or --batch-size"
    )


def _fast_enough(candidates: list[Config], world: World, image_size: int) -> tuple[Config, float]:
    """The first candidate whose measured step is short enough, else the fastest of them."""
    limit = step_limit_s(candidates[0])
    peak = CORE_FLOPS * torch.get_num_threads()
    measured = []
    for config in candidates:
        assert isinstance(config.data.batch_size, int)
        if flops_of(config, config.data.batch_size // world.size, image_size) / peak > limit and config is not candidates[-1]:
            continue
        measured.append(_with_threads(config, world, image_size))
        if measured[-1][0] <= limit:
            break
    step_s, config = min(measured, key=lambda pair: (pair[0] > limit, pair[0]))
    return config, step_s


def _with_threads(config: Config, world: World, image_size: int) -> tuple[float, Config]:
    """(seconds of a step, the configuration with its threads): one, where the others do not gain enough."""
    if config.engine.threads != AUTO:
        return measure_step_s(config, world, image_size), config
    most = torch.get_num_threads()
    if most == 1:
        return measure_step_s(config, world, image_size), config.replace(threads=1)
    many = measure_step_s(config, world, image_size)
    try:
        torch.set_num_threads(1)
        one = measure_step_s(config, world, image_size)
    finally:
        torch.set_num_threads(most)
    return (many, config.replace(threads=most)) if one > THREADS_GAIN * many else (one, config.replace(threads=1))


def _explain(chosen: Config, memory: Memory, machine: Machine, step_s: float | None, cut: bool) -> tuple[str, ...]:
    """The few lines that say what is built and why."""
    model, engine = chosen.model, chosen.engine
    assert isinstance(model.width, int)
    blocks = " + ".join(f"{b:,}" for b in model.stage_blocks)
    lines = [f"{model.built_depth:,} layers: {blocks} blocks in 4 stages of width {' '.join(str(model.width * 2**s) for s in range(STAGES))}"]
    lines[0] += f", {memory.parameters:,} parameters"
    threads = f"{engine.threads} thread{'s' if engine.threads != 1 else ''} a rank"
    sizes = f"width {model.width}, patch {model.patch_size}, batch {chosen.data.batch_size}"
    if step_s is not None:
        why = f"about {step_s:.2g} s a step in the blocks with {threads}; the limit is {step_limit_s(chosen):.3g} s without a GPU"
        lines.append(f"{sizes}: {why}")
    else:
        lines.append(f"{sizes}{': the largest that fits' if cut else ''}")
    free = machine.device_bytes if machine.device == "cuda" else machine.host_bytes
    zero = "plain torch" if engine.engine == "torch" else f"ZeRO {engine.zero}" + (", offload to the CPU" if engine.offload == "cpu" else "")
    lines.append(
        f"{machine.device} x {machine.ranks}, {engine.precision}, {zero}, {KEPT[engine.activations]}: "
        f"{memory.device / GIB:.2f} GiB planned of {free / GIB:.1f} GiB free"
        + (f", {memory.states_host / GIB:.2f} GiB on the host" if memory.states_host else "")
    )
    return tuple(lines)
