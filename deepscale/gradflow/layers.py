"""Which layers and blocks of a model are recorded: their names, their places on the path, and the parameters they lie in."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from torch import nn

from deepscale.errors import UsageError
from deepscale.models.network import Network

CONTAINERS = (nn.Sequential, nn.ModuleList)
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


def layout_of_stacks(model: Network) -> Layout:
    """Each block's layers and gamma, and the layers outside the blocks: ConvNeXt's stem, downsamplings and head."""
    layout = Layout()
    prefixes = list(dict.fromkeys(prefix for prefix, _ in model.stacks()))
    for plain, where in model.plain_names():
        owner, _, kind = plain.rpartition(".")
        if kind not in ("weight", "gamma") or owner.endswith("norm"):
            continue
        if where.index is None:
            layout.add(plain, "downsample" if ".downsample." in plain else plain.split(".")[0], where.name)
            continue
        # stages.2.blocks . 117 . dwconv.weight
        prefix = next(prefix for prefix in prefixes if plain.startswith(f"{prefix}."))
        number, _, own = plain[len(prefix) + 1 :].partition(".")
        if layout.block_names[-1:] != [f"{prefix}.{number}"]:
            layout.block_names.append(f"{prefix}.{number}")
            layout.block_groups.append(prefixes.index(prefix))
            layout.block_depths.append(0)
        layout.add(plain, own.removesuffix(".weight"), where.name)
        layout.block_depths[-1] = layout.depths[-1]
    return layout


def default_blocks(model: nn.Module, owners: set[str]) -> list[str]:
    """The names of a model's blocks: the outermost children of its nn.Sequential and nn.ModuleList that hold a layer.

    `owners` are the modules in which layers lie. A container in a container is descended into; a subclass of one is a block like
    any other module. Without containers, the modules that own the layers.
    """
    holding = {part for owner in owners for part in accumulate(owner.split("."), "{}.{}".format)}

    def visit(module: nn.Module, prefix: str) -> Iterator[str]:
        listed = type(module) in CONTAINERS
        for own, child in module.named_children():
            name = f"{prefix}{own}"
            if listed and type(child) not in CONTAINERS:
                if name in holding:
                    yield name
            else:
                yield from visit(child, f"{name}.")

    return list(visit(model, "")) or [name for name, _ in model.named_modules() if name and name in owners]


def layout_of_modules(model: nn.Module, blocks: list[str] | None) -> Layout:
    """Any other model: every weight with two dimensions or more, in the order of `named_parameters`; and the blocks given, or found, by name.

    A block's depth is that of its last layer, or of the last one before it. Raises UsageError for a model without such weights, and
    for a block that is no module of it.
    """
    layout, deepest = Layout(), dict[str, int]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and len(getattr(parameter, "ds_shape", parameter.shape)) >= 2:  # ZeRO-3 leaves a parameter flat and empty
            layout.add(name, "weight", name)
            for owner in accumulate(name.split(".")[:-1], "{}.{}".format):
                deepest[owner] = layout.depths[-1]
    if not layout.names:
        raise UsageError("the model has no weight with two dimensions or more that is trained: there is nothing to record")
    known, owners = dict(model.named_modules()), Counter(name.rpartition(".")[0] for name in layout.names)
    for block in blocks or ():
        if not block or block not in known:
            raise UsageError(f"the model has no module {block!r}; blocks are names from its named_modules(), such as {next(iter(deepest), None)!r}")
    names = default_blocks(model, set(owners)) if blocks is None else blocks
    depth, depths = 0, dict[str, int]()
    for name in known:
        depth += owners[name]
        depths[name] = deepest.get(name, depth)
    layout.block_names = sorted(dict.fromkeys(names), key=lambda name: depths[name])
    layout.block_depths = [depths[name] for name in layout.block_names]
    layout.block_groups = [0] * len(layout.block_names)
    return layout
