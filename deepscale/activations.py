"""What a forward pass leaves for its backward, as objects: `Recompute(4).apply(model)`.

A policy is laid on any module tree that holds BlockStacks, and leaves the rest of it alone. All of them give the same loss and
gradients; they differ in bytes and FLOPs, which each one's methods give exactly for a stack of n blocks (`Block`). Sources: checkpoints
and recomputed segments, arXiv:1604.06174; recomputing only what is large and cheap, arXiv:2205.05198; activations in host
memory, arXiv:2101.06840.

| policy | kept of a block, elements a row | computed again |
|---|---|---|
| keep | x C, xhat C, h 4C, a 4C, inverse deviation 1 | nothing |
| selective | x C, xhat C, inverse deviation 1 | h and a: one of two products, and the activation |
| recompute | x C of every segment's first block | the forward pass, but for the last product of every segment |
| offload | on the device nothing, on the host as recompute | as recompute |
| revolve | x C of the inputs of a stage's segments that lie in `slots` | as recompute, and the forward pass to the others' inputs (revolve.py) |
| reconstruct | of a whole stage its output, in float64, if its blocks are reversible | the forward pass |

Beside it every policy keeps BatchNorm's statistics (2C a block) and stochastic depth's factors (1 a row and block).
"""

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import nn

from deepscale.config import AUTO, Config
from deepscale.host_store import HostStore
from deepscale.models.block import BlockSpec
from deepscale.models.revolve import Chain, fewest_slots, spans
from deepscale.models.stack import BlockStack, Keeping

M = TypeVar("M", bound=nn.Module)
# Row means of a norm's forward and backward are products with a vector of ones (components.py).
ROW_MEANS = {"layernorm": (2, 0), "rmsnorm": (1, 1)}


@dataclass(frozen=True)
class Block:
    """Sizes of one block of a stack: what it shares with the others, rows M = B * H * W, bytes of an element of stream and branch."""

    spec: BlockSpec
    rows: int
    stream_bytes: int = 4
    branch_bytes: int = 4
    drop_path: bool = False

    @property
    def stream(self) -> int:
        """Bytes of the residual stream, twice as wide as a reversible block's x."""
        return self.rows * self.spec.width * self.stream_bytes

    @property
    def coupled(self) -> int:
        """Bytes of the two halves that reversible blocks couple, in float64; 0 of other blocks."""
        return self.rows * self.spec.width * 8 if self.spec.coupled else 0

    @property
    def input(self) -> int:
        """Bytes of x (M, C), what the branch sees."""
        return self.rows * self.spec.channels * self.stream_bytes

    @property
    def standard(self) -> int:
        """Bytes of xhat (M, C) and of the inverse deviation, a number a row or, with BatchNorm, a channel."""
        numbers = {"none": 0, "batchnorm": self.spec.channels}.get(self.spec.norm, self.rows)
        return self.rows * self.spec.channels * self.branch_bytes + numbers * self.stream_bytes

    @property
    def hidden(self) -> int:
        """Bytes of h and a, (M, 4C) each."""
        return 8 * self.rows * self.spec.channels * self.branch_bytes

    @property
    def always(self) -> int:
        """Bytes that every policy keeps: BatchNorm's mean and variance, and stochastic depth's factors."""
        moments = 2 * self.spec.channels if self.spec.norm == "batchnorm" else 0
        return (moments + (self.rows if self.drop_path else 0)) * self.stream_bytes

    @property
    def product(self) -> int:
        """FLOPs of one of its two products, (M, C) by (C, 4C); a multiplication and an addition are two."""
        return 8 * self.rows * self.spec.channels**2

    @property
    def forward(self) -> int:
        """FLOPs of its forward pass: products, depthwise convolution, row means."""
        means = ROW_MEANS.get(self.spec.norm, (0, 0))[0]
        return 2 * self.product + 2 * self.rows * self.spec.channels * (self.spec.kernel_size**2 + means)

    @property
    def backward(self) -> int:
        """FLOPs of its backward pass: two of each in forward, but for the norm's own means."""
        means = ROW_MEANS.get(self.spec.norm, (0, 0))[1]
        return 4 * self.product + 2 * self.rows * self.spec.channels * (2 * self.spec.kernel_size**2 + means)

    @property
    def folding(self) -> int:
        """FLOPs of the norm's bias folded into the weights, forward and backward, and of its gradient; no more with more rows."""
        return 3 * 8 * self.spec.channels**2 if self.spec.norm in ("layernorm", "batchnorm") else 0


