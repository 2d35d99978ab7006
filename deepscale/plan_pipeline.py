"""A network cut into pipeline stages (pipeline.py): where, so that all of them take about as long; what each has; how long they wait."""

import dataclasses
import itertools

from deepscale import pipeline
from deepscale.activations import policy_of
from deepscale.config import Config
from deepscale.plan_network import Images, Stage, images_of, stages_of


def part_costs(config: Config, images: Images) -> list[int]:
    """FLOPs of a micro batch of every part of the network, in path order: stem, stacks, downsamplings, head (Network.parts)."""
    policy, costs, stages = policy_of(config), list[int](), stages_of(config, images)
    for stage in stages:
        costs.append((3 if costs else 2) * stage.product)  # images need no gradient
        costs += [policy.flops(stage.block, [n]) for n in stage.stacks]
    return [*costs, 6 * images.micro * stages[-1].channels * images.classes]


def edges_of(config: Config, ranks: int, channels: int, image_size: int, classes: int) -> list[int]:
    """[0, ..., parts]: the first part of each stage of a planned run, and the end."""
    costs = part_costs(config, images_of(config, ranks, channels, image_size, classes))
    return pipeline.cut(costs, config.engine.pipeline_stages)


def own_stages(stages: list[Stage], first: int, end: int) -> list[Stage]:
    """What parts `first` ... `end - 1` are of the network's four stages."""
    found, at = [], 0
    for stage in stages:
        stacks = tuple(n for i, n in enumerate(stage.stacks, at + 1) if first <= i < end)
        outer, blocks = first <= at < end, stage.block.spec.parameters
        parameters = sum(stacks) * blocks + (stage.parameters - sum(stage.stacks) * blocks if outer else 0)
        found.append(dataclasses.replace(stage, stacks=stacks, outer=outer, parameters=parameters))
        at += 1 + len(stage.stacks)
    return found


def sent(stages: list[Stage], edge: int) -> int:
    """Bytes of the stream that a micro batch sends over an edge, forward, and of its gradient backward; none at the network's ends."""
    if edge == 0:
        return 0
    starts = itertools.accumulate((1 + len(stage.stacks) for stage in stages), initial=0)
    return [stage.stream for stage, start in zip(stages, starts, strict=False) if start < edge][-1]


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a step's passes that a stage waits for others, if all take equally long: (P - 1) / (M + P - 1) (GPipe, arXiv:1811.06965)."""
    return (stages - 1) / (micro_batches + stages - 1)


def shares(config: Config, images: Images) -> list[float]:
    """Of a micro batch's FLOPs, those of each stage."""
    costs = part_costs(config, images)
    edges = pipeline.cut(costs, config.engine.pipeline_stages)
    return [sum(costs[first:end]) / sum(costs) for first, end in itertools.pairwise(edges)]


def largest_message(config: Config, images: Images) -> int:
    """Bytes of a micro batch that the stage sends which sends most: the stream to the next one, its gradient to the one before."""
    edges, stages = pipeline.cut(part_costs(config, images), config.engine.pipeline_stages), stages_of(config, images)
    over = [0, *(sent(stages, edge) for edge in edges[1:-1]), 0]
    return max(before + after for before, after in itertools.pairwise(over))
