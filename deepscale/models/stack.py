"""BlockStack: n consecutive equal ConvNeXt blocks as one module whose parameters carry a leading block axis (n, ...).

At depth everything that costs per parameter tensor or per operator dominates, so a stack is also one node of autograd with
a hand-written backward (`_StackFunction`). The maths of a block is in block.py, and in native/ for a CPU.

What a forward pass leaves for its backward is the stack's `keeping`: all that backward needs, a part of it, or only the input of
every segment of blocks (arXiv:1604.06174), whose forward then runs again. Segments may be smaller than stacks: fewer blocks are
held at once and stay in cache, at no more tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepscale.models import reversible
from deepscale.models.block import BlockSpec, Gradients, rows_of
from deepscale.models.components import RunningStatistics
from deepscale.models.observe import BlockObserver
from deepscale.models.revolve import Chain
from deepscale.models.work import Run, backward_of, moments_of, note_moments


class Store(Protocol):
    """Where the inputs of segments rest between forward and backward."""

    def put(self, x: Tensor) -> Any:
        """Takes x (B, C, H, W); what it gives stands for x, which is forgotten when that is."""
        ...

    def get(self, resting: Any) -> Tensor:
        """The x that was put, equal in every bit. Once, and those of one forward pass the last one first."""
        ...


class Inputs(Protocol):
    """The inputs of a stack's segments in one pass, put in order, taken the last one first. `all_stay`: in memory of the stack's device."""

    segment: int
    all_stay: bool

    def put(self, unit: int, x: Tensor) -> None:
        """The input x (B, C, H, W) of segment `unit`."""
        ...

    def ends(self, x: Tensor) -> None:
        """The stack's output."""
        ...

    def take(self, unit: int, work: Any) -> Tensor:
        """The input of segment `unit`; `work` computes the stack's blocks."""
        ...


class AllInputs:
    """Every input, in the store if there is one."""

    def __init__(self, segment: int, store: Store | None) -> None:
        self.segment, self.store, self.all_stay = segment, store, store is None
        self.kept: list[Any] = []

    def put(self, unit: int, x: Tensor) -> None:
        """See Inputs."""
        self.kept.append(x if self.store is None else self.store.put(x))

    def ends(self, x: Tensor) -> None:
        """See Inputs."""

    def take(self, unit: int, work: Any) -> Tensor:
        """See Inputs."""
        part = self.kept.pop()
        return part if self.store is None else self.store.get(part)


@dataclass(frozen=True)
class Keeping:
    """What a stack's forward pass leaves for its backward; every choice gives the same values.

    `segment` 0: what each block's backward needs, but for h and a unless `hidden`; n: the inputs of every n blocks, in the
    `store` if there is one, or some of them, of the whole `chain` of stacks (revolve.py). `reconstruct`: of reversible blocks nothing
    (reversible.py).
    """

    segment: int = 0
    hidden: bool = True
    store: Store | None = None
    chain: Chain | None = None
    reconstruct: bool = False

    def inputs(self, stack: "BlockStack", run: Run, x: Tensor) -> Inputs | None:
        """Where a pass of a stack that begins with x puts the inputs of its segments."""
        if self.chain is not None:
            return self.chain.enter(stack, run, x)
        return AllInputs(self.segment, self.store) if self.segment else None


