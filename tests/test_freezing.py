"""--freeze and --init-from: what is frozen stays bit for bit under every engine; what is loaded is the other run's, and the rest is said."""

import json
import re
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks
from torch import Tensor

from deepscale import checkpoints
from deepscale.cli import main
from deepscale.config import parse
from deepscale.errors import UsageError
from deepscale.models import registry
from deepscale.models.freezing import freeze, numbered
from deepscale.models.registry import Images
from deepscale.train import main as train

ENGINES: dict[str, dict[str, Any]] = {"torch": {"engine": "torch"}, **{f"z{stage}": {"zero": stage} for stage in (0, 2, 3)}}
MLP = {"model": "mlp", "depth": 4, "width": 8, "norm": "batchnorm", "freeze": 2}
# Stem, three blocks of the first stage (of a stack each), and the depthwise convolution of the fourth.
CONVNEXT = {
    "model": "convnext", "blocks": (3, 1, 1, 1), "width": 4, "patch_size": 4, "stack_size": 1, "norm": "batchnorm", "layerscale_init": 1.0,
    "freeze": 8,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {"mlp": MLP, "convnext": CONVNEXT}
CASES = [("torch", "mlp"), ("z0", "mlp"), ("z2", "mlp"), ("z3", "mlp"), ("torch", "convnext"), ("z3", "convnext")]
FROZEN = {"mlp": r"hidden\.[01]\.", "convnext": r"stem\.|stages\.0\.stacks\.[01]\.|stages\.0\.stacks\.2\.dwconv"}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("frozen")
    cases = [
        {"name": f"{engine} {kind}", "settings": {**NETWORKS[kind], **ENGINES[engine]}, "folder": str(folder / f"{engine}-{kind}")}
        for engine, kind in CASES
    ]
    (results,), (output,) = run_ranks("freezing_worker.py", cases, folder, 1, timeout_s=200)
    assert not output
    found: dict[str, list[dict[str, Tensor]]] = results
    return found


@pytest.mark.parametrize(("engine", "network"), CASES)
def test_frozen_layers_stay_bit_for_bit_and_all_others_move(states: dict[str, list[dict[str, Tensor]]], engine: str, network: str) -> None:
    """AdamW with a weight decay of a half: weights, biases, norms and BatchNorm's running statistics."""
    before, _, after, _ = states[f"{engine} {network}"]
    frozen = {name for name in before if re.match(FROZEN[network], name)}
    same = {name for name in before if torch.equal(before[name], after[name])}
    norms_of_a_partly_frozen_stack = {name for name in frozen ^ same if name.startswith("stages.0.stacks.2.norm")}
    assert frozen ^ same <= norms_of_a_partly_frozen_stack
    assert len(frozen) > 8 and any("running_mean" in name for name in frozen) and any("running_mean" in name for name in before.keys() - same)


@pytest.mark.parametrize(("engine", "network"), CASES)
def test_a_resumed_run_with_frozen_layers_is_the_uninterrupted_one(states: dict[str, list[dict[str, Tensor]]], engine: str, network: str) -> None:
    _, second, third, resumed = states[f"{engine} {network}"]
    assert [name for name in third if not torch.equal(third[name], resumed[name])] == []
    assert [name for name in third if not torch.equal(third[name], second[name])] != []


def test_deepspeed_trains_what_torch_trains(states: dict[str, list[dict[str, Tensor]]]) -> None:
    for engine, network in CASES:
        expected, found = states[f"torch {network}"][2], states[f"{engine} {network}"][2]
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


GREY = Images(1, 28, 10)


def network(arguments: str, images: Images = Images()) -> Any:  # noqa: B008 - it is frozen
    settings = parse(arguments.split())
    return registry.build(settings.model, images, settings.engine.stack_size).initialise(7)


def test_layers_are_counted_as_depth_counts_them() -> None:
    for arguments in ("--model mlp --depth 5", "--depth 26 --width 4 --patch-size 4", "--model vgg --depth 14"):
        model = network(arguments)
        assert [layer for _, _, layer in numbered(model)][-1] == model.config.built_depth


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(UsageError, match="--freeze 5 leaves nothing to train: the network has 5 layers; type --freeze 4 or less"):
        freeze(network("--model mlp --depth 5"), 5)
    with pytest.raises(
        UsageError, match="--freeze 4 ends within the stack of layers 2 to 8, which share their parameter tensors; type --stack-size 1"
    ):
        freeze(network("--blocks 3,1,1,1 --width 4 --patch-size 4 --stack-size 3"), 4)
    with pytest.raises(UsageError, match="--init-layers 2 is for --init-from, which was not given"):
        parse(["--init-layers", "2"])


RUN = [
    "--model", "mlp", "--width", "12", "--dataset", "synthetic", "--grey", "--image-size", "28", "--no-augment", "--feed", "tensors",
    "--batch-size", "64", "--max-steps", "2", "--eval-images", "20", "--engine", "torch", "--threads", "1", "--device", "cpu",
    "--no-tracking", "--record-every", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hidden layers and a head, trained."""
    folder = tmp_path_factory.mktemp("groups")
    with chdir(folder):
        train([*RUN, "--depth", "3", "--checkpoint-dir", "first"])
    return folder


@pytest.mark.usefixtures("signals_as_before")
def test_a_group_is_added_with_a_new_head_on_frozen_layers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layer-wise training's second phase, as one types it: the first group is the first phase's in every bit, the rest is not."""
    with chdir(folder):
        train([*RUN, "--depth", "5", "--init-from", "first", "--init-layers", "2", "--freeze", "2", "--checkpoint-dir", "second"])
    said = capsys.readouterr()
    assert "4 of the network's 10 tensors start from first/model.safetensors; with initial values as --init says: " in said.out + said.err
    first, second = (checkpoints.read(folder / name / "model.safetensors")[0] for name in ("first", "second"))
    loaded = {name for name in second if name in first and torch.equal(first[name], second[name])}
    assert loaded == {f"hidden.{i}.linear.{kind}" for i in range(2) for kind in ("weight", "bias")}
    initial = registry.build(parse([*RUN, "--depth", "5"]).model, GREY).initialise(0).state_dict()
    assert [name for name in second if torch.equal(second[name], initial[name])] == []


def test_evaluation_reads_the_images_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In grey and at 28 pixels: other images would be refused by their digest."""
    with chdir(folder):
        main(["evaluate", "first", "--eval-images", "50", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["data"], found["images"]) == ("synthetic, in grey (ITU-R 601), resampled to 28x28 (bilinear)", 50)


def test_all_that_fits_is_loaded_where_no_number_of_layers_is_given(folder: Path) -> None:
    """The head of the same shape, too; of another width nothing but the head's bias fits."""
    said: list[str] = []
    state, _ = checkpoints.read(folder / "first" / "model.safetensors")
    checkpoints.start_from(folder / "first", network("--model mlp --depth 5 --width 12", GREY), None, said.append)
    model = network("--model mlp --depth 3 --width 12", GREY)
    checkpoints.start_from(folder / "first" / "model.safetensors", model, None, said.append)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert said[0].startswith("6 of the network's 10 tensors") and said[1].endswith("first/model.safetensors")
    checkpoints.start_from(folder / "first", network("--model mlp --depth 3 --width 6", GREY), None, said.append)
    assert said[2].startswith("1 of the network's 6 tensors") and "hidden.0.linear.weight" in said[2]
    with pytest.raises(UsageError, match=r"no tensor in .* has the name and shape of one of this network"):
        checkpoints.start_from(folder / "first", network("--depth 14 --width 4 --patch-size 4"), None, said.append)


def test_stacked_and_plain_files_start_the_same_network(tmp_path: Path) -> None:
    """ConvNeXt by plain names: a stack size and a depth other than the file's; blocks that the file does not have stay."""
    deep = network("--blocks 3,1,1,1 --width 4 --patch-size 4 --norm batchnorm --layerscale-init 1")
    model = json.loads(json.dumps(vars(deep.config)))
    described = {"data": {}, "model": model, "stack_size": [1, 1, 1, 1], "classes": 10, "channels": 3, "side": 32}
    source = network("--blocks 3,1,1,1 --width 4 --patch-size 4 --norm batchnorm --layerscale-init 1 --stack-size 1").initialise(5)
    checkpoints.write(tmp_path / "stacked.safetensors", source.state_dict(), {"deepscale": json.dumps(described), "layout": "stacked"})
    checkpoints.convert(tmp_path / "stacked.safetensors", tmp_path / "plain.safetensors", stacked=False)
    for name in ("stacked", "plain"):
        model = network("--blocks 4,1,1,1 --width 4 --patch-size 4 --norm batchnorm --layerscale-init 1 --stack-size 2")
        untouched = model.get_submodule("stages.0.stacks.1").dwconv_weight[1].clone()
        checkpoints.start_from(tmp_path / f"{name}.safetensors", model, None, lambda line: None)
        ours = model.get_submodule("stages.0.stacks.1")
        assert torch.equal(ours.dwconv_weight[0], source.get_submodule("stages.0.stacks.2").dwconv_weight[0])
        assert torch.equal(ours.dwconv_weight[1], untouched)
        assert torch.equal(model.head.linear.weight, source.head.linear.weight)


def test_a_file_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--init-from nowhere: there is no such file or folder"), chdir(tmp_path):
        checkpoints.check_there("nowhere")
