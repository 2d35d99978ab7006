"""DeepSpeed's configuration of a run: a file of ds_configs/ (or the user's) with its "auto" values filled from the command.

The command owns batch, clipping, accumulation and precision; the file owns what is DeepSpeed's. A file that says something
else than the command is refused by name. Three rules with a reason:
- `gradient_clipping` is always written: DeepSpeed clips at 1.0 where the key is absent.
- Low precision is torch_autocast's, never the `bf16` or `fp16` section: those put the residual stream in low precision, and
  3,333 additions of 1/3,333 to 1.0 leave 1.0 there.
- ZeRO's buffers are "auto" in our files and as large as the largest stack. DeepSpeed's defaults are for models of billions: up to a
  billion parameters ZeRO-3 would gather everything at once, and gradients would be averaged in a buffer of 2 GB (docs/findings.md).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from deepscale.config import AUTO, Config
from deepscale.errors import UsageError
from deepscale.models.convnext import stack_tensors
from deepscale.paths import ds_config_path
from deepscale.plan_counted import parameters_of, tensors_of

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
SECTIONS = ("zero_optimization", "torch_autocast", "bf16", "fp16", "activation_checkpointing", "comms_logger", "flops_profiler", "aio", "checkpoint")
SCALARS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "prescale_gradients",
    "gradient_predivide_factor",
    "communication_data_type",
    "sparse_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "seed",
)
Settings = dict[str, Any]
# Elements, where a file does not say: DeepSpeed 0.19.8's own.
DEFAULTS = {
    "sub_group_size": 1_000_000_000,
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
ON_DISK = 2**18  # elements, 1 MiB: smaller parts of a parameter DeepSpeed leaves in memory
SUB_GROUP = 2**20  # elements: 4 MiB a file, which disks read and write as fast as longer ones
SMALLEST_BUCKET = 2**20  # elements: below, averaging gradients in more parts saves no memory worth having


def path_of(config: Config) -> Path:
    """The user's file, or the one of ds_configs/ for the planned stage."""
    given = config.engine.deepspeed_config
    name = "zero3_nvme" if config.engine.offload == "nvme" else f"zero{config.engine.zero}"
    return Path(given) if given else ds_config_path(name)


def read(path: Path) -> Settings:
    """The file's settings, its keys checked. Raises UsageError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the DeepSpeed file {path} cannot be read ({error}); check --deepspeed_config") from None
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"the DeepSpeed file {path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"the DeepSpeed file {path} is not a JSON object {{...}}")
    for key in settings:
        if key in ("optimizer", "scheduler"):
            raise UsageError(f"{path}: {key!r} comes from the command (--lr, --weight-decay, --schedule); remove it from the file")
        if key not in SECTIONS + SCALARS:
            raise UsageError(f"{path}: the key {key!r} is not known; possible: {', '.join(SECTIONS + SCALARS)}")
    zero = settings.get("zero_optimization", {})
    sections = {key: settings[key] for key in SECTIONS if key in settings}
    if isinstance(zero, dict):
        sections |= {f"zero_optimization.{key}": zero[key] for key in ("offload_optimizer", "offload_param") if key in zero}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UsageError(f"{path}: {name} is {json.dumps(section)}, and must be an object {{...}}; the files in ds_configs/ show how")
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UsageError(f"{path}: ZeRO stage {stage!r} does not exist; possible: 0, 1, 2, 3")
    return settings


def refuse_unknown(settings: Settings, path: Path) -> None:
    """DeepSpeed's own check of the ZeRO section's keys and values, as a sentence. Raises UsageError."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise UsageError(f"{path}: DeepSpeed refuses {name} = {json.dumps(first['input'], default=str)}: {first['msg'].lower()}") from None


