"""Settings: from the command line and back, what is refused and with which sentence, and the traps between None and 0."""

import argparse
import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepscale.config import AUTO, GROUPS, Config, EngineConfig, ModelConfig, differing, flat, parse
from deepscale.errors import UsageError
from deepscale.models.registry import MODELS
from deepscale.parsing import Every, parse_bytes, parse_duration, parse_every

OPTIONS = {f.name: f for group in GROUPS for f in dataclasses.fields(group)}
SWITCHES = {name for name, f in OPTIONS.items() if f.metadata.get("switch")}
# Options that take any text: paths and names.
FREE_TEXT = {"data_dir", "deepspeed_config", "nvme_path", "experiment", "run_name", "checkpoint_dir", "resume", "init_from"}

# A value that is not the default for every option, as typed and as stored.
OTHER: dict[str, tuple[str, Any]] = {
    "depth": ("1_004", 1_004),
    "blocks": ("1,2,5,1", (1, 2, 5, 1)),
    "model": ("vgg", "vgg"),
    "width": ("16", 16),
    "patch_size": ("4", 4),
    "kernel_size": ("7", 7),
    "activation": ("silu", "silu"),
    "norm": ("rmsnorm", "rmsnorm"),
    "norm_scope": ("blocks", "blocks"),
    "skip": ("deepnorm", "deepnorm"),
    "skip_scope": ("all", "all"),
    "skip_pairs": ("1-3,4-7", "1-3,4-7"),
    "gradient_normalisation": ("", True),
    "init": ("orthogonal", "orthogonal"),
    "init_std": ("0.1", 0.1),
    "sigma_w": ("1.1", 1.1),
    "sigma_b": ("0", 0.0),
    "layerscale_init": ("1e-6", 1e-6),
    "layerscale_shape": ("channel", "channel"),
    "drop_path": ("0.1", 0.1),
    "drop_path_mode": ("batch", "batch"),
    "sync_batchnorm": ("", True),
    "dataset": ("cifar100", "cifar100"),
    "data_dir": ("/data", "/data"),
    "download": ("", False),
    "feed": ("tensors", "tensors"),
    "synthetic_classes": ("100", 100),
    "batch_size": ("128", 128),
    "grey": ("", True),
    "image_size": ("28", 28),
    "augment": ("", False),
    "color_jitter": ("0.2", 0.2),
    "workers": ("3", 3),
    "eval_images": ("1,000", 1_000),
    "optimizer": ("sgd", "sgd"),
    "lr": ("3e-3", 3e-3),
    "weight_decay": ("0", 0.0),
    "beta1": ("0.8", 0.8),
    "beta2": ("0.99", 0.99),
    "eps": ("1e-6", 1e-6),
    "momentum": ("0.9", 0.9),
    "schedule": ("cosine", "cosine"),
    "schedule_every": ("epoch", "epoch"),
    "min_lr": ("1e-5", 1e-5),
    "clip": ("0", 0.0),
    "accumulation": ("2", 2),
    "epochs": ("3", 3),
    "max_steps": ("60", 60),
    "time_budget": ("5m", 300.0),
    "eval_every": ("10", 10),
    "freeze": ("2", 2),
    "seed": ("7", 7),
    "engine": ("torch", "torch"),
    "zero": ("2", 2),
    "offload": ("cpu", "cpu"),
    "nvme_path": ("/disk", "/disk"),
    "deepspeed_config": ("ds.json", "ds.json"),
    "pipeline_stages": ("2", 2),
    "precision": ("bf16", "bf16"),
    "activations": ("recompute", "recompute"),
    "stack_size": ("8,4,2,1", (8, 4, 2, 1)),
    "segment": ("5", 5),
    "slots": ("8,8,16,4", (8, 8, 16, 4)),
    "device": ("cpu", "cpu"),
    "kernel": ("torch", "torch"),
    "threads": ("1", 1),
    "hang_timeout": ("5m", 300.0),
    "local_rank": ("1", 1),
    "verbose": ("", True),
    "tracking": ("", False),
    "experiment": ("depth", "depth"),
    "tags": ("a=1,b=x=y", ("a=1", "b=x=y")),
    "record_every": ("25", 25),
    "vanishing_ratio": ("1e-3", 1e-3),
    "exploding_ratio": ("100", 100.0),
    "run_name": ("first", "first"),
    "checkpoint_every": ("500steps", Every(steps=500)),
    "checkpoint_dir": ("runs", "runs"),
    "resume": ("auto", "auto"),
    "init_from": ("weights", "weights"),
    "init_layers": ("4", 4),
    "keep": ("3", 3),
    "async_save": ("", False),
}