class Policy(ABC):
    """What is kept, for a stage whose stacks have these numbers of blocks. Bytes and FLOPs are those of one forward and backward pass."""

    name: ClassVar[str]

    def apply(self, model: M) -> M:
        """Lays the policy on every BlockStack of the module tree, and gives the tree back."""
        keeping = self.keeping()
        for module in model.modules():
            if isinstance(module, BlockStack):
                module.keeping = keeping
        return model

    def at(self, stage: int) -> "Policy":
        """The policy of one stage of a network."""
        return self

    @abstractmethod
    def keeping(self) -> Keeping:
        """The same for a stack."""

    @abstractmethod
    def kept(self, block: Block, stacks: Sequence[int]) -> int:
        """Bytes that the stage's forward pass leaves on the device."""

    def host(self, block: Block, stacks: Sequence[int]) -> int:
        """Bytes that it leaves in host memory."""
        return 0

    @abstractmethod
    def tensors(self, stacks: Sequence[int]) -> int:
        """Tensors that hold them, on device and host: at depth small ones, whose own bytes count."""

    @abstractmethod
    def working(self, block: Block, stacks: Sequence[int]) -> int:
        """Bytes that its backward pass makes anew at most at a time, beside gradients and what one block's backward takes."""

    @abstractmethod
    def again(self, block: Block, stacks: Sequence[int]) -> int:
        """FLOPs of the forward pass that backward computes again."""

    def flops(self, block: Block, stacks: Sequence[int]) -> int:
        """FLOPs of products, convolutions and row means, forward and backward."""
        return sum(stacks) * (block.forward + block.backward + block.folding) + self.again(block, stacks)


@dataclass(frozen=True)
class KeepAll(Policy):
    """Keeps all that backward needs: 10C elements a row and block."""

    name = "keep"

    def keeping(self) -> Keeping:
        return Keeping()

    def kept(self, block: Block, stacks: Sequence[int]) -> int:
        return sum(stacks) * (block.input + block.standard + block.hidden + block.always)

    def tensors(self, stacks: Sequence[int]) -> int:
        return 5 * sum(stacks)

    def working(self, block: Block, stacks: Sequence[int]) -> int:
        return 0

    def again(self, block: Block, stacks: Sequence[int]) -> int:
        return 0


@dataclass(frozen=True)
class Selective(Policy):
    """Keeps x and xhat of every block, a fifth, and computes h and a again (arXiv:2205.05198): neither convolution, norm nor second product."""

    name = "selective"

    def keeping(self) -> Keeping:
        return Keeping(hidden=False)

    def kept(self, block: Block, stacks: Sequence[int]) -> int:
        return sum(stacks) * (block.input + block.standard + block.always)

    def tensors(self, stacks: Sequence[int]) -> int:
        return 3 * sum(stacks)

    def working(self, block: Block, stacks: Sequence[int]) -> int:
        return block.hidden

    def again(self, block: Block, stacks: Sequence[int]) -> int:
        return sum(stacks) * block.product