def offload_of(settings: Settings, path: Path) -> str:
    """ "auto", "none", "cpu" or "nvme": where a file's optimiser (and ZeRO-3 parameters) rest, the slower of both. Raises UsageError."""
    zero = settings.get("zero_optimization", {})
    optimizer, parameters = (str(zero.get(key, {}).get("device", "none")) for key in ("offload_optimizer", "offload_param"))
    devices = {optimizer, parameters}
    if parameters == "nvme" != optimizer:
        raise UsageError(f'{path} rests parameters on a disk, and the optimiser not; write the same in offload_optimizer, or "cpu" in offload_param')
    return next((place for place in ("nvme", "cpu", "auto") if place in devices), "none")


def stage_and_offload(config: Config) -> tuple[int | str, str]:
    """What command and file together say about ZeRO: (stage or "auto", offload or "auto"). Raises UsageError where they differ."""
    stage, offload = config.engine.zero, config.engine.offload
    if config.engine.deepspeed_config is not None:
        path = Path(config.engine.deepspeed_config)
        settings = read(path)
        own_stage, own_offload = settings.get("zero_optimization", {}).get("stage", 0), offload_of(settings, path)
        if stage not in (AUTO, own_stage):
            raise UsageError(f"{path} has ZeRO stage {own_stage}, the command says --zero {stage}; leave --zero out or change the file")
        if own_offload != AUTO and offload not in (AUTO, own_offload):
            raise UsageError(f"{path} offloads to {own_offload}, the command says --offload {offload}; leave --offload out or change the file")
        stage, offload = own_stage, (own_offload if own_offload != AUTO else offload)
    if offload in ("cpu", "nvme") and config.recipe.optimizer == "sgd":
        raise UsageError(
            f"--offload {offload} is for --optimizer adamw or adam, which DeepSpeed steps on the CPU, and sgd was given; type --offload none"
        )
    if stage == 0 and offload == "cpu":
        raise UsageError("--offload cpu needs ZeRO stage 1, 2 or 3, and stage 0 was given; type --zero 2")
    if offload == "nvme":
        if config.engine.engine == "deepspeed" and stage not in (AUTO, 3):
            raise UsageError(f"--offload nvme needs ZeRO stage 3, and stage {stage} was given; type --zero 3, or --offload cpu")
        return 3, offload
    if config.engine.nvme_path is not None:
        raise UsageError(
            f"--nvme-path {config.engine.nvme_path} is for --offload nvme, and the offload is {offload}; type --offload nvme, or leave it out"
        )
    return stage, offload


def resolve(config: Config, world_size: int, cpu_adam: bool) -> Settings:
    """The complete configuration of a planned run (no `auto` left in `config`).

    `cpu_adam` says whether DeepSpeed's own CPU optimiser is there; without it torch's AdamW steps the offloaded part.
    Raises UsageError where the file contradicts the command.
    """
    engine, recipe = config.engine, config.recipe
    path = path_of(config)
    settings = read(path)
    assert isinstance(config.data.batch_size, int)
    owned: Settings = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // recipe.accumulation // world_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.clip,
    }
    options = {"train_batch_size": "--batch-size", "gradient_accumulation_steps": "--accumulation", "gradient_clipping": "--clip"}
    for key, value in owned.items():
        _own(settings, key, value, options.get(key, "--batch-size"), path)
    for section in ("bf16", "fp16"):
        enabled = settings.get(section, {}).get("enabled", False)
        if enabled is True or (enabled == AUTO and engine.precision == section):
            if enabled is True and engine.precision != section:
                raise UsageError(f'{path} enables {section}, the command says --precision {engine.precision}; write "enabled": "auto" there')
            if enabled is True:
                raise UsageError(
                    f'{path} enables the section {section!r}, which puts the residual stream in low precision; write "enabled": "auto" '
                    f"there: --precision {section} then uses torch_autocast"
                )
        settings.pop(section, None)
    autocast = settings.setdefault("torch_autocast", {})
    _own(autocast, "enabled", engine.precision in DTYPES, "--precision", path, "torch_autocast.")
    _own(autocast, "dtype", DTYPES.get(engine.precision, "bfloat16"), "--precision", path, "torch_autocast.")
    autocast.setdefault("lower_precision_safe_modules", [])  # gradients are reduced in float32
    settings["zero_optimization"] = zero = _filled(settings.get("zero_optimization", {"stage": 0}), config, world_size)
    if config.engine.offload == "nvme":
        _check_nvme(zero, config, path)
    if "offload_optimizer" in zero and not cpu_adam:
        settings["zero_force_ds_cpu_optimizer"] = False
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("steps_per_print", 10**9 if engine.pipeline_stages == 1 else None)  # a pipeline prints before its first step at any number
    return settings