# What must be typed beside a setting for it to be possible; such settings are not typed with all the others.
NEEDS = {
    "skip_scope": {"model": "vgg"},
    "skip_pairs": {"model": "mlp"},
    "gradient_normalisation": {"model": "mlp"},
    "sigma_w": {"model": "plain"},
    "sigma_b": {"model": "plain"},
    "init_layers": {"init_from": "weights"},
    "momentum": {"optimizer": "sgd"},
    "min_lr": {"schedule": "cosine"},
    "slots": {"activations": "revolve"},
}
APART = {"model", "init_std", "pipeline_stages", *NEEDS}


def with_needs(name: str) -> tuple[list[str], dict[str, Any]]:
    """What `name` needs, as typed and as it then differs from the defaults."""
    return [word for other, text in NEEDS.get(name, {}).items() for word in (f"--{other.replace('_', '-')}", text)], dict(NEEDS.get(name, {}))


def typed(name: str) -> list[str]:
    """The option of a setting with its value from OTHER, as a user types it."""
    text, value = OTHER[name]
    flag = name.replace("_", "-")
    if name in SWITCHES:
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", text]


def test_every_setting_is_in_the_table_above() -> None:
    assert OTHER.keys() == OPTIONS.keys()
    assert list(flat(Config())) == list(OPTIONS)


def test_no_argument_gives_the_defaults() -> None:
    assert parse([]) == Config()
    assert differing(parse([])) == {}


@pytest.mark.parametrize("name", OTHER)
def test_an_option_sets_its_setting_and_no_other(name: str) -> None:
    needs, differs = with_needs(name)
    assert differing(parse([*typed(name), *needs])) == {**differs, name: OTHER[name][1]}


def test_all_options_together_and_the_same_by_replace() -> None:
    """The parsed command line against the settings named flat in code."""
    values = {name: value for name, (_, value) in OTHER.items() if name not in APART}
    parsed = parse([argument for name in values for argument in typed(name)])
    assert flat(parsed) == flat(Config()) | values
    assert Config().replace(**values) == parsed
    assert differing(parsed).keys() == values.keys()


@pytest.mark.parametrize("name", sorted(name for name in OTHER if "_" in name and name not in SWITCHES))
def test_underscores_in_an_option_mean_the_same(name: str) -> None:
    """`--deepspeed_config`, as DeepSpeed spells it, against `--deepspeed-config`."""
    needs, _ = with_needs(name)
    assert parse([f"--{name}", OTHER[name][0], *needs]) == parse([*typed(name), *needs])


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_a_switch_can_be_set_both_ways(name: str) -> None:
    flag, (needs, _) = name.replace("_", "-"), with_needs(name)
    assert flat(parse([f"--{flag}", *needs]))[name] is True
    assert flat(parse([f"--no-{flag}", *needs]))[name] is False


