"""What the planner knows of pipeline stages, against the network that is really cut, and the pages and commands made of it."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepscale import plan_command
from deepscale.bench import main, scaling, scaling_pipeline
from deepscale.bench.scaling_page import page
from deepscale.bench.scaling_study import Study
from deepscale.config import Config
from deepscale.errors import UsageError
from deepscale.models.convnext import ConvNeXt, count_parameters
from deepscale.plan_communication import communication_of
from deepscale.plan_memory import memories_of, memory_of
from deepscale.plan_network import flops_of, images_of, stages_of
from deepscale.plan_pipeline import bubble, edges_of, own_stages, part_costs, sent, shares

SHAPE = {"channels": 3, "image_size": 32, "classes": 10}


def planned(**settings: Any) -> Config:
    """A network of 110 layers in stacks of 3, nothing left open."""
    own: dict[str, Any] = {
        "depth": 110, "width": 8, "patch_size": 2, "batch_size": 16, "accumulation": 4, "stack_size": 3, "zero": 0, "offload": "none",
        "precision": "fp32", "activations": "keep", "segment": None, "device": "cpu", "kernel": "torch",
    }  # fmt: skip
    return Config().replace(**own | settings)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_stages_have_what_the_network_is_cut_into(stages: int) -> None:
    """Parameters, and what each part gives to the next, counted in the network itself."""
    settings = planned(pipeline_stages=stages)
    model, images = ConvNeXt(settings.model, stack_size=3).initialise(0), images_of(settings, stages, **SHAPE)
    parts, edges = model.parts(), edges_of(settings, stages, **SHAPE)
    assert edges[0] == 0 and edges[-1] == len(parts) == len(part_costs(settings, images))
    counted = [sum(p.numel() for part in parts[a:b] for p in part.parameters()) for a, b in itertools.pairwise(edges)]
    assert [memory.parameters for memory in memories_of(settings, stages, **SHAPE)] == counted
    assert memory_of(settings, stages, **SHAPE).parameters == sum(counted) == count_parameters(settings.model)
    x, whole = torch.zeros(images.micro, 3, 32, 32), stages_of(settings, images)
    for edge, part in enumerate(parts[:-1], 1):
        x = part(x)
        assert sent(whole, edge) == x.numel() * x.element_size()
    assert sent(whole, 0) == 0
    own = [own_stages(whole, a, b) for a, b in itertools.pairwise(edges)]
    for i, stage in enumerate(whole):
        assert tuple(n for found in own for n in found[i].stacks) == stage.stacks and [found[i].outer for found in own].count(True) == 1


def test_the_parts_work_is_all_work_and_shared_out_evenly() -> None:
    settings = planned(pipeline_stages=4)
    assert sum(part_costs(settings, images_of(settings, 4, **SHAPE))) == flops_of(settings, 4, **SHAPE).total
    assert sum(shares(settings, images_of(settings, 4, **SHAPE))) == pytest.approx(1.0)
    assert max(shares(settings, images_of(settings, 4, **SHAPE))) < 0.3


def test_bubbles() -> None:
    """GPipe's formula: half of the time with two stages and one micro batch, 3 of 11 turns with four stages and eight."""
    assert (bubble(1, 1), bubble(2, 1), bubble(4, 8), bubble(2, 1000)) == (0.0, 0.5, 3 / 11, 1 / 1001)


def test_a_stage_keeps_the_micro_batches_that_are_open() -> None:
    """As many as DeepSpeed's own schedule has open at once: the stages from here on, and no more than there are."""
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

    for micro_batches in (1, 2, 8):
        settings = planned(pipeline_stages=4, accumulation=micro_batches, batch_size=2 * micro_batches)
        once = memories_of(planned(pipeline_stages=4, accumulation=1, batch_size=2), 4, **SHAPE)
        for i, memory in enumerate(memories_of(settings, 4, **SHAPE)):
            opened, most = 0, 0
            for command in (command for tick in TrainSchedule(micro_batches, 4, i).steps() for command in tick):
                opened += isinstance(command, ForwardPass) - isinstance(command, BackwardPass)
                most = max(most, opened)
            assert memory.kept == most * once[i].kept


