"""Reversible blocks: additive coupling of the channels' halves (RevNet, Gomez et al. 2017, arXiv:1707.04585).

    forward (x1, x2) -> (x2, x1 + f(x2))        back (y1, y2) -> (y2 - f(y1), y1)

f is a block's branch on half of the channels; the halves change places, so that two blocks are one of RevNet's. Backward needs a stack's output
alone: it computes every branch once more, and takes it away again. A stack that follows another gives it its input back, so that of
the stacks of a stage one output is held, however many there are.

x1 + f - f is not x1 in floating point, and what is lost adds up over the blocks. So the stream is float64 between the blocks of a stage, and every
branch is rounded to a multiple of 2^-32 on its way into it, far below what float32 can tell beside a stream of about 1. Sums of such
multiples are exact while they are below 2^21, the same branch of the same input is the same in every bit, and by induction so is all that is
reconstructed: fixed point, as in MacKay et al. 2018 (arXiv:1810.10999). Beyond 2^21 a block's error is at most 2^-53 of the stream, as it is
in a network whose weights are float64, of which nothing is rounded.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepscale.models.block import Gradients, rounded, rows_of
from deepscale.models.observe import BlockObserver
from deepscale.models.work import Run, backward_of, moments_of, note_moments

if TYPE_CHECKING:
    from deepscale.models.stack import BlockStack

Halves = tuple[Tensor, Tensor]  # each (B, C / 2, H, W) in channels-last memory
REACH = 8  # nodes of autograd that may stand between two stacks: the hooks of ZeRO-3 are some


class Held:
    """A stack's output (B, C, H, W), until backward asks for it, or the stack that follows it promises to give it back."""

    def __init__(self, y: Tensor) -> None:
        self.value: Tensor | Halves | None = y.detach()
        self.version = y._version

    def is_memory_of(self, x: Tensor) -> bool:
        """Whether x is the output, unchanged."""
        y = self.value
        return isinstance(y, Tensor) and y.data_ptr() == x.data_ptr() and (y.shape, y.dtype, self.version) == (x.shape, x.dtype, x._version)

    def take(self) -> Halves:
        """The output's halves, to be changed by the caller."""
        y, self.value = self.value, None
        if y is None:
            raise RuntimeError(
                "the output of these reversible blocks was left to those that follow, whose backward pass gives it back and was not run; "
                "run a forward pass that ends here, or type --activations keep"
            )
        if isinstance(y, Tensor):
            if y._version != self.version:
                raise RuntimeError("the output of reversible blocks, which backward needs, has been modified by an inplace operation")
            return halves_of(y, y.dtype)
        return y


def halves_of(x: Tensor, dtype: torch.dtype) -> Halves:
    """x (B, C, H, W) as two copies of a dtype."""
    first, second = (half.to(dtype, copy=True, memory_format=torch.channels_last) for half in x.chunk(2, 1))
    return first, second


def whole(halves: Halves) -> Tensor:
    """(B, C, H, W) in channels-last memory."""
    return torch.cat(halves, 1).contiguous(memory_format=torch.channels_last)


def apply(
    x: Tensor,
    stack: "BlockStack",
    branch: torch.dtype,
    reconstruct: bool | None,
    masks: Tensor | None,
    passing: tuple[float, ...] | None,
    parameters: tuple[Tensor, ...],
) -> Tensor:
    """x (B, C, H, W) -> float64 (B, C, H, W) through a stack's blocks; for the arguments see BlockStack.forward. `reconstruct` is None without
    gradients, and False where all that backward needs is kept."""
    if stack.exact and x.dtype != torch.float64:
        x = rounded(x)  # of which the gradient is 1
    before = _held_of(x) if reconstruct else None
    return _ReversibleFunction.apply(x, stack, branch, reconstruct, before, masks, passing, *parameters)


@torch.no_grad()
def inverse(stack: "BlockStack", y: Tensor) -> Tensor:
    """A stack's input, reconstructed from its output (B, C, H, W) as backward does it; of a stack in evaluation, which drops no block."""
    stream = torch.promote_types(stack.stacked()["pwconv1.weight"].dtype, torch.float32)
    branch, moments = stack.branch_dtype(y.device.type), moments_of(stack, stream)
    with torch.autocast(y.device.type, enabled=False):
        first, second = halves_of(y, y.dtype)
        given = first.to(stream, copy=True)
        run = Run(stack.spec, stack.kernel, branch, moments, True, None, None)
        _, work = run.begin({name: value.detach() for name, value in stack.stacked().items()}, stream, given, None)
        for i in reversed(range(stack.blocks)):
            given = work.couple(second, work.forward(given, i), -1)
            first, second = second, first
        return whole((first, second))