def _filled(zero: Settings, config: Config, ranks: int) -> Settings:
    """The ZeRO section with every "auto" replaced."""
    filled = dict(zero)
    for key in ("offload_optimizer", "offload_param"):
        device = filled.get(key, {}).get("device")
        if device == AUTO:
            filled[key] = filled[key] | {"device": config.engine.offload}
        if (config.engine.offload if device == AUTO else device) == "none":
            del filled[key]
    if AUTO in filled.values():
        filled |= {key: value for key, value in (_sizes(config) | {"sub_group_size": _sub_group(config, ranks)}).items() if filled.get(key) == AUTO}
    for key, sizes in _nvme_sizes(config, ranks).items():
        if filled.get(key, {}).get("device") == "nvme":
            filled[key] = sizes | {name: value for name, value in filled[key].items() if value != AUTO}
    return filled


def _nvme_sizes(config: Config, ranks: int) -> dict[str, Settings]:
    """What "auto" stands for, or what is not said, in the sections of what rests on a disk; buffers in host memory, elements.

    A step of Adam has four tensors of a sub-group in memory. Of the parameters those of two stacks may be there: the one in use, and the last
    one of the forward pass, which stays for backward.
    """
    parts = _partitions(config, ranks)
    together = max(sum(n >= ON_DISK for n in stack) for stack in parts)
    largest = max(ON_DISK, *(max(stack) for stack in parts))
    return {
        "offload_optimizer": {"nvme_path": config.engine.nvme_path, "buffer_count": 4},
        "offload_param": {"nvme_path": config.engine.nvme_path, "buffer_count": 2 * together + 2, "buffer_size": largest, "max_in_cpu": 0},
    }


def _check_nvme(zero: Settings, config: Config, path: Path) -> None:
    """Raises UsageError for a file that DeepSpeed cannot rest states on a disk with."""
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            _own(zero[key], "nvme_path", config.engine.nvme_path, "--nvme-path", path, f"zero_optimization.{key}.")
    if zero.get("offload_param", {}).get("device") == "nvme" and zero.get("stage3_prefetch_bucket_size", DEFAULTS["stage3_prefetch_bucket_size"]):
        raise UsageError(
            f"{path} gathers parameters ahead that rest on a disk, which DeepSpeed 0.19.8 loses count of at a step; "
            f'write "stage3_prefetch_bucket_size": 0 there'
        )


