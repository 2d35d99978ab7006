"""`deepscale bench activations`: every activation policy on one network, by time, FLOPs, bytes kept, and the values it computes."""

import argparse
import os

import torch
from torch import Tensor

from deepscale.activations import POLICIES, Policy, Recompute, policy_of
from deepscale.bench.deep import timed
from deepscale.bench.flops import counted_flops
from deepscale.bench.kept import kept_bytes
from deepscale.bench.networks import IMAGE_SIZE, Training, build, configuration, random_batch
from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import GB, Goal, Report, Row, ratio
from deepscale.config import Config
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.engine import TorchEngine
from deepscale.models.convnext import ConvNeXt, cross_entropy
from deepscale.plan import FAST_SEGMENT
from deepscale.world import World

GOAL_EQUAL = Goal(0.0)
GOAL_EXACT = Goal(1.0)
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def main(arguments: list[str]) -> None:
    """Measures the policies in this process, in turn."""
    options = Options("activations", "Activation policies: time of a step, FLOPs, bytes kept by the forward pass, loss and gradients, in float32.")
    options.depth("depth", 110, "layers")
    options.size("width", 16, "channels of stage 1")
    options.size("batch-size", 64, "images per step")
    options.size("segment", FAST_SEGMENT, "blocks recomputed together")
    options.size("counted-batch-size", 2, "images of the passes whose bytes and FLOPs are counted; both grow with them")
    options.size("warm-up", 2, "steps of each policy before its clock starts", low=0)
    options.size("rounds", 7, "measured rounds: one step of each policy")
    options.size("threads", len(os.sched_getaffinity(0)), "threads; the default is the cores here")
    values, report = options.parse(arguments)
    torch.set_num_threads(values.threads)
    _times(values, report)
    _counts(values, report)
    report.publish(values.json)
