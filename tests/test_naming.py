"""Between the stacked and the plain network's names, in memory and through files: nothing is lost, and what does not fit is refused."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from deepscale import checkpoints
from deepscale.checkpoints import tensor_file
from deepscale.config import Config, ModelConfig, StackSize
from deepscale.data.splits import DatasetInfo
from deepscale.errors import UsageError
from deepscale.export import main as export
from deepscale.models.convnext import ConvNeXt
from deepscale.models.naming import load_plain, plain_shapes, to_plain
from deepscale.models.reference import PlainConvNeXt

BLOCKS = (1, 2, 5, 1)
MODELS: list[dict[str, Any]] = [
    {},
    {"norm": "batchnorm", "layerscale_shape": "channel", "kernel_size": 5},
    {"norm": "none", "layerscale_init": None, "patch_size": 2},
    {"norm": "batchnorm", "norm_scope": "blocks", "skip": "none"},
]
every_model = pytest.mark.parametrize("settings", MODELS, ids=lambda settings: "-".join(map(str, settings.values())) or "published")


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"blocks": BLOCKS, "width": 4, "patch_size": 1, **settings})


def stacked_network(model: ModelConfig, *, stack_size: StackSize = 3, seed: int = 0, **shape: int) -> ConvNeXt:
    """Every value of its state is a different one."""
    network = ConvNeXt(model, stack_size=stack_size, **shape)
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return network.eval()


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], value) for name, value in expected.items())


@every_model
def test_plain_names_are_exactly_the_plain_networks(settings: dict[str, Any]) -> None:
    """Names and shapes of the converted state against PlainConvNeXt's state_dict, whatever the stack size."""
    model = config(**settings)
    expected = {name: value.shape for name, value in PlainConvNeXt(model).state_dict().items()}
    for size in (1, 2, 100):
        network = stacked_network(model, stack_size=size)
        assert {name: value.shape for name, value in to_plain(network).items()} == expected == plain_shapes(network)


def test_each_block_is_found_under_its_own_name() -> None:
    """By hand, for stage 3 in stacks of 2, 1 and 2 blocks as the split makes them."""
    network = stacked_network(config(norm="batchnorm"), stack_size=2)
    plain = to_plain(network)
    assert [(stack.first, stack.blocks) for stack in network.stages[2].stacks] == [(0, 1), (1, 2), (3, 2)]
    for block, (stack, index) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]):
        own, prefix = network.stages[2].stacks[stack], f"stages.2.blocks.{block}"
        assert torch.equal(plain[f"{prefix}.dwconv.weight"], own.dwconv_weight[index])
        assert torch.equal(plain[f"{prefix}.pwconv1.weight"][:, :, 0, 0], own.pwconv1_weight[index])
        assert torch.equal(plain[f"{prefix}.gamma"], own.gamma[index])
        assert torch.equal(plain[f"{prefix}.norm.statistics.running_var"], own.statistics.running_var[index])


@every_model
def test_there_and_back_changes_no_bit(settings: dict[str, Any]) -> None:
    """Stacks of 3, to plain names, into stacks of 2, and to plain names again; BatchNorm's statistics included."""
    model = config(**settings)
    first, second = stacked_network(model, stack_size=3, seed=0), stacked_network(model, stack_size=2, seed=1)
    plain = {name: value.clone() for name, value in to_plain(first).items()}
    assert not same(to_plain(second), plain)
    load_plain(second, plain)
    assert same(to_plain(second), plain)
    if settings.get("norm") == "batchnorm":
        assert any("running_mean" in name for name in plain)


@every_model
def test_the_plain_network_takes_the_state_and_gives_the_same_logits(settings: dict[str, Any]) -> None:
    """load_state_dict(strict), and equal logits in evaluation mode, float64 within 1e-9."""
    model = config(**settings)
    network, plain = stacked_network(model).double(), PlainConvNeXt(model).double().eval()
    plain.load_state_dict(to_plain(network), strict=True)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), plain(images), rtol=1e-9, atol=0)


def test_gradients_come_by_plain_names_too() -> None:
    """Any tensors by the stacked names: those of some parameters give those of their blocks alone."""
    network = stacked_network(config())
    some = {"stem.conv.weight": network.stem.conv.weight, "stages.1.stacks.0.gamma": network.stages[1].stacks[0].gamma}
    assert list(to_plain(network, some)) == ["stem.conv.weight", "stages.1.blocks.0.gamma", "stages.1.blocks.1.gamma"]


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.pop(name) and None


