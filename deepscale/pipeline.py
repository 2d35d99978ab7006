"""Pipeline parallelism by depth: what it is possible with, and where a network is cut.

Each of `--pipeline-stages` holds consecutive parts of the network (stem, stacks of blocks, downsamplings, head), trained by DeepSpeed's
PipelineEngine with one forward and one backward pass in turn (1F1B, PipeDream, arXiv:1806.03377; the step ends when all micro batches are
through, so weights never differ between them, as in GPipe, arXiv:1811.06965). Micro batches are those of --accumulation.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from deepscale.errors import UsageError

if TYPE_CHECKING:
    from deepscale.config import Config

ZERO = (0, 1)  # stages that DeepSpeed's PipelineEngine has


def check(config: "Config") -> None:
    """Raises UsageError for what is not possible with stages."""
    engine, model, recipe = config.engine, config.model, config.recipe
    if engine.pipeline_stages == 1:
        return
    given = f"--pipeline-stages {engine.pipeline_stages}"
    for bad, why in (
        (engine.engine == "torch", "--engine torch has no pipeline: leave it out, which means --engine deepspeed"),
        (
            engine.zero in (2, 3),
            f"DeepSpeed's pipeline has ZeRO stages 0 and 1, since stages 2 and 3 cut up gradients that several micro batches add to; --zero "
            f"{engine.zero} was given: type --zero 1, or leave --pipeline-stages out",
        ),
        (engine.offload in ("cpu", "nvme"), f"--offload {engine.offload} was given, which is not possible with stages: type --offload none"),
        (engine.precision == "fp16", "--precision fp16 scales the loss, which only the last stage knows of: type --precision bf16 or fp32"),
        (model.model != "convnext", f"only --model convnext is cut into stages, and --model {model.model} was given: leave --pipeline-stages out"),
        (
            model.skip == "reversible",
            "--skip reversible needs no memory for depth, and its stream of float64 is not sent between stages: leave one of them out",
        ),
        (
            model.norm == "batchnorm",
            "--norm batchnorm counts running statistics, which are not gathered from stages: type --norm layernorm or rmsnorm",
        ),
        (
            engine.activations == "revolve" or engine.slots not in ("auto", None),
            "--activations revolve has its schedule for all stacks of a width, which stages cut: type --activations recompute, or leave --slots out",
        ),
        (recipe.freeze > 0, f"--freeze {recipe.freeze} may leave a stage without anything to train: leave it out"),
    ):
        if bad:
            raise UsageError(f"{given}: {why}")


def check_ranks(stages: int, ranks: int) -> None:
    """Raises UsageError where the stages do not divide the ranks."""
    if ranks % stages:
        raise UsageError(
            f"--pipeline-stages {stages} needs a multiple of {stages} ranks, and there {'is 1' if ranks == 1 else f'are {ranks}'}; "
            f"type deepspeed --num_gpus {-(-ranks // stages) * stages} deepscale/train.py ..."
        )


def cut(costs: Sequence[float], stages: int) -> list[int]:
    """[0, ..., len(costs)]: the first part of each stage, and the end. Every cut lies where the cost before it is nearest to its share.

    Raises UsageError where there are more stages than parts to put in them.
    """
    if stages > len(costs):
        raise UsageError(
            f"--pipeline-stages {stages} are more than the {len(costs)} parts of the network (stem, stacks of blocks, downsamplings, head); "
            f"type at most --pipeline-stages {len(costs)}, or a smaller --stack-size"
        )
    before = [0.0, *accumulate(costs)]
    edges = [0]
    for stage in range(1, stages):
        share = before[-1] * stage / stages
        possible = range(edges[-1] + 1, len(costs) - stages + stage + 1)
        edges.append(min(possible, key=lambda edge: abs(before[edge] - share)))
    return [*edges, len(costs)]