def test_recomputed_activations_and_fewer_parameters_take_less() -> None:
    keep, again = (memories_of(planned(pipeline_stages=2, **own), 2, **SHAPE) for own in ({}, {"activations": "recompute", "segment": 3}))
    whole = memory_of(planned(), 1, **SHAPE)
    assert all(0 < b.kept < a.kept / 3 for a, b in zip(keep, again, strict=True))
    assert sum(memory.states.weights for memory in keep) == whole.states.weights


def test_stages_send_the_stream_and_its_gradient() -> None:
    """Two stages of one rank each: over the one edge, for each of 4 micro batches; no gradients are averaged."""
    settings = planned(pipeline_stages=2)
    stages, edges = stages_of(settings, images_of(settings, 2, **SHAPE)), edges_of(settings, 2, **SHAPE)
    assert communication_of(settings, 2, 3, 10).sent == 4 * sent(stages, edges[1]) > 0
    middle = communication_of(planned(pipeline_stages=3), 3, 3, 10)
    assert middle.sent > communication_of(settings, 2, 3, 10).sent
    both = communication_of(planned(pipeline_stages=2), 4, 3, 10)
    assert both.all_reduced == 4 * count_parameters(settings.model) // 2 and both.ranks == 2


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    sizes = ["--depth", "110", "--width", "8", "--patch-size", "2", "--batch-size", "16", "--activations", "keep", "--kernel", "torch"]
    plan_command.main([*sizes, "--device-memory", "8GiB", "--host-memory", "16GiB", *arguments])
    return capsys.readouterr().out


def test_the_plan_shows_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """On as many ranks as there are stages, unless more are given."""
    text = plan(capsys, "--pipeline-stages", "2", "--accumulation", "4")
    assert "Pipeline, 4 micro batches a step (--accumulation): a stage waits 20% of the passes' time." in text
    assert "2 pipeline stages, 4 micro batches a step: each waits for others 20% of the time\n" in text
    assert "deepspeed --num_gpus 2 deepscale/train.py" in text and "--pipeline-stages 2" in text
    assert "with --accumulation 8 they would wait 11%" in plan(capsys, "--pipeline-stages", "2")
    found = json.loads(plan(capsys, "--pipeline-stages", "2", "--ranks", "4", "--accumulation", "4", "--json"))
    assert [stage["open"] for stage in found["pipeline"]["stages"]] == [2, 1]
    assert sum(stage["parameters"] for stage in found["pipeline"]["stages"]) == found["parameters"]
    assert {row["zero"] for row in found["choices"]} == {0, 1} == {row["zero"] for row in found["communication"]}
    assert json.loads(plan(capsys, "--json"))["pipeline"] is None
    with pytest.raises(UsageError, match="--pipeline-stages 2 needs a multiple of 2 ranks, and there are 3"):
        plan(capsys, "--pipeline-stages", "2", "--ranks", "3")
    with pytest.raises(UsageError, match=r"--pipeline-stages 40 are more than the \d+ parts of the network"):
        plan(capsys, "--pipeline-stages", "40", "--batch-size", "40")