def replaced(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: value})


GAMMA, BEYOND, WEIGHT = "stages.2.blocks.4.gamma", "stages.2.blocks.5.gamma", "stages.3.blocks.0.pwconv1.weight"
MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (without(GAMMA), rf"1 tensors are missing, among them {GAMMA}"),
    "surplus": (replaced(BEYOND, torch.ones(1)), rf"1 tensors are not part of this network, among them {BEYOND}"),
    "too large": (replaced(GAMMA, torch.ones(16)), rf"{GAMMA} has shape \(16,\), this network needs \(1,\)"),
    "transposed": (replaced(WEIGHT, torch.ones(32, 128, 1, 1)), rf"{WEIGHT} has shape \(32, 128, 1, 1\), this network needs \(128, 32, 1, 1\)"),
    "linear": (replaced(WEIGHT, torch.ones(128, 32)), rf"{WEIGHT} has shape \(128, 32\), this network needs \(128, 32, 1, 1\)"),
}


@pytest.mark.parametrize(("change", "sentence"), MISFITS.values(), ids=MISFITS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: Callable[[dict[str, Tensor]], None], sentence: str) -> None:
    network = stacked_network(config(), seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = {name: value.clone() for name, value in to_plain(stacked_network(config(), seed=1)).items()}
    change(state)
    with pytest.raises(UsageError, match=sentence):
        load_plain(network, state)
    assert same(dict(network.state_dict()), before)


def test_another_networks_state_is_refused() -> None:
    """Without norms (weight and bias of stem, 9 blocks, 3 downsamplings, head), without gammas, and a block deeper."""
    network = stacked_network(config())
    with pytest.raises(UsageError, match=r"28 tensors are missing, among them head.norm.bias"):
        load_plain(network, to_plain(stacked_network(config(norm="none"))))
    with pytest.raises(UsageError, match=r"9 tensors are missing, among them stages.0.blocks.0.gamma"):
        load_plain(network, to_plain(stacked_network(config(layerscale_init=None))))
    with pytest.raises(UsageError, match=r"9 tensors are not part of this network, among them stages.2.blocks.5.dwconv.bias"):
        load_plain(network, to_plain(stacked_network(config(blocks=(1, 2, 6, 1)))))


# ---------------------------------------------------------------------------------------------------------------- files


def info(classes: int = 7, channels: int = 1) -> DatasetInfo:
    return DatasetInfo(
        name="synthetic", label="synthetic", classes=classes, class_names=("x",) * classes, channels=channels, image_size=16, train_images=1,
        validation_images=1, test_images=1, mean=(0.0,), std=(1.0,), digest="", location="",
    )  # fmt: skip


def saved(folder: Path, model: ModelConfig, stack_size: StackSize = 3) -> tuple[Path, ConvNeXt]:
    """A weights file as training writes it, and its network."""
    network = stacked_network(model, stack_size=stack_size, classes=7, channels=1)
    settings = Config(model=model).replace(stack_size=stack_size)
    return checkpoints.save(folder, {name: value.detach() for name, value in network.state_dict().items()}, settings, info()), network


@every_model
def test_export_gives_what_the_plain_network_loads(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`deepscale export` of a training's file, read by safetensors alone, into PlainConvNeXt: strict, and equal logits in float64."""
    source, network = saved(tmp_path, config(**settings))
    target = tmp_path / "new" / "plain.safetensors"
    export([str(source), str(target)])
    state = safetensors.torch.load_file(target)
    assert f"{len(state):,} tensors" in capsys.readouterr().out
    plain = PlainConvNeXt(config(**settings), classes=7, channels=1)
    plain.load_state_dict(state, strict=True)
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(plain.double().eval()(images), network.double()(images), rtol=1e-9, atol=0)


@every_model
def test_export_and_back_is_the_file_that_training_wrote(settings: dict[str, Any], tmp_path: Path) -> None:
    """Tensors and metadata, bit for bit."""
    source, _ = saved(tmp_path, config(**settings))
    plain, back = tmp_path / "plain.safetensors", tmp_path / "back.safetensors"
    export([str(source), str(plain)])
    export([str(plain), str(back), "--stacked"])
    (first, described), (last, described_again) = checkpoints.read(source), checkpoints.read(back)
    assert same(last, first)
    assert described_again == described
    assert checkpoints.read(plain)[1]["layout"] == "plain"


@pytest.mark.parametrize("stack_size", [2, (1, 1, 4, 1)])
def test_a_file_remembers_its_network(tmp_path: Path, stack_size: StackSize) -> None:
    """Of a depth without blocks, as the settings may be: the rebuilt network against the saved one, stack by stack."""
    model = ModelConfig(depth=29, width=4, patch_size=2, kernel_size=5, activation="silu", norm="rmsnorm", layerscale_init=None, drop_path=0.1)
    path, network = saved(tmp_path, model, stack_size=stack_size)
    state, metadata = checkpoints.read(path)
    rebuilt = checkpoints.network_of(metadata)
    rebuilt.load_state_dict(state)
    rebuilt.eval()
    assert rebuilt.config.stage_blocks == model.stage_blocks == (1, 1, 6, 1)
    assert [stack.spec for stage in rebuilt.stages for stack in stage.stacks] == [stack.spec for stage in network.stages for stack in stage.stacks]
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(rebuilt(images), network(images))


def test_a_file_may_be_converted_onto_itself(tmp_path: Path) -> None:
    path, network = saved(tmp_path, config())
    assert checkpoints.convert(path, path, stacked=False) == len(to_plain(network))
    assert same(checkpoints.read(path)[0], to_plain(network))
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing temporary is left"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "header cut": lambda data: data[:100],
    "tensors cut": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "text": lambda data: b"no safetensors file at all",
    "header length": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_nothing_is_written(damage: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, config())
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UsageError, match=rf"{path} is no intact safetensors file \(.+\); give one that --checkpoint-dir or deepscale export wrote"):
        checkpoints.convert(path, tmp_path / "target", stacked=False)
    assert not (tmp_path / "target").exists()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match=rf"{path} is no intact safetensors file"):
            checkpoints.read(path)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.ones(3)}, path, metadata)
        with pytest.raises(UsageError, match=rf"{path} was not written by deepscale"):
            checkpoints.read(path)


