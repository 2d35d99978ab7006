"""`deepscale bench activations`: every activation policy on one network, by time, FLOPs, bytes kept, and the values it computes."""

import argparse
import os
from functools import partial

import torch
from torch import Tensor, nn

from deepscale import kernel
from deepscale.activations import Block, KeepAll, OffloadInputs, Policy, Recompute, Revolve, Selective, chains
from deepscale.bench.deep import timed
from deepscale.bench.flops import counted_flops
from deepscale.bench.kept import kept_bytes
from deepscale.bench.networks import Training, build, configuration, random_batch
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Report, Row, ratio
from deepscale.config import Config
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.engine import TorchEngine
from deepscale.models.convnext import cross_entropy
from deepscale.models.stack import BlockStack
from deepscale.plan_choices import FAST_SEGMENT
from deepscale.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def main(arguments: list[str]) -> None:
    """Measures the policies in this process, in turn. Raises UsageError for bad input."""
    options = Options("activations", "Activation policies in float32: time of a step, FLOPs, bytes that the forward pass keeps, loss and gradients.")
    options.depth("depth", 110, "layers")
    options.size("width", 16, "channels of stage 1")
    options.size("batch-size", 64, "images per step")
    options.size("segment", FAST_SEGMENT, "blocks recomputed together")
    options.size("counted-batch-size", 2, "images of the passes whose FLOPs and bytes are counted, and whose gradients are compared")
    options.size("warm-up", 2, "steps of each policy before its clock starts", low=0)
    options.size("rounds", 7, "measured rounds: one step of each policy")
    options.size("threads", len(os.sched_getaffinity(0)), "threads; the default is the cores here")
    options.kernel()
    values, report = options.parse(arguments)
    torch.set_num_threads(values.threads)
    settings = configuration(**settings_of(values, "depth", "width", "batch_size", "threads", "kernel"), engine="torch")
    settings = kernel.choose(settings, ALONE, say, say)
    policies = [KeepAll(), Selective(), Recompute(values.segment), OffloadInputs(values.segment), Revolve(values.segment)]
    _times(values, settings, policies, report)
    _counts(values, settings, policies, report)
    report.notes.append("offload without a GPU copies within one memory: its values and bytes are what counts here, not its time")
    report.notes.append(f"times, bytes and values are those of the {settings.engine.kernel} kernel; FLOPs are counted in torch's operators")
    report.publish(values.json)


def _times(values: argparse.Namespace, settings: Config, policies: list[Policy], report: Report) -> None:
    """Whole training steps of all policies in turn; who begins changes from round to round."""
    batch = random_batch(values.batch_size)
    trainings = {policy: Training(TorchEngine(policy.apply(build(settings)), settings, ALONE), ALONE, batch) for policy in policies}
    seconds: dict[Policy, list[float]] = {policy: [] for policy in policies}
    for number in range(-values.warm_up, values.rounds):
        say(f"{values.depth:,} layers: " + (f"round {number + 1} of {values.rounds}" if number >= 0 else "warm-up"))
        for policy in policies[number % len(policies) :] + policies[: number % len(policies)]:
            _, wall = timed(trainings[policy].step)
            if number >= 0:
                seconds[policy].append(wall)
    keep, *others = policies
    shape = f"{depth_of_blocks(blocks_for_depth(values.depth)):,} layers, width {values.width}, batch {values.batch_size}"
    report.rows.append(Row(f"step, keep: {shape}", "ms", tuple(1e3 * value for value in seconds[keep])))
    report.rows += [ratio(f"step, {policy.name} / keep", seconds[policy], seconds[keep]) for policy in others]
    losses = ", ".join(f"{policy.name} {training.losses[-1]!r}" for policy, training in trainings.items())
    report.notes.append(f"loss after {values.warm_up + values.rounds} steps: {losses}")


def _counts(values: argparse.Namespace, settings: Config, policies: list[Policy], report: Report) -> None:
    """FLOPs and bytes of one pass of each policy beside its formula, and loss and gradients beside those of keeping all."""
    images, labels = random_batch(values.counted_batch_size)
    stages = stages_of(build(settings), images)
    keep = policies[0]
    flops, kept, found = {}, {}, {}
    for policy in policies:
        say(f"{values.depth:,} layers: counting {policy.name}")
        kept[policy] = kept_bytes(policy.apply(build(settings)), images)
        counted = policy.apply(build(settings.replace(kernel="torch")))  # whose products are seen
        flops[policy] = counted_flops(partial(loss_and_gradients, counted, images, labels))
        found[policy] = loss_and_gradients(policy.apply(build(settings)), images, labels)
    # What is outside the stacks is the same under all policies.
    outside_flops = flops[keep] - sum(keep.flops(*stage) for stage in stages)
    outside_kept = kept[keep] - sum(keep.kept(*stage) for stage in stages)
    shape = f"{depth_of_blocks(blocks_for_depth(values.depth)):,} layers, width {values.width}, batch {values.counted_batch_size}"
    report.rows.append(Row(f"FLOPs, keep: {shape}", "GFLOP", (flops[keep] / 1e9,)))
    for policy in policies[1:]:
        formula = outside_flops + sum(policy.at(s).flops(*stage) for s, stage in enumerate(stages))
        report.rows.append(ratio(f"FLOPs, {policy.name} / keep", [flops[policy]], [flops[keep]]))
        report.rows.append(ratio(f"FLOPs, {policy.name} / formula", [flops[policy]], [formula]))
    report.rows.append(Row(f"kept by the forward pass, keep: {shape}", "MB", (kept[keep] / 1e6,)))
    for policy in policies[1:]:
        host = sum(policy.at(s).host(*stage) for s, stage in enumerate(stages))
        formula = outside_kept + host + sum(policy.at(s).kept(*stage) for s, stage in enumerate(stages))
        report.rows.append(ratio(f"kept, {policy.name} / keep", [kept[policy]], [kept[keep]]))
        report.rows.append(ratio(f"kept, {policy.name} / formula", [kept[policy]], [formula]))
        if host:
            report.rows.append(ratio(f"kept on the host by {policy.name}'s formula / keep", [host], [kept[keep]]))
    for policy in policies[1:]:
        apart = [float((a - b).abs().max()) for a, b in zip(found[policy], found[keep], strict=True)]
        report.rows.append(Row(f"loss, {policy.name}: difference to keep", "abs", (apart[0],)))
        report.rows.append(Row(f"gradients, {policy.name}: largest difference to keep", "abs", (max(apart[1:]),)))


def stages_of(model: nn.Module, images: Tensor) -> list[tuple[Block, tuple[int, ...]]]:
    """(block, how many in each stack) of every stage of a float32 network, with the rows that these images make, by a pass without gradients."""
    found: dict[nn.Module, Block] = {}

    def note(stack: BlockStack, inputs: tuple[Tensor], output: Tensor) -> None:
        found[stack] = Block(stack.spec, output.numel() // output.shape[1], drop_path=stack.drop_rates is not None)

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, BlockStack)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return [(found[stacks[0]], tuple(stack.blocks for stack in stacks)) for stacks in chains(model)]


def loss_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss of one pass, and the gradients of all parameters."""
    loss = cross_entropy(model(images), labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