def _partitions(config: Config, ranks: int) -> list[list[int]]:
    """Elements of each rank's part of each parameter of each stack."""
    return [[-(-n // ranks) for n in stack] for stack in _stacks(config)]


def _sub_group(config: Config, ranks: int) -> int:
    """Elements that an optimiser step on a disk moves together, of a rank."""
    return max(SUB_GROUP, *(max(stack) for stack in _partitions(config, ranks)))


def largest_part(config: Config, ranks: int) -> int:
    """Elements of the largest part of a parameter that a rank has."""
    return max(max(stack) for stack in _partitions(config, ranks))


def on_disk(config: Config, ranks: int) -> int:
    """Elements of a rank's parameters that are large enough for DeepSpeed to rest them on a disk."""
    return sum(n for stack in _partitions(config, ranks) for n in stack if n >= ON_DISK)


def _stacks(config: Config) -> list[list[int]]:
    """Elements of each parameter of each stack; of each module, where there are none."""
    if config.model.model != "convnext":
        return [list(own) for own in tensors_of(config.model)]
    return stack_tensors(config.model, config.engine.stack_size)


def _sizes(config: Config) -> dict[str, int]:
    """What "auto" stands for in the sizes of ZeRO's buffers, elements.

    ZeRO-3 gathers ahead while less than two of the largest stacks are there, and whole tensors, none of which is half a stack:
    so at most two and a half at once, the one in use and what comes next. The last stack of the forward pass is the first of the
    backward pass, and stays for it.
    """
    largest = max(map(sum, _stacks(config)))
    return {
        "reduce_bucket_size": min(max(largest, SMALLEST_BUCKET), DEFAULTS["reduce_bucket_size"]),
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,
        "stage3_max_reuse_distance": largest,
        "stage3_param_persistence_threshold": 0,
    }


def zero_section(config: Config, ranks: int = 1) -> Settings:
    """The filled ZeRO section of a planned run, with DeepSpeed's defaults for the sizes it does not give."""
    return DEFAULTS | _filled(read(path_of(config)).get("zero_optimization", {"stage": 0}), config, ranks)


class Resting(NamedTuple):
    """Where a run's states rest between their uses: "device", "cpu" or "nvme". Gradients rest with the optimiser, or on the CPU."""

    optimizer: str
    parameters: str


def resting(config: Config) -> Resting:
    """Where the states of a planned run rest: a file may offload the optimiser alone, or the parameters alone."""
    if config.engine.engine == "torch" or config.engine.zero == 0:
        return Resting("device", "device")
    zero = zero_section(config)
    optimizer, parameters = (zero.get(key, {}).get("device", "device") for key in ("offload_optimizer", "offload_param"))
    return Resting(optimizer, parameters if config.engine.zero == 3 else "device")


def gathered(config: Config, ranks: int) -> int:
    """The most elements of whole parameters that ZeRO-3 holds at once on a rank's device, beside the rank's own part.

    0 below stage 3, and where the rank's own part is the whole: on one rank, unless it rests on the host of another device. What is kept
    for backward holds no weight (models/stack.py), so that the number is the same for every activation policy, but where a stack runs forward
    again while another's backward runs.
    """
    if config.engine.engine == "torch" or config.engine.zero != 3:
        return 0
    if ranks == 1 and (config.engine.device == "cpu" or resting(config).parameters == "device"):
        return 0
    zero, stacks = zero_section(config), _stacks(config)
    largest = max(map(sum, stacks))
    persistent = sum(n for stack in stacks for n in stack if n <= int(zero["stage3_param_persistence_threshold"]))
    ahead = int(zero["stage3_max_live_parameters"]) + max(map(max, stacks)) if zero["stage3_prefetch_bucket_size"] else 0
    reused = largest + int(zero["stage3_max_reuse_distance"])
    both = largest if config.engine.activations == "revolve" else 0
    return min(parameters_of(config.model), persistent + max(ahead, reused) + both)


def reduce_bucket(config: Config) -> int:
    """Elements of the buffers in which ZeRO 1-3 average gradients; a GPU allocates them whole, a CPU as far as gradients fill them."""
    if config.engine.engine == "torch" or config.engine.zero == 0:
        return 0
    zero = zero_section(config)
    if not zero.get("contiguous_gradients", True):
        return 0
    return int(zero["reduce_bucket_size"]) * (2 if zero.get("overlap_comm") and config.engine.zero != 3 else 1)


def _own(section: Settings, key: str, value: Any, option: str, path: Path, prefix: str = "") -> None:
    """Writes the command's value where the file says "auto" or nothing; refuses another."""
    given = section.get(key, AUTO)
    if given != AUTO and (given != value or isinstance(given, bool) != isinstance(value, bool)):
        raise UsageError(
            f'{path} says {prefix}{key} {json.dumps(given)}, the command {json.dumps(value)}; write "auto" in the file or change {option}'
        )
    section[key] = value