def described(**changes: Any) -> str:
    """The description of a file's network, with changes."""
    model = {"blocks": BLOCKS, "width": 4, "patch_size": 1}
    return json.dumps({"model": model, "stack_size": 3, "classes": 7, "channels": 1} | changes)


@pytest.mark.parametrize(
    "description",
    ["", "[]", "{}", "null", described(model={"blocks": None}), described(model={"blocks": BLOCKS, "colour": "red"}), described(stack_size="auto")],
)
def test_a_description_that_cannot_be_read_is_refused(description: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"deepscale": description, "layout": "plain"})
    with pytest.raises(UsageError, match="the description of the file's network cannot be read"):
        checkpoints.convert(path, tmp_path / "target", stacked=True)


@pytest.mark.parametrize("layout", ["stacked", "plain"])
def test_tensors_of_another_network_are_refused(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"deepscale": described(), "layout": layout})
    sentence = (
        "does not hold the tensors of the network it describes: .* Missing key"
        if layout == "stacked"
        else "tensors are missing, among them head.linear.bias"
    )
    with pytest.raises(UsageError, match=sentence) as refused:
        checkpoints.convert(path, tmp_path / "target", stacked=True)
    assert len(str(refused.value)) < 600, "not the thousand names of a deep network"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A folder in the file's place, and a file in the folder's place; the file that was there stays."""
    source, _ = saved(tmp_path, config())
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "folder", tmp_path / "file" / "model.safetensors"):
        with pytest.raises(UsageError, match=rf"{target} cannot be written \(.+\); type another path"):
            checkpoints.convert(source, target, stacked=False)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder", source.name]


def test_a_failing_write_is_one_sentence_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of the file: the old one stays, nothing temporary is left."""
    path, _ = saved(tmp_path, config())
    before = path.read_bytes()

    def full(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_file, "write", full)
    with pytest.raises(UsageError, match=rf"{path} cannot be written \(.*No space left on device.*\); type another path"):
        saved(tmp_path, config())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_folder_is_tried_before_training(tmp_path: Path) -> None:
    """It is made, and left empty; a file in its place is refused by name."""
    checkpoints.check_writable(None)
    checkpoints.check_writable(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=rf"the checkpoint folder {tmp_path / 'file'} cannot be written \(.+\); type another --checkpoint-dir"):
        checkpoints.check_writable(str(tmp_path / "file"))
