"""DeepSpeed's configuration: what is filled in, what is always written, and what is refused, by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepscale import engine_config, paths
from deepscale.config import Config
from deepscale.errors import UsageError
from deepscale.models.convnext import ConvNeXt, count_parameters, stack_tensors
from deepscale.models.stack import BlockStack

WriteFile = Callable[..., Path]
PLANNED: dict[str, Any] = {"width": 4, "patch_size": 4, "batch_size": 24, "zero": 2, "offload": "none", "precision": "fp32", "activations": "keep"}


def planned(**settings: Any) -> Config:
    """A configuration without any auto that the engine looks at."""
    return Config().replace(**{**PLANNED, **settings})


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    """`write({...})` or `write("text")` makes a DeepSpeed file."""

    def to_file(content: Any) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return to_file


def autos(value: Any) -> int:
    """How many "auto" a resolved configuration still holds."""
    if isinstance(value, dict):
        return sum(autos(part) for part in value.values())
    return int(value == "auto")


# ---------------------------------------------------------------------------------------------------------------- filled in


def test_auto_values_come_from_the_command() -> None:
    settings = engine_config.resolve(planned(accumulation=3, clip=2.5, precision="bf16"), 4, cpu_adam=False)
    assert settings["train_batch_size"] == 24
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 2.5
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": engine_config.SMALLEST_BUCKET}
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert autos(settings) == 0


def test_clipping_is_always_written(write: WriteFile) -> None:
    """DeepSpeed clips at 1.0 where the key is absent: 0 has to be said."""
    assert engine_config.resolve(planned(clip=0.0), 1, False)["gradient_clipping"] == 0.0
    file = write({"zero_optimization": {"stage": 1}})
    assert engine_config.resolve(planned(clip=0.0, deepspeed_config=str(file)), 1, False)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(("precision", "enabled", "dtype"), [("fp32", False, "bfloat16"), ("bf16", True, "bfloat16"), ("fp16", True, "float16")])
def test_low_precision_is_autocasts_alone(precision: str, enabled: bool, dtype: str) -> None:
    for zero in range(4):
        settings = engine_config.resolve(planned(precision=precision, zero=zero), 1, False)
        assert (settings["torch_autocast"]["enabled"], settings["torch_autocast"]["dtype"]) == (enabled, dtype)
        assert "bf16" not in settings and "fp16" not in settings


@pytest.mark.parametrize("name", paths.ds_config_names())
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_file_of_ds_configs_resolves(name: str, offload: str, precision: str) -> None:
    """By its path, as a user gives it, and accepted by DeepSpeed's own check."""
    pytest.importorskip("deepspeed")
    path = paths.ds_config_path(name)
    if name.endswith("_nvme"):
        offload = "nvme"
    disk = {"nvme_path": "/disk"} if offload == "nvme" else {}
    asked = Config().replace(deepspeed_config=str(path), offload="auto", **disk)
    stage, resting = engine_config.stage_and_offload(asked)
    assert stage == int(name[4])
    if name.endswith("_offload"):
        assert resting == "cpu"
        offload = "cpu"
    elif name == "zero0":
        offload = "none"
    settings = engine_config.resolve(planned(zero=stage, offload=offload, precision=precision, deepspeed_config=str(path), **disk), 1, True)
    engine_config.refuse_unknown(settings, path)
    assert autos(settings) == 0
    offloaded = {key for key in settings["zero_optimization"] if key.startswith("offload")}
    assert offloaded == (set() if offload == "none" else {"offload_optimizer"} | ({"offload_param"} if stage == 3 else set()))


@pytest.mark.parametrize("zero", range(4))
def test_the_file_of_a_stage_is_taken_without_a_file_of_the_users(zero: int) -> None:
    assert engine_config.path_of(planned(zero=zero)) == paths.ds_config_path(f"zero{zero}")
    assert engine_config.resolve(planned(zero=zero), 1, False)["zero_optimization"]["stage"] == zero