def test_a_stage_on_the_meta_device_gets_memory_for_its_own_parts() -> None:
    from deepscale.engine_pipeline import StageParts, materialise, own_parts

    settings = planned(pipeline_stages=2)
    with torch.device("meta"):
        model = ConvNeXt(settings.model, stack_size=3)
    first, end = edges_of(settings, 2, **SHAPE)[1:]
    materialise(model, first, end, torch.device("cpu"))
    model.initialise(0)
    whole = dict(ConvNeXt(settings.model, stack_size=3).initialise(0).named_parameters())
    own = {name: parameter for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert own and all(torch.equal(parameter, whole[name]) for name, parameter in own.items())
    assert own_parts(model) == model.parts()[first:end]
    stage = StageParts([nn.Identity()], first=False, last=False)
    rows = torch.randn(2, 5, 6, 3)
    assert torch.equal(stage(rows), rows) and stage(rows).is_contiguous()


def made_up(stages: int, micro_batches: int) -> dict[str, Any]:
    """A launch: a step of 1 s, of which a stage's passes take 0.8 s and it is busy as long as the formula lets it."""
    busy = 0.8 * (1 - pipeline_waiting(stages, micro_batches))
    one = {"step_s": [9.0, 1.0, 1.0], "passes_s": 0.8, "busy_s": busy, "base_bytes": 10**9, "planned_bytes": 10**8, "losses": [2.0, 1.0]}
    one |= {"planned_share": 1 / stages, "parameters": 1000 // stages}
    return {"stages": [one | {"cores": [i % 2], "peak_bytes": 10**9 + 10**8 * (i + 1)} for i in range(stages)]}


def pipeline_waiting(stages: int, micro_batches: int) -> float:
    return (stages - 1) / (micro_batches + stages - 1)


def test_the_bench_s_rows_and_page() -> None:
    records = [scaling_pipeline.record_of(m, 16, made_up(p, m)) for p in (1, 2, 4) for m in (2, 8)]
    rows = {(row["stages"], row["micro_batches"]): row for row in scaling_pipeline.rows(records)}
    assert rows[2, 8]["waiting"] == pytest.approx(1 / 9) == pytest.approx(rows[2, 8]["bubble"])
    assert rows[4, 2]["peak_bytes"] == [1e8, 2e8, 3e8, 4e8] and rows[4, 2]["oversubscribed"] and not rows[2, 2]["oversubscribed"]
    assert rows[2, 2]["speedup"] == 1.0 and rows[2, 2]["images_per_s"] == 16.0
    sizes = {"depth": 302, "width": 16, "batch_size": 16, "steps": 5, "warm_up": 3, "threads": 1, "kernel": "auto"}
    measured = [
        {"command": "deepscale bench scaling --stages 1,2", "hardware": {"CPU": "a", "cores": 2, "memory": "b", "GPU": "none"}, "versions": {}}
    ]
    text = page(Study(sizes, {}, records), measured, None)
    assert "## Pipeline: the depth cut into stages" in text and "n = 1 launches" in text
    assert any(line.startswith("| 4 (!)") and "60%" in line for line in text.splitlines())


def test_the_bench_measures_stages_in_place_of_ranks(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch after launch, a process for each stage; a file of it is merged with others."""
    asked = list[tuple[str, int, int]]()

    def run(program: str, options: Mapping[str, Any], *, ranks: int, threads: int, limit_s: float) -> dict[str, Any]:
        asked.append((program, ranks, options["micro_batches"]))
        return made_up(ranks, options["micro_batches"])

    monkeypatch.setattr(scaling, "run_ranks", run)
    bench = ["scaling", "--no-tracking", "--batch-size", "8"]
    main([*bench, "--stages", "1,2", "--micro-batches", "2,4", "--json", "stages.json", "--page", "page.md"])
    assert asked == [("deepscale.bench.staged", stages, count) for stages in (1, 2) for count in (2, 4)]
    main([*bench, "--merge", "stages.json", "stages.json", "--json", "both.json", "--page", "both.md"])
    assert len(json.loads(Path("both.json").read_text())["pipelines"]) == 8 and len(asked) == 4
    assert "n = 1 launches" in Path("page.md").read_text() and "n = 2 launches" in Path("both.md").read_text()
    with pytest.raises(UsageError, match="--batch-size 8 does not divide over 3 micro batches"):
        main([*bench, "--stages", "2", "--micro-batches", "3"])