@dataclass(frozen=True)
class Recompute(Policy):
    """Keeps the input of every `segment` blocks and runs them forward again (arXiv:1604.06174): C elements a row and segment."""

    segment: int
    name = "recompute"

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ValueError(f"{self.segment} blocks are no segment; KeepAll() recomputes none")

    def segments(self, stacks: Sequence[int]) -> int:
        """Segments of a stage; the last of each stack may be shorter."""
        return sum(-(-n // self.segment) for n in stacks)

    def keeping(self) -> Keeping:
        return Keeping(self.segment)

    def kept(self, block: Block, stacks: Sequence[int]) -> int:
        return self.segments(stacks) * block.input + sum(stacks) * block.always

    def tensors(self, stacks: Sequence[int]) -> int:
        return self.segments(stacks)

    def working(self, block: Block, stacks: Sequence[int]) -> int:
        return min(self.segment, max(stacks)) * (block.input + block.standard + block.hidden) - block.input

    def again(self, block: Block, stacks: Sequence[int]) -> int:
        return sum(stacks) * block.forward - self.segments(stacks) * block.product


@dataclass(frozen=True)
class OffloadInputs(Recompute):
    """As Recompute, but the kept inputs rest in host memory (arXiv:2101.06840), in buffers that are used again (host_store.py).

    The device holds a segment's input while it is computed again, and the next one, which is fetched meanwhile.
    """

    name = "offload"

    def keeping(self) -> Keeping:
        return Keeping(self.segment, store=HostStore())

    def kept(self, block: Block, stacks: Sequence[int]) -> int:
        return sum(stacks) * block.always

    def host(self, block: Block, stacks: Sequence[int]) -> int:
        return self.segments(stacks) * block.input

    def working(self, block: Block, stacks: Sequence[int]) -> int:
        return super().working(block, stacks) + 2 * block.input


@dataclass(frozen=True)
class Revolve(Recompute):
    """As Recompute, but of the inputs of a stage's segments so many are held at a time, in `slots`, and the others computed again from those.

    `slots` are one number for all stages, or one for each; None: the fewest with which no block runs forward more than twice beside
    its segment's run in backward, which are two levels of recomputation. With as many as there are segments it is Recompute. No schedule runs fewer
    segments forward again (Griewank and Walther 2000; revolve.py).
    """

    slots: int | tuple[int, ...] | None = None
    name = "revolve"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.slots if isinstance(self.slots, tuple) else (self.slots,)
        if any(slots is not None and slots < 1 for slots in given):
            raise ValueError(f"{self.slots} slots hold no input to begin from; possible: from 1 on")

    def at(self, stage: int) -> "Revolve":
        """See Policy."""
        return Revolve(self.segment, self.slots[stage % len(self.slots)]) if isinstance(self.slots, tuple) else self

    def slots_of(self, stacks: Sequence[int]) -> int:
        """Inputs of a stage that are held at a time."""
        assert not isinstance(self.slots, tuple), "of one stage: at()"
        units = self.segments(stacks)
        return fewest_slots(units, 1) if self.slots is None else min(self.slots, units)

    def apply(self, model: M) -> M:
        """Lays the policy on the stacks that follow each other, stage by stage, and gives the tree back."""
        for stage, stacks in enumerate(chains(model)):
            chain = Chain(stacks, self.segment, self.at(stage).slots_of([stack.blocks for stack in stacks]))
            for stack in stacks:
                stack.keeping = Keeping(self.segment, chain=chain)
        return model

    def kept(self, block: Block, stacks: Sequence[int]) -> int:
        return self.slots_of(stacks) * block.input + sum(stacks) * block.always

    def tensors(self, stacks: Sequence[int]) -> int:
        return self.slots_of(stacks)

    def working(self, block: Block, stacks: Sequence[int]) -> int:
        again = self.slots_of(stacks) < self.segments(stacks)  # then a segment's input may lie beside the slots
        return super().working(block, stacks) + (block.input if again else 0)

    def again(self, block: Block, stacks: Sequence[int]) -> int:
        blocks, elsewhere = self.advanced(stacks)
        return super().again(block, stacks) + blocks * block.forward + elsewhere * block.folding // 3

    def advanced(self, stacks: Sequence[int]) -> tuple[int, int]:
        """(blocks that run forward again to reach inputs, how many of them in a stack that then is called again and folds its weights)."""
        return _advanced(self.segment, self.slots_of(stacks), tuple(stacks))

    def called(self, stacks: Sequence[int]) -> list[list[int]]:
        """Of each stack, the stacks that its backward calls to run forward again, in order."""
        owner = [own for own, n in enumerate(stacks) for _ in range(0, n, self.segment)]
        found: list[list[int]] = [[] for _ in stacks]
        for begin, unit in spans(len(owner), self.slots_of(stacks)):
            found[owner[unit]] += range(owner[begin], owner[unit])
        return found


@functools.lru_cache(maxsize=256)
def _advanced(segment: int, slots: int, stacks: tuple[int, ...]) -> tuple[int, int]:
    sizes = [(min(segment, n - begin), own) for own, n in enumerate(stacks) for begin in range(0, n, segment)]
    before = [0, *itertools.accumulate(size for size, _ in sizes)]
    first = [0, *itertools.accumulate(stacks)]  # block of each stack
    blocks = elsewhere = 0
    for begin, unit in spans(len(sizes), slots):
        blocks += before[unit] - before[begin]
        elsewhere += max(0, first[sizes[unit][1]] - before[begin])
    return blocks, elsewhere


@dataclass(frozen=True)
class Reconstruct(Policy):
    """Keeps nothing of reversible blocks (arXiv:1707.04585): backward takes every branch away again, from the last block's output on.

    Of other blocks inputs do not follow from outputs: a pass raises ValueError.
    """

    name = "reconstruct"

    def keeping(self) -> Keeping:
        return Keeping(reconstruct=True)

    def kept(self, block: Block, stacks: Sequence[int]) -> int:
        return block.coupled + sum(stacks) * block.always

    def tensors(self, stacks: Sequence[int]) -> int:
        return 1

    def working(self, block: Block, stacks: Sequence[int]) -> int:
        return block.input + block.standard + block.hidden

    def again(self, block: Block, stacks: Sequence[int]) -> int:
        return sum(stacks) * block.forward


# Of any blocks, the fastest first; and with those of reversible blocks alone.
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (KeepAll, Selective, Recompute, OffloadInputs, Revolve)}
KINDS: dict[str, type[Policy]] = {**POLICIES, Reconstruct.name: Reconstruct}


def policy_of(config: Config) -> Policy:
    """The policy of a configuration that holds no `auto`, but for slots, which then are those of two levels."""
    engine, kind = config.engine, KINDS[config.engine.activations]
    if kind is Revolve:
        slots = None if engine.slots == AUTO else engine.slots
        return Revolve(int(engine.segment), slots)  # type: ignore[arg-type]
    return kind(int(engine.segment)) if issubclass(kind, Recompute) else kind()  # type: ignore[arg-type]


def chains(model: nn.Module) -> Iterator[list[BlockStack]]:
    """The stacks that follow each other among a module's children, in the tree's order: a network's stages."""
    if isinstance(model, BlockStack):
        yield [model]
    for module in model.modules():
        for stacks, group in itertools.groupby(module.children(), lambda child: isinstance(child, BlockStack)):
            if stacks:
                yield [child for child in group if isinstance(child, BlockStack)]