CHOICES = {
    "model": tuple(MODELS),
    "activation": ("gelu", "relu", "silu", "tanh", "sigmoid"),
    "norm": ("layernorm", "batchnorm", "rmsnorm", "none", "tensornorm"),
    "norm_scope": ("all", "blocks"),
    "drop_path_mode": ("sample", "batch"),
    "skip": ("identity", "deepnorm", "reversible", "none"),
    "skip_scope": ("blocks", "all"),
    "init": ("normal", "kaiming", "orthogonal", "torch", "delta-orthogonal", "paired", "mirrored", "fixup", "deepnorm"),
    "layerscale_shape": ("scalar", "channel"),
    "dataset": ("auto", "cifar10", "cifar100", "fashionmnist", "folder", "synthetic"),
    "feed": ("auto", "ffcv", "tensors"),
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("onecycle", "cosine", "constant"),
    "schedule_every": ("step", "epoch"),
    "engine": ("deepspeed", "torch"),
    "offload": ("auto", "none", "cpu", "nvme"),
    "activations": ("auto", "keep", "selective", "recompute", "offload", "revolve", "reconstruct"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "device": ("auto", "cuda", "cpu"),
}


# What must be typed beside a value.
WITH_VALUE = {"tensornorm": ["--model", "mlp"], "reconstruct": ["--skip", "reversible"]}


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    flag = name.replace("_", "-")
    for known in CHOICES[name]:
        assert flat(parse([f"--{flag}", known, *with_needs(name)[0], *WITH_VALUE.get(known, [])]))[name] == known
    with pytest.raises(UsageError) as refused:
        parse([f"--{flag}", "nonsense"])
    assert f"--{flag}" in str(refused.value)
    assert f"'nonsense' is not known; possible: {', '.join(CHOICES[name])}" in str(refused.value)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - SWITCHES - FREE_TEXT))
@pytest.mark.parametrize("text", ["nonsense", "", "1;2", "½"])
def test_a_value_that_cannot_be_read_is_refused_by_name(name: str, text: str) -> None:
    """The sentence holds the option, what was given and, but for what the launcher sets, what is possible."""
    flag = name.replace("_", "-")
    with pytest.raises(UsageError) as refused:
        parse([f"--{flag}", text])
    sentence = str(refused.value)
    assert f"--{flag}" in sentence
    assert repr(text) in sentence
    if name != "local_rank":
        assert any(what in sentence for what in ("possible: ", "is not a number from ", "is not a whole number from ", "type for example "))
    assert "all settings: deepspeed deepscale/train.py --help" in sentence
    assert "\n" not in sentence


OUT_OF_RANGE = [
    ("depth", "13", "14 (one block in each of 4 stages) to 1,000,000 layers"),
    ("depth", "1000001", "to 1,000,000 layers"),
    ("blocks", "1,1,5", "four numbers of blocks, each at least 1"),
    ("blocks", "1,1,5,0", "four numbers of blocks, each at least 1"),
    ("blocks", "1,1,5,1,1", "four numbers of blocks, each at least 1"),
    ("width", "0", "a whole number from 1, nor the word auto"),
    ("width", "8.5", "a whole number from 1, nor the word auto"),
    ("patch-size", "0", "a whole number from 1, nor the word auto"),
    ("kernel-size", "0", "a whole number from 1"),
    ("kernel-size", "4", "an odd side keeps the resolution: type 3, 5 or 7"),
    ("layerscale-init", "nan", "nor the word none"),
    ("layerscale-init", "inf", "nor the word none"),
    ("drop-path", "1", "a number from 0 to 0.99"),
    ("drop-path", "-0.1", "a number from 0 to 0.99"),
    ("batch-size", "0", "a whole number from 1"),
    ("color-jitter", "1.1", "a number from 0 to 1"),
    ("workers", "0", "a whole number from 1"),
    ("lr", "-0.1", "a number from 0"),
    ("lr", "nan", "a number from 0"),
    ("lr", "inf", "a number from 0"),
    ("beta1", "1", "a number from 0 to 0.9999"),
    ("beta2", "1", "a number from 0 to 0.99999"),
    ("clip", "-1", "a number from 0"),
    ("accumulation", "0", "a whole number from 1"),
    ("epochs", "0", "a whole number from 1"),
    ("max-steps", "0", "a whole number from 1, nor the word none"),
    ("time-budget", "0", "type for example 90s, 5m or 2h"),
    ("time-budget", "-5m", "type for example 90s, 5m or 2h"),
    ("time-budget", "nan", "type for example 90s, 5m or 2h"),
    ("time-budget", "5 minutes", "type for example 90s, 5m or 2h"),
    ("checkpoint-every", "0steps", "type for example 500steps, 90s or 10m, nor the word none"),
    ("checkpoint-every", "-5m", "type for example 500steps, 90s or 10m, nor the word none"),
    ("checkpoint-every", "1.5steps", "type for example 500steps, 90s or 10m, nor the word none"),
    ("hang-timeout", "0", "type for example 90s, 5m or 2h"),
    ("keep", "0", "a whole number from 1"),
    ("seed", "-1", "a whole number from 0 to 2,147,483,647"),
    ("seed", "2147483648", "a whole number from 0 to 2,147,483,647"),
    ("zero", "4", "a whole number from 0 to 3, nor the word auto"),
    ("stack-size", "0", "a whole number from 1, nor the word auto"),
    ("segment", "0", "a whole number from 1, nor the word auto"),
    ("threads", "0", "a whole number from 1, nor the word auto"),
]


