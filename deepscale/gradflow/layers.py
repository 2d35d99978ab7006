"""Which layers and blocks of a model are recorded: their names, their places on the path, and the parameters they lie in."""

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from deepscale.models.convnext import ConvNeXt

KINDS = {"dwconv.weight": "dwconv", "pwconv1.weight": "pwconv1", "pwconv2.weight": "pwconv2", "gamma": "gamma"}
UNCOUNTED = ("gamma", "downsample")  # no layers of their own in the original study's count


@dataclass
class Layout:
    """L layers and N blocks in path order. `rows` says, for each parameter, which layers its leading axis holds."""

    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    block_names: list[str] = field(default_factory=list)
    block_depths: list[int] = field(default_factory=list)
    block_groups: list[int] = field(default_factory=list)

    def add(self, name: str, kind: str, parameter: str) -> None:
        """The next layer on the path, the next row of the parameter."""
        self.rows.setdefault(parameter, []).append(len(self.names))
        self.names.append(name)
        self.kinds.append(kind)
        self.depths.append((self.depths[-1] if self.depths else 0) + (kind not in UNCOUNTED))

    def arrays(self) -> dict[str, np.ndarray]:
        """The static arrays of a `Flow`."""
        text = {"layer_names": self.names, "layer_kinds": self.kinds, "block_names": self.block_names}
        numbers = {"layer_depths": self.depths, "block_depths": self.block_depths, "block_groups": self.block_groups}
        return {name: np.array(value, dtype=np.str_) for name, value in text.items()} | {
            name: np.array(value, dtype=np.int64) for name, value in numbers.items()
        }


def layout_of_convnext(model: ConvNeXt) -> Layout:
    """Stem, each block's three layers and gamma, downsamplings, head."""
    layout = Layout()
    for plain, where in model.plain_names():
        if where.index is None:
            kind = plain.split(".")[0] if not plain.startswith("stages.") else "downsample"
            if plain.endswith((".conv.weight", ".linear.weight")):
                layout.add(plain, kind, where.name)
            continue
        block, _, own = plain.partition(".blocks.")
        number, _, own = own.partition(".")
        if own not in KINDS:
            continue
        if own == "dwconv.weight":
            layout.block_names.append(f"{block}.blocks.{number}")
            layout.block_groups.append(int(block.rpartition(".")[2]))
            layout.block_depths.append(layout.depths[-1] + 3)
        layout.add(plain, KINDS[own], where.name)
    return layout


def layout_of_modules(model: nn.Module, blocks: list[str]) -> Layout:
    """Any other model: every weight with two dimensions or more, in the order of `named_parameters`, and the blocks given by name."""
    layout, place = Layout(), {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and parameter.requires_grad:
            layout.add(name, "weight", name)
            for block in blocks:
                if name.startswith(f"{block}."):
                    place[block] = layout.depths[-1]
    layout.block_names = blocks
    layout.block_depths = [place.get(block, 0) for block in blocks]
    layout.block_groups = [0] * len(blocks)
    return layout