class _StackFunction(torch.autograd.Function):
    """The stack as one node of autograd. See BlockStack.forward for the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stack: "BlockStack",
        branch: torch.dtype,
        keeping: Keeping | None,
        masks: Tensor | None,
        passing: tuple[float, ...] | None,
        *parameters: Tensor,
    ) -> Tensor:
        spec, moments = stack.spec, moments_of(stack, x.dtype)
        run = Run(spec, stack.kernel, branch, moments, not stack.training, masks, passing)
        inputs = None if keeping is None else keeping.inputs(stack, run, x)
        with torch.autocast(x.device.type, enabled=False):
            weights, work = run.begin(dict(zip(spec.shapes(), parameters, strict=True)), x.dtype, x, None)
            kept: list[Any] = []
            first, measuring, computed = x, moments if stack.training else None, set(weights.computed)
            last = max(computed, default=-1)
            for i in range(weights.blocks):
                if inputs is not None and i % inputs.segment == 0:
                    inputs.put(i // inputs.segment, x)
                if i in computed:
                    x = _forward(work, x, i, measuring, keeping, kept)
                if stack.observer is not None and (stack.observer.without_gradients if keeping is None else i >= last):
                    stack.observer.output(i, x)  # with gradients, backward shows the others: what it needs of them it has then
        note_moments(stack, moments, first.numel() // spec.channels)
        if inputs is not None:
            inputs.ends(x)
        # The input is saved for autograd's check that nobody overwrites it, but where it is not to stay.
        ctx.save_for_backward(*parameters, *([first] if inputs is None or inputs.all_stay else []))
        ctx.run, ctx.kept, ctx.inputs, ctx.keeping, ctx.observer, ctx.spent = run, kept, inputs, keeping, stack.observer, False
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        output, observer = outputs[0], ctx.observer
        with torch.autocast(output.device.type, enabled=False):
            named, weights, work = backward_of(ctx, output.dtype, output, observer)
            batch, channels, height, width = output.shape
            grads = Gradients(ctx.run.spec, weights, output)
            g = rows_of(output.contiguous(memory_format=torch.channels_last))
            saved: list[Any] = []
            above: Any = None  # what was saved of the block after the one at hand
            computed = set(weights.computed)
            for i in reversed(range(weights.blocks)):
                if ctx.inputs is not None and (i + 1 == weights.blocks or (i + 1) % ctx.inputs.segment == 0):
                    saved = _again(work, ctx.inputs, i, computed)
                if i in computed:
                    above = saved.pop() if ctx.inputs is not None else _whole(work, ctx.kept.pop(), ctx.keeping, i)
                    g = work.backward(g, above, i, grads)
                elif observer is not None:  # a block that is left out: its input is the input of the next one
                    observer.gradient(i, g)
                    if i and above is not None:
                        observer.output(i - 1, above.x)
            dx = g.view(batch, height, width, channels).permute(0, 3, 1, 2)
            return dx, None, None, None, None, None, *grads.unfolded(named).values()


def _forward(work: Any, x: Tensor, i: int, moments: Tensor | None, keeping: Keeping | None, kept: list[Any]) -> Tensor:
    """Block i, adding to `kept` what is kept of it."""
    if keeping is None or keeping.segment:
        return work.forward(x, i, moments)
    x, part = (work.kept if keeping.hidden else work.standard)(x, i, moments)
    kept.append(part)
    return x


def _whole(work: Any, part: Any, keeping: Keeping, i: int) -> Any:
    """What block i's backward needs, from what `_forward` kept."""
    return part if keeping.hidden else work.expanded(*part, i)