@pytest.mark.parametrize(("flag", "text", "possible"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_the_range(flag: str, text: str, possible: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse([f"--{flag}={text}"])
    assert f"--{flag}" in str(refused.value)
    assert text in str(refused.value)
    assert possible in str(refused.value)


@pytest.mark.parametrize("arguments", [["--dep", "26"], ["--layerscale", "0"], ["--no-down"], ["--verb"]])
def test_abbreviations_are_refused(arguments: list[str]) -> None:
    """A name typed half today may be two options' tomorrow."""
    with pytest.raises(UsageError, match=f"unrecognized arguments: {' '.join(arguments)}"):
        parse(arguments)


@pytest.mark.parametrize("arguments", [["--colour", "red"], ["1004"], ["--download", "yes"], ["--width"]])
def test_arguments_that_are_no_setting_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        parse(arguments)
    assert arguments[-1] in str(refused.value)


def test_no_gamma_and_a_gamma_of_zero_are_two_settings() -> None:
    absent, zero = parse(["--layerscale-init", "none"]), parse(["--layerscale-init", "0"])
    assert absent.model.layerscale_init is None
    assert absent.model.gamma_init is None
    assert zero.model.layerscale_init == 0.0
    assert zero.model.gamma_init == 0.0
    assert differing(absent) == {"layerscale_init": None}
    assert differing(zero) == {"layerscale_init": 0.0}


def test_gamma_by_itself_is_zero_with_a_skip_and_absent_without() -> None:
    assert parse([]).model.gamma_init == 0.0
    assert parse(["--skip", "none"]).model.gamma_init is None
    assert parse(["--skip", "none", "--layerscale-init", "0.5"]).model.gamma_init == 0.5


@pytest.mark.parametrize("zero", ["0", "0.0", "-0", "0e5"])
def test_no_skip_with_gamma_zero_is_refused_with_the_reason(zero: str) -> None:
    with pytest.raises(UsageError, match=r"the only path is multiplied by gamma 0; type --layerscale-init none or 1"):
        parse(["--skip", "none", "--layerscale-init", zero])
    with pytest.raises(UsageError, match=r"the only path is multiplied by gamma 0"):
        Config().replace(skip="none", layerscale_init=float(zero))


SHORT = {"--recompute": "recompute", "--no-recompute": "keep"}


@pytest.mark.parametrize("switch", SHORT)
def test_a_short_switch_is_its_policy(switch: str) -> None:
    assert differing(parse([switch])) == {"activations": SHORT[switch]}
    assert parse([switch, "--activations", SHORT[switch], switch]) == parse([switch])
    assert "recompute" not in flat(Config())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--recompute --activations keep", ["--recompute is short for --activations recompute", "--activations keep was given", "leave one"]),
        ("--activations recompute --no-recompute", ["--no-recompute is short for --activations keep", "--activations recompute was given"]),
        ("--recompute --activations auto", ["--activations auto was given"]),
        ("--no-recompute --recompute", ["--recompute is short for --activations recompute", "--no-recompute was given", "leave one"]),
        ("--activations keep --segment 4", ["--segment 4", "--activations keep was given", "leave --segment out", "type --activations recompute"]),
        ("--segment 4 --no-recompute", ["--segment 4", "--activations keep was given"]),
        ("--activations selective --segment 2", ["--segment 2", "--activations selective was given"]),
        ("--recompute --segment none", ["--segment none", "--activations recompute was given", "type --activations keep"]),
        ("--activations offload --segment none", ["--segment none", "--activations offload was given"]),
        ("--activations recompute --slots 8,8,8,8", ["--slots 8,8,8,8", "--activations recompute was given", "type --activations revolve"]),
        ("--activations revolve --slots none", ["--slots none", "--activations revolve was given", "type --activations recompute"]),
        ("--slots 8 --segment none", ["--slots 8", "--segment none", "leave one of them out"]),
        ("--slots 8 --skip reversible", ["--slots 8", "--skip reversible", "--activations reconstruct or keep"]),
    ],
)
def test_contradictory_policies_are_refused(arguments: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        parse(arguments.split())
    assert [word for word in words if word not in str(refused.value)] == [], refused.value
    assert "\n" not in str(refused.value)


def test_policies_that_go_together() -> None:
    """Segments where blocks are recomputed, or left to the planner; `--offload` is about the optimiser and parameters, not about activations."""
    for line in ("--recompute --segment 4", "--activations offload --segment 4 --offload none", "--segment 4", "--segment none", "--no-recompute"):
        parse(line.split())
    for line in ("--slots 8", "--slots none", "--activations revolve --slots 3,3,9,3 --segment 2", "--slots 8 --segment 2"):
        parse(line.split())
    assert parse(["--segment", "none"]).engine.segment is None


def test_no_limit_is_none_and_not_zero() -> None:
    assert parse(["--max-steps", "none", "--time-budget", "none"]) == Config()
    assert Config().recipe.max_steps is None
    assert Config().recipe.time_budget is None


def test_blocks_override_depth() -> None:
    """Nine blocks are 29 layers, whatever --depth says beside them."""
    model = parse(["--depth", "1004", "--blocks", "1,2,5,1"]).model
    assert model.stage_blocks == (1, 2, 5, 1)
    assert model.built_depth == 3 * 9 + 2


def test_replace_changes_what_is_named_and_leaves_the_original() -> None:
    config = Config()
    changed = config.replace(width=16, zero=2, seed=3)
    assert differing(changed) == {"width": 16, "zero": 2, "seed": 3}
    assert config == Config()
    assert changed.replace(width=AUTO, zero=AUTO, seed=0) == config


def test_replace_refuses_an_unknown_name_and_lists_the_known() -> None:
    with pytest.raises(UsageError) as refused:
        Config().replace(depht=26, width=8)
    assert str(refused.value) == f"setting 'depht' is not known; possible: {', '.join(OPTIONS)}"


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().depth = 30  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().engine = EngineConfig()  # type: ignore[misc]


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, f in OPTIONS.items():
        flag = name.replace("_", "-")
        assert f"--{flag}" in shown
        assert f"(default: {f.default})" in shown


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("1.5m", 90.0), ("2h", 7_200.0), ("1d", 86_400.0), ("0.5", 0.5)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "every"), [("500steps", Every(500)), ("1 step", Every(1)), ("1,000 steps", Every(1000)), ("10m", Every(None, 600.0))]
)
def test_intervals_between_checkpoints(text: str, every: Every) -> None:
    assert parse_every(text) == every == parse_every(str(every))


SIZES = [
    *(("24GiB", 24 * 2**30), ("24G", 24 * 2**30), ("24gb", 24 * 10**9), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), (".5k", 512)),
    *(("2TB", 2 * 10**12), ("4096", 4096), ("4096B", 4096)),
]


@pytest.mark.parametrize(("text", "count"), SIZES)
def test_sizes_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "0", "-4GiB", "much", "4 GiBs", "GiB", "4Gi", "1e9", "inf", "nan", "0.1", "4PiB", "9" * 400])
def test_what_is_no_size_of_memory_gets_a_sentence(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size of memory; type for example 24GiB"):
        parse_bytes(text)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(OPTIONS.keys() - SWITCHES)), st.text(max_size=12))
def test_any_text_is_taken_or_refused_in_one_sentence(name: str, text: str) -> None:
    """No text ends in another exception than UsageError, and no number taken is NaN or infinite."""
    try:
        value = flat(parse([f"--{name}={text}"]))[name]
    except UsageError as refused:
        assert str(refused).strip()
    else:
        assert not isinstance(value, float) or math.isfinite(value)
