"""The record of a run's gradient flow: arrays over records, layers and blocks, and the file they are kept in.

`gradflow.npz`, format version 1, is a compressed NumPy archive (`numpy.load` opens it; nothing in it is pickled):

| array | shape | what |
|---|---|---|
| `steps` | (S,) | optimiser steps that were recorded, from 1; 0 is a probe without training |
| `layer_names` | (L,) | the layer's weight by its name in the plain network, in path order from image to logits |
| `layer_kinds` | (L,) | stem, downsample, dwconv, pwconv1, pwconv2, gamma, head; weight for any other model |
| `layer_depths` | (L,) | layers on the path up to this one: stem 1 ... head D; gammas and downsamplings repeat the one before |
| `block_names`, `block_depths` | (N,) | the blocks whose outputs are observed; the depth of a block's last layer |
| `block_groups` | (N,) | a number that changes where the shape of the block outputs changes (the stage) |
| each of `LAYER_FIELDS` | (S, L) | see there |
| each of `BLOCK_FIELDS` | (S, N) | see there |
| `meta` | () | JSON: version, the settings of the run, and in words what was recorded |

NaN means not recorded. Gradients are those of the mean loss of the whole optimiser step: averaged over ranks and micro
batches, before clipping, without fp16's loss scale. A layer is its weight; biases and norms are not recorded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepscale.errors import UsageError
from deepscale.files import atomic

VERSION = 1
FILE = "gradflow.npz"

# Per layer, of the gradient g of its weight w; with what it is, for axes and files.
LAYER_FIELDS = {
    "mean_abs": "mean |g|",
    "l2": "L2 norm of g",
    "max_abs": "max |g|",
    "zeros": "share of exact zeros in g, 0 to 1",
    "nonfinite": "share of NaN and infinite values in g, 0 to 1",
    "weight_l2": "L2 norm of w before the step",
    "update_ratio": "L2 norm of the step's change of w over weight_l2; measured on the layers where it is not NaN, and not of weights that are 0",
}
# Per block, of its output x (B, C, H, W), and of its activation function's (B, 4C, H, W).
BLOCK_FIELDS = {
    "output_mean": "mean of x",
    "output_std": "standard deviation of x",
    "output_grad_l2": "L2 norm of the gradient with respect to x",
    "saturated": "share of the activation's outputs with |f'| < 0.01, 0 to 1",
    "dead": "share of the activation's units with |f'| < 0.01 for the whole batch, 0 to 1",
}
_STATIC = ("steps", "layer_names", "layer_kinds", "layer_depths", "block_names", "block_depths", "block_groups")

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Names = NDArray[np.str_]


@dataclass
class Flow:
    """The gradient flow of a run: S records of L layers and N blocks. The module's table says what each array holds."""

    steps: Integers
    layer_names: Names
    layer_kinds: Names
    layer_depths: Integers
    block_names: Names
    block_depths: Integers
    block_groups: Integers
    mean_abs: Floats
    l2: Floats
    max_abs: Floats
    zeros: Floats
    nonfinite: Floats
    weight_l2: Floats
    update_ratio: Floats
    output_mean: Floats
    output_std: Floats
    output_grad_l2: Floats
    saturated: Floats
    dead: Floats
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Layers of the network on the path from image to logits."""
        return int(self.layer_depths[-1])

    @property
    def weights(self) -> NDArray[np.bool_]:
        """(L,) which layers are weights on the path: all but gammas."""
        return self.layer_kinds != "gamma"

    def layer(self, name: str) -> int:
        """The index of a layer by its name, with or without `.weight`. Raises UsageError for an unknown one."""
        found = np.flatnonzero((self.layer_names == name) | (self.layer_names == f"{name}.weight"))
        if not len(found):
            raise UsageError(f"no layer is named {name!r}; possible: {self.layer_names[0]} to {self.layer_names[-1]}")
        return int(found[0])

    def save(self, path: Path) -> Path:
        """Writes the file, complete or not at all; makes its folder. Raises UsageError where it cannot be written."""
        arrays = {name: getattr(self, name) for name in (*_STATIC, *LAYER_FIELDS, *BLOCK_FIELDS)}
        meta = json.dumps({"version": VERSION, **self.meta}, default=str)
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays, meta=np.array(meta))
        return path


def read(path: Path) -> Flow:
    """The record in a file. Raises UsageError for one that is missing, truncated, of another version or no record at all."""
    if not path.is_file():
        raise UsageError(f"there is no record {path}; give a gradflow.npz, the folder of one, or a run in MLflow")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, Any] = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays["meta"]))
        version = meta.pop("version")
    except Exception as error:  # NumPy, zipfile, zlib and JSON raise a dozen kinds for bytes that are none of theirs
        raise UsageError(f"{path} is not a readable record of gradient flow: it is truncated or something else ({error})") from None
    if version != VERSION:
        raise UsageError(f"{path} has format version {version}, this deepscale reads version {VERSION}; read it with the version that wrote it")
    try:
        flow = Flow(**{name: arrays[name] for name in (*_STATIC, *LAYER_FIELDS, *BLOCK_FIELDS)}, meta=meta)
        _check_shapes(flow)
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path} is not a complete record of gradient flow ({error}); run it again") from None
    return flow


def load(run: str | Path) -> Flow:
    """The gradient flow of a run: `run` is a `gradflow.npz`, the folder of one, or a run's id or name in MLflow.

    >>> flow = load("runs/depth-1004")                    # doctest: +SKIP
    >>> flow.mean_abs.shape == (len(flow.steps), len(flow.layer_names))    # doctest: +SKIP
    True

    Raises UsageError where there is no such run or record, or the file is truncated or of another version.
    """
    path = Path(run)
    if path.is_dir():
        return read(path / FILE)
    if path.suffix == ".npz" or path.is_file():
        return read(path)
    from deepscale.tracking_read import artifact_of

    return read(artifact_of(str(run), FILE))


def _check_shapes(flow: Flow) -> None:
    sizes = {**dict.fromkeys(LAYER_FIELDS, len(flow.layer_names)), **dict.fromkeys(BLOCK_FIELDS, len(flow.block_names))}
    for name, size in sizes.items():
        shape = getattr(flow, name).shape
        if shape != (len(flow.steps), size):
            raise ValueError(f"{name} has shape {shape}, not {(len(flow.steps), size)}")
    for name in ("layer_kinds", "layer_depths"):
        if len(getattr(flow, name)) != len(flow.layer_names):
            raise ValueError(f"{name} has another length than layer_names")
    for name in ("block_depths", "block_groups"):
        if len(getattr(flow, name)) != len(flow.block_names):
            raise ValueError(f"{name} has another length than block_names")
