"""How much a trained network uses its blocks: what each adds to the stream, and what is left of the network without those that add least.

A block's use is |factor * branch(x)| / |x|, L2 norms over an image's whole stream, averaged over images: how far the block moves what it is
given. In float32 what is below 1e-7 is rounding.

A block is left out by its skip connection: the stream goes past it as it is. That is the same as a gamma of 0.
"""

import torch
from torch import Tensor, nn

from deepscale.data.tensors import EvalFeed
from deepscale.engine import Engine
from deepscale.errors import UsageError
from deepscale.evaluation import evaluate
from deepscale.models.convnext import ConvNeXt
from deepscale.models.observe import BlockObserver
from deepscale.models.stack import BlockStack
from deepscale.world import World

MEASURED = 500  # images on which use is measured


class UseObserver(BlockObserver):
    """Of a stack's blocks: the sum over images of |out - in| / |in|, and the number of images."""

    without_gradients = True

    def __init__(self, stack: BlockStack) -> None:
        super().__init__(stack.blocks, 0, stack.stacked()["pwconv2.bias"].device)
        self.shares = torch.zeros(stack.blocks, dtype=torch.float64, device=self.device)
        self.images = 0
        self.before = torch.empty(0)
        self.turn = stack.spec.channels if stack.spec.coupled else 0  # reversible blocks change the places of the channels' halves

    def enter(self, stack: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before a pass: the first block's input."""
        self.before, self.images = inputs[0].detach(), self.images + len(inputs[0])

    def output(self, i: int, x: Tensor) -> None:
        """Block i's output."""
        after, before = x.detach(), self.before.roll(self.turn, 1)
        moved, given = (torch.linalg.vector_norm(value.flatten(1), dim=1, dtype=torch.float64) for value in (after - before, before))
        self.shares[i] += torch.where(moved > 0, moved / given, moved).sum()
        self.before = after


def stacks_of(model: nn.Module) -> list[BlockStack]:
    """All stacks in path order. Raises UsageError for a network without skip connections around blocks."""
    if not isinstance(model, ConvNeXt) or model.config.skip == "none":
        raise UsageError("this network has no blocks with a skip connection that would go past them: which it uses cannot be measured so")
    return [stack for stage in model.path for stack in stage.path]


def block_names(model: nn.Module) -> list[str]:
    """Names of all blocks in the plain network, in path order: `stages.2.blocks.117`."""
    stacks_of(model)
    assert isinstance(model, ConvNeXt)
    return [f"stages.{s}.blocks.{stack.first + i}" for s, stage in enumerate(model.path) for stack in stage.path for i in range(stack.blocks)]


def gammas(model: nn.Module) -> list[float]:
    """(N,) |gamma| of every block, the root mean square over channels where it has one for each; nothing for a network without."""
    own = (stack.stacked().get("gamma") for stack in stacks_of(model))
    values = [gamma.detach().double().square().mean(1).sqrt() for gamma in own if gamma is not None]
    return [float(value) for value in torch.cat(values)] if values else []


@torch.no_grad()
def use_of_blocks(model: nn.Module, feed: EvalFeed, engine: Engine | None = None) -> list[float]:
    """(N,) every block's use, in path order, over the images of a feed."""
    stacks = stacks_of(model)
    observers = [UseObserver(stack) for stack in stacks]
    handles = [stack.register_forward_pre_hook(observer.enter) for stack, observer in zip(stacks, observers, strict=True)]
    training = model.training
    model.eval()
    try:
        for stack, observer in zip(stacks, observers, strict=True):
            stack.observer = observer
        for images, _ in feed.epoch():
            (engine.forward if engine is not None else model)(images)
    finally:
        model.train(training)
        for stack, handle in zip(stacks, handles, strict=True):
            stack.observer = None
            handle.remove()
    return [share for observer in observers for share in (observer.shares / observer.images).tolist()]


def least_used(use: list[float]) -> list[int]:
    """All blocks by their place on the path, the least used first."""
    return sorted(range(len(use)), key=use.__getitem__)


def leave_out(model: nn.Module, blocks: list[int]) -> None:
    """From now on these blocks, by their places on the path, are left out of every pass; none with []."""
    gone, first = set(blocks), 0
    for stack in stacks_of(model):
        stack.without = frozenset(i for i in range(stack.blocks) if first + i in gone)
        first += stack.blocks


def without(model: nn.Module, engine: Engine, feed: EvalFeed, place: World, order: list[int], counts: list[int]) -> list[dict[str, float]]:
    """Loss and accuracy without the first so many blocks of an order, for each of `counts`; the network is whole again afterwards."""
    found = []
    try:
        for count in counts:
            leave_out(model, order[:count])
            found.append({"blocks": count} | evaluate(engine, feed, place))
    finally:
        leave_out(model, [])
    return found
