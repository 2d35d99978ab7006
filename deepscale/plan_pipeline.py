"""A network cut into stages (pipeline.py): where, so that all of them take about as long."""

from deepscale import pipeline
from deepscale.activations import policy_of
from deepscale.config import Config
from deepscale.plan_network import Images, images_of, stages_of


def part_costs(config: Config, images: Images) -> list[int]:
    """FLOPs of a micro batch of every part of the network, in path order: stem, stacks, downsamplings, head (Network.parts)."""
    policy, costs, stages = policy_of(config), list[int](), stages_of(config, images)
    for stage in stages:
        costs.append((3 if costs else 2) * stage.product)  # images need no gradient
        costs += [policy.flops(stage.block, n) for n in stage.stacks]
    return [*costs, 6 * images.micro * stages[-1].channels * images.classes]


def edges_of(config: Config, ranks: int, channels: int, image_size: int, classes: int) -> list[int]:
    """[0, ..., parts]: the first part of each stage of a planned run, and the end."""
    costs = part_costs(config, images_of(config, ranks, channels, image_size, classes))
    return pipeline.cut(costs, config.engine.pipeline_stages)