def _held_of(x: Tensor) -> Held | None:
    """What holds x, if that is the output of a stack."""
    node: Any = x.grad_fn
    for _ in range(REACH):
        held = getattr(node, "held", None)
        if isinstance(held, Held):
            return held if held.is_memory_of(x) else None
        if node is None or not node.next_functions:
            return None
        node = node.next_functions[0][0]
    return None


class _ReversibleFunction(torch.autograd.Function):
    """The stack as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stack: "BlockStack",
        branch: torch.dtype,
        reconstruct: bool | None,
        before: Held | None,
        masks: Tensor | None,
        passing: tuple[float, ...] | None,
        *parameters: Tensor,
    ) -> Tensor:
        spec, observer, stream = stack.spec, stack.observer, torch.promote_types(parameters[0].dtype, torch.float32)
        moments, kept, masks = moments_of(stack, stream), list[Any](), masks if masks is None else masks.to(stream)
        shows = observer is not None and (reconstruct is not None or observer.without_gradients)
        with torch.autocast(x.device.type, enabled=False):
            first, second = halves_of(x, x.dtype)
            given = second.to(stream, copy=True)  # to the branch
            run = Run(spec, stack.kernel, branch, moments, not stack.training, masks, passing)
            weights, work = run.begin(dict(zip(spec.shapes(), parameters, strict=True)), stream, given, None)
            computed = set(weights.computed)
            for i in range(weights.blocks):
                if i in computed:
                    if reconstruct is False:
                        out, saved = work.kept(given, i, moments if stack.training else None)
                        kept.append(saved)
                    else:
                        out = work.forward(given, i, moments if stack.training else None)
                    given = work.couple(first, out, 1)
                else:
                    given = first.to(stream, copy=True)
                first, second = second, first
                if shows:
                    observer.output(i, whole((first, second)))  # type: ignore[union-attr]
            y = whole((first, second))
        note_moments(stack, moments, y.numel() // spec.width)
        ctx.save_for_backward(*parameters)
        ctx.run, ctx.kept, ctx.observer, ctx.stream, ctx.spent = run, kept, observer, stream, False
        ctx.held, ctx.before = Held(y) if reconstruct else None, before
        if before is not None:
            before.value = None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        spec, output, observer, held = ctx.run.spec, outputs[0], ctx.observer, ctx.held
        with torch.autocast(output.device.type, enabled=False):
            gradients = halves_of(output, ctx.stream)
            shape = gradients[0].shape
            named, weights, work = backward_of(ctx, ctx.stream, gradients[0], None if observer is None else _DerivativesOnly(observer))
            first, second = held.take() if held is not None else gradients  # which are not touched
            grads = Gradients(spec, weights, gradients[0])
            g, h = (rows_of(own) for own in gradients)
            computed = set(weights.computed)
            given = first.to(ctx.stream, copy=True) if held is not None else first
            for i in reversed(range(weights.blocks)):
                if observer is not None:
                    observer.gradient(i, torch.cat((g, h), 1))
                if i not in computed:
                    g, h = h, g
                    if held is not None:
                        given = second.to(ctx.stream, copy=True)
                else:
                    if held is not None:
                        out, saved = work.kept(given, i)
                        given = work.couple(second, out, -1)
                    else:
                        saved = ctx.kept.pop()
                    g, h = h, work.backward(h, saved, i, grads).add_(g)
                first, second = second, first
            if ctx.before is not None:
                ctx.before.value = (first, second)
            batch, channels, height, width = shape
            dx = torch.cat((g, h), 1).view(batch, height, width, 2 * channels).permute(0, 3, 1, 2)
            return dx.to(output.dtype), None, None, None, None, None, None, *grads.unfolded(named).values()


class _DerivativesOnly(BlockObserver):
    """Shows an observer the activations' derivatives of a branch: its input and the gradient on its output are only half of what it asks for."""

    def __init__(self, observer: BlockObserver) -> None:
        self.observer, self.activations, self.units = observer, observer.activations, observer.units

    def output(self, i: int, x: Tensor) -> None:
        pass

    def gradient(self, i: int, g: Tensor) -> None:
        pass

    def derivative(self, i: int, derivative: Tensor) -> None:
        self.observer.derivative(i, derivative)

    def room(self, i: int) -> Tensor:
        return torch.empty(3 + self.units, dtype=torch.float64)

    def measured(self, i: int, numbers: Tensor, rows: int) -> None:
        self.observer.counted(i, numbers[3:], rows)