def _again(work: Any, inputs: Inputs, last: int, computed: set[int]) -> list[Any]:
    """What the backward of the segment that block `last` ends needs: it runs again from its input, but for the end of its last block."""
    x, again = inputs.take(last // inputs.segment, work), []
    blocks = [i for i in range(last - last % inputs.segment, last + 1) if i in computed]
    for i in blocks[:-1]:
        x, saved = work.kept(x, i)
        again.append(saved)
    return [*again, *(work.hidden(x, i) for i in blocks[-1:])]


class BlockStack(nn.Module):
    """Blocks `first` ... `first + blocks - 1` of a stage.

    Parameters are named as in the plain network with the dot replaced (`dwconv_weight`), of shape (n, ...); `gamma` is
    (n, 1) or (n, C). `drop_rates` (n,): stochastic depth, of single images by a mask on the branch, or, with `drop_whole`, as in
    arXiv:1603.09382 of a block for the whole (micro) batch, which then is computed neither forward nor backward. Every rank draws its own
    blocks, as it draws its own images: that needs no message, its random state is in the checkpoint already, and the step's gradient is
    the mean over several networks; what ranks wait for the one that dropped fewest is little where there are many blocks. `without`: blocks
    that are left out of every pass. `keeping` says what forward leaves for backward, at first all (deepscale/activations.py changes it).
    While an `observer` is attached, forward and backward passes with gradients show it every block, and passes without if it asks for
    them; they compute the same values.
    """

    observer: BlockObserver | None = None
    keeping = Keeping()
    exact = True  # of reversible blocks; False: the stream is float32, and what is reconstructed is so but for rounding (to be measured beside)
    _rates: Tensor | None = None  # drop_rates (n, 1) on the device
    kernel = "torch"  # or "native", which must be loaded
    without: frozenset[int] = frozenset()

    def __init__(self, spec: BlockSpec, first: int, blocks: int, drop_rates: tuple[float, ...] | None = None, drop_whole: bool = False) -> None:
        super().__init__()
        self.spec, self.first, self.blocks, self.drop_rates, self.drop_whole = spec, first, blocks, drop_rates, drop_whole
        for name, shape in spec.shapes().items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.empty(blocks, *shape)))
        if spec.norm == "batchnorm":
            self.statistics = RunningStatistics(blocks, spec.channels)

    @property
    def units(self) -> int:
        """Outputs of a block's activation for each pixel."""
        return 4 * self.spec.channels

    def branch_dtype(self, device: str) -> torch.dtype:
        """What branches compute in: autocast's dtype where that is on."""
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.stacked()["pwconv1.weight"].dtype

    def stacked(self) -> dict[str, nn.Parameter]:
        """The parameters by the plain network's names within a block."""
        return {name: getattr(self, name.replace(".", "_")) for name in self.spec.shapes()}

    def forward(self, x: Tensor, again: Callable[["BlockStack", Tensor], Tensor] | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W), in the stream's dtype; the branch runs in autocast's dtype where that is on.

        `again`: what runs instead, within the backward pass of another stack, while this one's weights are whole (revolve.py).
        """
        if again is not None:
            return again(self, x)
        parameters = tuple(self.stacked().values())
        branch = self.branch_dtype(x.device.type)
        keeping = self.keeping if torch.is_grad_enabled() else None
        x = x.contiguous(memory_format=torch.channels_last)
        masks = self._masks(x)
        if self.spec.coupled:
            if keeping not in (None, Keeping(), Keeping(reconstruct=True)):
                raise ValueError("reversible blocks keep all that backward needs, or nothing: KeepAll() or Reconstruct()")
            return reversible.apply(x, self, branch, None if keeping is None else keeping.reconstruct, masks, self._passing(), parameters)
        if keeping is not None and keeping.reconstruct:
            raise ValueError("only the inputs of reversible blocks follow from their outputs: Reconstruct() is for those")
        return _StackFunction.apply(x, self, branch, keeping, masks, self._passing(), *parameters)

    def _passing(self) -> tuple[float, ...] | None:
        """(n) what multiplies every block's branch in this pass, 0 for a block that is left out; None for 1."""
        drawn = None
        if self.training and self.drop_rates is not None and self.drop_whole:
            # On the CPU: what is computed depends on it, and a GPU would be waited for.
            draws = torch.rand(self.blocks, device="cpu").tolist()
            drawn = tuple(0.0 if draw < rate else 1 / (1 - rate) for draw, rate in zip(draws, self.drop_rates, strict=True))
        if not self.without:
            return drawn
        return tuple(0.0 if i in self.without else factor for i, factor in enumerate(drawn or (1.0,) * self.blocks))

    def _masks(self, x: Tensor) -> Tensor | None:
        """Stochastic depth's factors for single images, (n, M, 1), or None."""
        if not self.training or self.drop_rates is None or self.drop_whole:
            return None
        if self._rates is None or self._rates.device != x.device:  # once: a copy to a GPU waits for all of its work
            self._rates = torch.tensor(self.drop_rates, dtype=torch.float64, device=x.device)[:, None]
        kept = (torch.rand(self.blocks, x.shape[0], device=x.device) >= self._rates) / (1 - self._rates)  # (n, B)
        return kept.to(x.dtype).repeat_interleave(x.shape[2] * x.shape[3], dim=1)[:, :, None]
