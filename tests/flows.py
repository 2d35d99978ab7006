"""Made-up gradient flows for tests of what reads them: a ConvNeXt's layers, and gradients that change by so many decades."""

import numpy as np

from deepscale.depth import blocks_for_depth
from deepscale.gradflow.flow import BLOCK_FIELDS, LAYER_FIELDS, Flow


def made_up_flow(depth: int = 26, records: int = 5, decades: float = 0.0, gamma: float | None = 1.0, seed: int = 0) -> Flow:
    """`records` records in which the gradient falls by `decades` from the last block to the first; 12 % noise.

    gamma None leaves gammas out; 0.0 closes the blocks at the first record: their weights' gradients are exactly 0 there.
    """
    random = np.random.default_rng(seed)
    names, kinds, depths, block_names, block_depths, groups = ["stem.conv.weight"], ["stem"], [1], [], [], []
    for s, blocks in enumerate(blocks_for_depth(depth)):
        if s:
            names.append(f"stages.{s}.downsample.conv.weight")
            kinds.append("downsample")
            depths.append(depths[-1])
        for b in range(blocks):
            for kind in ("dwconv", "pwconv1", "pwconv2"):
                names.append(f"stages.{s}.blocks.{b}.{kind}.weight")
                kinds.append(kind)
                depths.append(depths[-1] + 1)
            if gamma is not None:
                names.append(f"stages.{s}.blocks.{b}.gamma")
                kinds.append("gamma")
                depths.append(depths[-1])
            block_names.append(f"stages.{s}.blocks.{b}")
            block_depths.append(depths[-1])
            groups.append(s)
    names.append("head.linear.weight")
    kinds.append("head")
    depths.append(depths[-1] + 1)

    steps = np.unique(np.geomspace(1, 10 * records, records).astype(np.int64))
    shape = {**dict.fromkeys(LAYER_FIELDS, (len(steps), len(names))), **dict.fromkeys(BLOCK_FIELDS, (len(steps), len(block_names)))}
    arrays = {name: np.zeros(size, np.float32) for name, size in shape.items()}
    relative, block_relative = np.array(depths) / depths[-1], np.array(block_depths) / depths[-1]
    noise = 10 ** random.normal(0, 0.05, shape["l2"])
    arrays["l2"][:] = 1e-2 * 10 ** (decades * (relative - 1)) * noise
    arrays["mean_abs"][:], arrays["max_abs"][:] = arrays["l2"] / 30, arrays["l2"] / 3
    arrays["weight_l2"][:] = 1.0
    arrays["update_ratio"][:] = np.where(np.arange(len(names)) % 3 == 0, 1e-3, np.nan)
    arrays["output_std"][:], arrays["saturated"][:] = 1.0 + block_relative, 0.1
    arrays["output_grad_l2"][:] = 1e-2 * 10 ** (decades * (block_relative - 1)) * 10 ** random.normal(0, 0.05, shape["dead"])
    if gamma is not None:
        gammas = np.array(kinds) == "gamma"
        arrays["weight_l2"][:, gammas] = abs(gamma)
        if gamma == 0.0:
            inside = np.isin(kinds, ("dwconv", "pwconv1", "pwconv2"))
            for name in ("l2", "mean_abs", "max_abs"):
                arrays[name][0, inside] = 0.0
            arrays["zeros"][0, inside] = 1.0
            arrays["weight_l2"][1:, gammas] = 1e-3
    return Flow(
        steps, np.array(names), np.array(kinds), np.array(depths), np.array(block_names), np.array(block_depths), np.array(groups),
        **arrays, meta={"run_name": f"made-up {depth}"},
    )  # fmt: skip