def test_without_deepspeeds_cpu_optimiser_torchs_steps_the_offloaded_part() -> None:
    assert engine_config.resolve(planned(offload="cpu"), 1, cpu_adam=False)["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in engine_config.resolve(planned(offload="cpu"), 1, cpu_adam=True)
    assert "zero_force_ds_cpu_optimizer" not in engine_config.resolve(planned(offload="none"), 1, cpu_adam=False)


def test_equal_values_in_the_file_are_no_contradiction(write: WriteFile) -> None:
    file = write({
        "train_batch_size": 24, "train_micro_batch_size_per_gpu": 12, "gradient_accumulation_steps": 1, "gradient_clipping": 5,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "bf16": {"enabled": False}, "steps_per_print": 7,
    })  # fmt: skip
    settings = engine_config.resolve(planned(precision="bf16", deepspeed_config=str(file)), 2, False)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["steps_per_print"] == 7


# ------------------------------------------------------------------------------------------------------- buffers and places

BLOCK = 8 * 512**2 + 17 * 512 + 1  # elements of a block of 512 channels: 3x3, norm, two 1x1 of 4x, their biases, gamma
SIXTEEN = {"width": 64, "blocks": (16, 16, 144, 16), "stack_size": 16}  # the widest stage is one stack of 16 blocks


def test_zeros_buffers_are_as_large_as_the_largest_stack() -> None:
    """Counted by hand for width 64: the largest stack is 16 blocks of 512 channels."""
    built = ConvNeXt(planned(**SIXTEEN).model, stack_size=16)
    stacks = [[p.numel() for p in module.parameters()] for module in built.modules() if isinstance(module, BlockStack)]
    assert stack_tensors(built.config, 16) == stacks and max(map(sum, stacks)) == 16 * BLOCK
    zero = engine_config.resolve(planned(zero=3, **SIXTEEN), 2, False)["zero_optimization"]
    assert {key: value for key, value in zero.items() if key != "stage"} == {
        "reduce_bucket_size": 16 * BLOCK,
        "stage3_prefetch_bucket_size": 16 * BLOCK,
        "stage3_max_live_parameters": 32 * BLOCK,
        "stage3_max_reuse_distance": 16 * BLOCK,
        "stage3_param_persistence_threshold": 0,
    }
    assert engine_config.resolve(planned(zero=3, width=8, depth=26), 2, False)["zero_optimization"]["reduce_bucket_size"] == 2**20
    huge = planned(zero=1, width=512, depth=10_001, stack_size=56)
    assert engine_config.resolve(huge, 2, False)["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_sizes_in_a_users_file_win(write: WriteFile) -> None:
    own = {"stage": 3, "stage3_prefetch_bucket_size": 7, "stage3_max_live_parameters": "auto", "offload_optimizer": {"device": "auto", "ratio": 0.5}}
    zero = engine_config.resolve(planned(zero=3, offload="cpu", deepspeed_config=str(write({"zero_optimization": own})), **SIXTEEN), 2, False)
    assert zero["zero_optimization"] == own | {"stage3_max_live_parameters": 32 * BLOCK, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}


def test_what_is_gathered_at_once(write: WriteFile) -> None:
    """By hand: two stacks and the largest tensor; with DeepSpeed's own sizes everything; without prefetching the stack in use and what is reused."""
    total = count_parameters(planned(**SIXTEEN).model)
    assert engine_config.gathered(planned(zero=3, **SIXTEEN), 2) == 32 * BLOCK + 16 * 4 * 512**2 < 3 * 16 * BLOCK < total
    assert engine_config.gathered(planned(zero=3, activations="keep", **SIXTEEN), 2) == engine_config.gathered(planned(zero=3, **SIXTEEN), 2)
    file = write({"zero_optimization": {"stage": 3}})
    assert engine_config.gathered(planned(zero=3, deepspeed_config=str(file), **SIXTEEN), 2) == total
    one = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    alone = planned(zero=3, deepspeed_config=str(write({"zero_optimization": one})), **SIXTEEN)
    assert engine_config.gathered(alone, 2) == 16 * BLOCK
    small = one | {"stage3_param_persistence_threshold": 16 * 64}  # of the first stage: both norm parameters, two biases, the gammas of all
    persistent = planned(zero=3, deepspeed_config=str(write({"zero_optimization": small})), **SIXTEEN)
    stacks = stack_tensors(persistent.model, 16)
    assert engine_config.gathered(persistent, 2) == 16 * BLOCK + 4 * 16 * 64 + 16 * len(stacks)


@pytest.mark.parametrize(
    ("zero", "offload", "device", "ranks", "nothing"),
    [
        (2, "none", "cuda", 2, True),
        (3, "none", "cuda", 1, True),  # the whole parameter is the rank's own part
        (3, "cpu", "cuda", 1, False),  # which is fetched from the host
        (3, "cpu", "cpu", 1, True),
        (3, "cpu", "cpu", 2, False),
    ],
)
def test_nothing_is_gathered_where_a_rank_has_the_whole(zero: int, offload: str, device: str, ranks: int, nothing: bool) -> None:
    assert (engine_config.gathered(planned(zero=zero, offload=offload, device=device, **SIXTEEN), ranks) == 0) is nothing


@pytest.mark.parametrize(
    ("zero", "offload", "section", "rests"),
    [
        (0, "none", None, ("device", "device")),
        (2, "none", None, ("device", "device")),
        (2, "cpu", None, ("cpu", "device")),
        (3, "none", None, ("device", "device")),
        (3, "cpu", None, ("cpu", "cpu")),
        (3, "cpu", {"stage": 3, "offload_optimizer": {"device": "cpu"}}, ("cpu", "device")),
        (3, "cpu", {"stage": 3, "offload_param": {"device": "cpu"}}, ("device", "cpu")),
        (3, "none", {"stage": 3, "offload_param": {"device": "auto"}}, ("device", "device")),
        (3, "cpu", {"stage": 3, "offload_param": {"device": "auto"}, "offload_optimizer": {"device": "none"}}, ("device", "cpu")),
        (2, "cpu", {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, ("cpu", "device")),
    ],
)
def test_what_rests_where(write: WriteFile, zero: int, offload: str, section: Any, rests: tuple[str, str]) -> None:
    """One word --offload cpu does not say whether a file offloads the optimiser, the parameters or both."""
    file = {} if section is None else {"deepspeed_config": str(write({"zero_optimization": section}))}
    assert engine_config.resting(planned(zero=zero, offload=offload, **file)) == rests


def test_the_buffers_of_the_gradients(write: WriteFile) -> None:
    def elements(**section: Any) -> int:
        file = write({"zero_optimization": section})
        return engine_config.reduce_bucket(planned(zero=section["stage"], deepspeed_config=str(file), **SIXTEEN))

    assert elements(stage=0) == 0
    assert elements(stage=2) == 500_000_000
    assert elements(stage=2, reduce_bucket_size="auto") == 16 * BLOCK
    assert elements(stage=1, reduce_bucket_size=1000, overlap_comm=True) == 2000
    assert elements(stage=3, reduce_bucket_size=1000, overlap_comm=True) == 1000
    assert elements(stage=2, reduce_bucket_size=1000, contiguous_gradients=False) == 0


# ---------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"train_batch_size": 32}, ["train_batch_size 32", "24", "--batch-size"]),
        ({"train_micro_batch_size_per_gpu": 7}, ["train_micro_batch_size_per_gpu 7", "24", "--batch-size"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps 2", "1", "--accumulation"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping 1.0", "5.0", "--clip"]),
        ({"gradient_clipping": True}, ["gradient_clipping true", "5.0", "--clip"]),
        ({"bf16": {"enabled": True}}, ["bf16", "--precision fp32"]),
        ({"fp16": {"enabled": True}}, ["fp16", "--precision fp32"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled true", "false", "--precision"]),
        ({"torch_autocast": {"dtype": "float16"}}, ["torch_autocast.dtype", "float16", "--precision"]),
    ],
)
def test_a_contradiction_between_file_and_command_is_refused_by_name(write: WriteFile, content: dict[str, Any], named: list[str]) -> None:
    file = write({"zero_optimization": {"stage": 2}, **content})
    with pytest.raises(UsageError) as refused:
        engine_config.resolve(planned(deepspeed_config=str(file)), 1, False)
    assert all(word in str(refused.value) for word in [str(file), *named]), refused.value


def test_sections_that_put_the_residual_stream_in_low_precision_are_refused(write: WriteFile) -> None:
    """Though the command says bf16, too: 3,333 additions of 1/3,333 to 1.0 leave 1.0 there."""
    for section in ("bf16", "fp16"):
        file = write({section: {"enabled": True}})
        with pytest.raises(UsageError, match=f"'{section}'.*residual stream.*torch_autocast"):
            engine_config.resolve(planned(precision=section, deepspeed_config=str(file)), 1, False)
        file = write({section: {"enabled": "auto"}})
        settings = engine_config.resolve(planned(precision=section, deepspeed_config=str(file)), 1, False)
        assert section not in settings and settings["torch_autocast"]["enabled"] is True


@pytest.mark.parametrize(
    ("settings", "content", "named"),
    [
        ({"zero": 3}, {"zero_optimization": {"stage": 2}}, ["stage 2", "--zero 3"]),
        ({"zero": 1}, {}, ["stage 0", "--zero 1"]),
        ({"offload": "none"}, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, ["cpu", "--offload none"]),
        ({"offload": "cpu"}, {"zero_optimization": {"stage": 2}}, ["none", "--offload cpu"]),
        ({"offload": "auto"}, {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["stage 0", "--zero 2"]),
        ({"offload": "auto"}, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ["stage 2", "--offload cpu"]),
    ],
)
def test_stage_and_offload_of_file_and_command(write: WriteFile, settings: dict[str, Any], content: Any, named: list[str]) -> None:
    file = write(content)
    with pytest.raises(UsageError) as refused:
        engine_config.stage_and_offload(Config().replace(deepspeed_config=str(file), **settings))
    assert all(word in str(refused.value) for word in named), refused.value


def test_the_file_decides_what_the_command_leaves_open(write: WriteFile) -> None:
    offloading = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert engine_config.stage_and_offload(Config().replace(deepspeed_config=str(write({"zero_optimization": offloading})))) == (3, "cpu")
    assert engine_config.stage_and_offload(Config().replace(deepspeed_config=str(write({})))) == (0, "none")
    open_one = write({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "auto"}}})
    assert engine_config.stage_and_offload(Config().replace(deepspeed_config=str(open_one))) == (1, "auto")
    assert engine_config.stage_and_offload(Config().replace(deepspeed_config=str(open_one), offload="cpu")) == (1, "cpu")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{stage: 2}", ["not JSON", "line 1, column 2"]),
        ("[1, 2]", ["not a JSON object"]),
        ("", ["not JSON"]),
        ({"zero_optimisation": {}}, ["'zero_optimisation'", "zero_optimization"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'", "--lr"]),
        ({"scheduler": {"type": "OneCycle"}}, ["'scheduler'", "--schedule"]),
        ({"zero_optimization": {"stage": 4}}, ["stage 4", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": -1}}, ["stage -1", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": "2"}}, ["stage '2'", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": True}}, ["stage True", "0, 1, 2, 3"]),
        ({"zero_optimization": 2}, ["zero_optimization is 2", "object"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, ["zero_optimization.offload_optimizer", '"cpu"', "object"]),
        ({"bf16": True}, ["bf16 is true", "object"]),
        ({"torch_autocast": "auto"}, ['torch_autocast is "auto"', "object"]),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(write: WriteFile, content: Any, named: list[str]) -> None:
    file = write(content)
    with pytest.raises(UsageError) as refused:
        engine_config.read(file)
    assert all(word in str(refused.value) for word in [str(file), *named]), refused.value
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff\xfe")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "picture.json"):
        with pytest.raises(UsageError, match="cannot be read"):
            engine_config.read(path)


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"stagee": 1}, ["zero_optimization.stagee = 1", "not permitted"]),
        ({"overlap_comm": "perhaps"}, ['zero_optimization.overlap_comm = "perhaps"', "boolean"]),
        ({"offload_optimizer": {"device": "disk"}}, ["zero_optimization.offload_optimizer.device", '"disk"']),
    ],
)
def test_what_deepspeed_itself_refuses_is_one_sentence(write: WriteFile, zero: dict[str, Any], named: list[str]) -> None:
    pytest.importorskip("deepspeed")
    file = write({"zero_optimization": {"stage": 2, **zero}})
    settings = engine_config.resolve(planned(deepspeed_config=str(file)), 1, True)
    with pytest.raises(UsageError) as refused:
        engine_config.refuse_unknown(settings, file)
    assert all(word in str(refused.value) for word in [str(file), *named]), refused.value
    assert "\n" not in str(refused.value) and "pydantic" not in str(refused.value)


def test_a_stage_that_cannot_offload_so_is_refused_on_the_command_line() -> None:
    with pytest.raises(UsageError, match=r"--offload nvme.*stage 1.*--zero 3.*--offload cpu"):
        engine_config.stage_and_offload(Config().replace(zero=1, offload="nvme"))
    with pytest.raises(UsageError, match=r"--nvme-path /disk is for --offload nvme"):
        engine_config.stage_and_offload(Config().replace(nvme_path="/disk"))
    assert engine_config.stage_and_offload(Config().replace(offload="nvme")) == (3, "nvme")
    with pytest.raises(UsageError, match=r"--offload cpu.*stage 0.*--zero 2"):
        engine_config.stage_and_offload(Config().replace(zero=0, offload="cpu"))
    assert engine_config.stage_and_offload(Config()) == ("auto", "auto")
