"""Gradient flow: what the gradient of every layer is, at any depth, over a run.

    from deepscale import gradflow

    flow = gradflow.load("runs/depth-1004")     # or a run's name or id in MLflow
    flow.mean_abs[0], flow.layer_depths         # mean |g| of every layer at the first record, and where the layer stands

`gradflow.Recorder` records any torch model; deepscale's own runs are recorded by the same one.
"""

from deepscale.gradflow.flow import BLOCK_FIELDS, LAYER_FIELDS, Flow, load
from deepscale.gradflow.recorder import Recorder

__all__ = ["BLOCK_FIELDS", "LAYER_FIELDS", "Flow", "Recorder", "load"]
