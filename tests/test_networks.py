"""Any network of the registry through the whole command: trained, resumed, evaluated, exported; with an optimiser and a schedule that are not the
default's. Plain torch in this process; the engines are in test_engine.py.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from deepscale import checkpoints, evaluate, export, plan_command, train
from deepscale.checkpoints import stored
from deepscale.config import RecipeConfig, parse
from deepscale.engine_config import stage_and_offload
from deepscale.errors import UsageError
from deepscale.gradflow.flow import load
from deepscale.models.registry import Images
from deepscale.optim import build_optimizer, build_schedule
from deepscale.plan_counted import counted, counted_flops

pytestmark = [pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"), pytest.mark.usefixtures("signals_as_before")]
VGG = ["--model", "vgg", "--depth", "14", "--width", "4", "--norm", "batchnorm", "--skip", "identity"]
RUN = [
    *("--dataset", "synthetic", "--feed", "tensors", "--batch-size", "16", "--eval-images", "40", "--threads", "1", "--no-tracking"),
    *("--engine", "torch", "--device", "cpu", "--max-steps", "6", "--optimizer", "sgd", "--momentum", "0.9", "--schedule", "cosine"),
    *("--min-lr", "1e-4", "--lr", "0.02", "--record-every", "1"),
]


def trained(folder: str, *more: str) -> dict[str, Any]:
    train.main([*VGG, *RUN, "--checkpoint-dir", folder, *more])
    return checkpoints.read(Path(folder) / "model.safetensors")[0]


def test_a_network_is_trained_resumed_evaluated_and_exported(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six steps of VGG14 under SGD with momentum: at once, and from the checkpoint of step 3 on, whose momentum is a part of it."""
    whole = trained("whole", "--checkpoint-every", "3steps", "--keep", "9")
    summary = capsys.readouterr().out
    assert "depth        14 layers (1 processing and a reduction block in each of 3 stages)" in summary
    flow = load(next(Path("runs").glob("vgg-14*")) / "gradflow.npz")
    assert flow.depth == 14 and list(flow.steps) == list(range(1, 7)) and len(flow.block_names) == 6
    first = Path("whole") / stored.step_name(3)
    assert stored.read_manifest(first)["kinds"] == ["weight", "momentum_buffer"]
    (Path("again")).mkdir()
    first.rename(Path("again") / first.name)
    train.main(["--resume", "again", "--no-tracking"])
    again = checkpoints.read(Path("again") / "model.safetensors")[0]
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(SystemExit):
        train.main(["--resume", "again", "--optimizer", "adam", "--no-tracking"])
    assert "is of a run with --optimizer sgd, and --optimizer adam was given" in capsys.readouterr().err
    evaluate.main(["whole", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 40 and f"{found['accuracy']:.2%} of 40 images, loss {found['loss']:.4f}" in summary
    export.main(["whole/model.safetensors", "plain.safetensors"])
    state, metadata = checkpoints.read(Path("plain.safetensors"))
    assert metadata["layout"] == "plain" and all(torch.equal(state[name], whole[name]) for name in whole)
    capsys.readouterr()
    evaluate.main(["plain.safetensors", "--device", "cpu", "--json"])
    assert json.loads(capsys.readouterr().out)["loss"] == found["loss"]


def test_a_loss_that_is_not_finite_names_the_layer(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main([*VGG, *RUN, "--lr", "1e30", "--clip", "0"])
    assert ended.value.code == 3
    assert "at step 2" in (text := capsys.readouterr().err) and any(f" is {layer}" in text for layer in ("entry.", "blocks.", "head"))


def test_the_plan_counts_what_has_no_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    """What autograd keeps of two linear layers and their products, by hand; and the planner's page of VGG."""
    asked = parse(["--model", "vgg", "--depth", "38"]).model
    one, two = (counted(asked, Images(3, 32, 100), micro) for micro in (1, 2))
    assert one.parameters == 336_196 and two.kept - one.kept > 0.9 * one.kept
    # Of its convolutions at full resolution, with 32 filters, each has 2 * 9 * 32 * 32 * 1024 FLOPs an image.
    forward, backward = counted_flops(asked, Images(3, 32, 100), 2)
    pixels = {32: 1 + 2 * 5 + 1, 16: 1 + 2 * 5 + 1, 8: 1 + 2 * 5 + 1, 4: 1}
    by_hand = 2 * 9 * 32 * 32 * sum(side**2 * n for side, n in pixels.items()) - 2 * 9 * 32 * (32 - 3) * 1024 + 2 * 3200
    assert forward == 2 * by_hand and 1.9 * forward < backward <= 2 * forward
    plan_command.main(["--model", "vgg", "--depth", "38", "--json", "--ranks", "2", "--threads", "1", "--device", "cpu", "--classes", "100"])
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == 336_196 and {row["activations"] for row in record["choices"]} == {"keep"}
    assert "--model vgg" in record["command"] and "patch-size" not in record["command"] and "stack-size" not in record["command"]
    for arguments, words in (
        (["--recompute"], "--activations recompute is for the stacks of --model convnext"),
        (["--segment", "4"], "--segment 4 is for the stacks"),
        (["--kernel", "native"], "it computes ConvNeXt's blocks"),
        (["--max-depth"], "--max-depth is for --model convnext"),
        (["--optimizer", "sgd", "--offload", "cpu", "--zero", "2"], "--offload cpu is for --optimizer adamw or adam"),
    ):
        with pytest.raises(UsageError, match=words):
            plan_command.main(["--model", "vgg", "--device", "cpu", *arguments])


# -------------------------------------------------------------------------------------------------------- optimisers, schedules


def steps_of(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 3) -> list[torch.Tensor]:
    for step in range(steps):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize(("name", "momentum"), [("adam", 0.0), ("sgd", 0.0), ("sgd", 0.9)])
def test_adam_and_sgd_are_torchs(name: str, momentum: float) -> None:
    """Three steps with decay added to the gradients of weights alone, in every bit."""
    recipe = RecipeConfig(optimizer=name, lr=0.1, weight_decay=0.3, momentum=momentum)
    ours, other = (nn.Linear(300, 300) for _ in range(2))
    other.load_state_dict(ours.state_dict())
    groups = [{"params": [other.weight], "weight_decay": 0.3}, {"params": [other.bias], "weight_decay": 0.0}]
    reference = Adam(groups, lr=0.1, foreach=False) if name == "adam" else SGD(groups, lr=0.1, momentum=momentum, foreach=False)
    found = steps_of(build_optimizer(ours, recipe), [ours.weight, ours.bias])
    assert all(torch.equal(own, theirs) for own, theirs in zip(found, steps_of(reference, [other.weight, other.bias]), strict=True))


def rates(recipe: RecipeConfig, steps: int, epoch_steps: int) -> list[float]:
    optimizer = build_optimizer(nn.Linear(1, 1), recipe)
    schedule = build_schedule(optimizer, recipe, steps, epoch_steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_per_epoch_is_the_courseworks() -> None:
    """100 epochs of 4 steps from 1e-3 to 2e-5 against torch's scheduler called after each epoch, and half a cosine written out."""
    found = rates(RecipeConfig(schedule="cosine", schedule_every="epoch", min_lr=2e-5), 400, 4)
    optimizer = Adam([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = CosineAnnealingLR(optimizer, T_max=100, eta_min=2e-5)
    for epoch in range(100):
        assert set(found[4 * epoch : 4 * epoch + 4]) == {optimizer.param_groups[0]["lr"]}
        assert found[4 * epoch] == pytest.approx(2e-5 + 9.8e-4 * (1 + math.cos(math.pi * epoch / 100)) / 2)
        optimizer.step()
        schedule.step()
    assert len(set(rates(RecipeConfig(schedule="cosine", schedule_every="epoch"), 10, 4))) == 3, "the last epoch is not whole"


def test_onecycle_cycles_momentum_only_where_there_is_one() -> None:
    for momentum, cycled in ((0.0, False), (0.9, True)):
        optimizer = build_optimizer(nn.Linear(1, 1), recipe := RecipeConfig(optimizer="sgd", momentum=momentum))
        schedule = build_schedule(optimizer, recipe, 10)
        assert isinstance(schedule.inner, OneCycleLR)
        seen = set()
        for _ in range(9):
            seen.add(round(optimizer.param_groups[0]["momentum"], 6))
            optimizer.step()
            schedule.step()
        assert (len(seen) > 1 and min(seen) == 0.85) if cycled else seen == {0.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--momentum", "0.9"], "--momentum 0.9 is for --optimizer sgd, and --optimizer adamw was given"),
        (["--min-lr", "1e-5"], "--min-lr 1e-05 is for --schedule cosine, and --schedule onecycle was given"),
        (["--schedule", "cosine", "--min-lr", "1"], "--min-lr 1 is above --lr 0.001"),
        (["--init", "kaiming", "--init-std", "1"], "--init-std 1 is for --init normal, and --init kaiming was given"),
    ],
)
def test_settings_without_an_effect_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(arguments)


def test_offloaded_sgd_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="which DeepSpeed steps on the CPU, and sgd was given; type --offload none"):
        stage_and_offload(parse(["--optimizer", "sgd", "--offload", "cpu", "--zero", "2"]))
