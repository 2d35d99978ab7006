"""A block of a stack as one compiled kernel on the CPU (block.cpp): `NativeWork` does what `TorchWork` of block.py does in torch's operators.

The kernel goes through a block tile by tile, in cache, with one barrier for its threads instead of one per operator. It keeps
f'(h) where torch's operators keep h, of the same shape: the exponential that gives f gives f' too.

The library is built by others (deepscale/ops) and handed to `load`. BatchNorm, low precision and other devices are
left to torch's operators.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepscale.models.block import GRID_SHIFT
from deepscale.models.components import EPS
from deepscale.models.observe import SATURATED, BlockObserver

if TYPE_CHECKING:
    from deepscale.models.block import BlockSpec, Gradients, Weights

SOURCE = Path(__file__).with_name("block.cpp")
# By their numbers in block.cpp.
ACTIVATIONS = ("gelu", "relu", "silu", "tanh", "sigmoid")
NORMS = ("layernorm", "rmsnorm", "none")

_library: Any = None


class _Stack(ctypes.Structure):
    """Mirrors `Stack` of block.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("channels", "kernel", "activation", "norm", "skip", "images", "height", "width", "threads", "float64")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("dw", "dw_bias", "w1", "b1", "w2", "b2", "masks")),
        *((f"g_{name}", ctypes.c_void_p) for name in ("dw", "dw_bias", "w1", "b1", "w2", "b2")),
    ]


def load(path: Path) -> None:
    """Makes the built library this process's kernel. Raises OSError for a file that is none."""
    global _library
    library = ctypes.CDLL(str(path))
    pointer = ctypes.c_void_p
    for function, pointers in ((library.deepscale_forward, 6), (library.deepscale_backward, 7)):
        function.argtypes = [pointer, ctypes.c_int64, *[pointer] * pointers]
    library.deepscale_observe.argtypes = [*[pointer] * 4, ctypes.c_double, pointer]
    library.deepscale_couple.argtypes = [pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_double, *[pointer] * 3]
    for function in (library.deepscale_forward, library.deepscale_backward, library.deepscale_observe, library.deepscale_couple):
        function.restype = _enough_memory
    _library = library


def _enough_memory(code: int) -> None:
    """Raises MemoryError for a function's code that says so."""
    if code:
        raise MemoryError("the native kernel found no memory for its tiles")


def loaded() -> bool:
    """Whether `load` has been given a library."""
    return _library is not None


def computes(spec: "BlockSpec", device: torch.device, stream: torch.dtype, branch: torch.dtype) -> bool:
    """Whether the kernel knows these blocks, in these dtypes, on this device."""
    known = spec.activation in ACTIVATIONS and spec.norm in NORMS and spec.kernel_size % 2 == 1
    return known and device.type == "cpu" and stream == branch and stream in (torch.float32, torch.float64)


@dataclass
class Saved:
    """What one block's backward needs: its input (B, C, H, W), xhat (M, C), inverse deviation (M, 1), f'(h) and a (M, 4C)."""

    x: Tensor
    xhat: Tensor
    inverse: Tensor
    derivative: Tensor
    a: Tensor


class NativeWork:
    """One stack's pass, block by block, as `TorchWork`; x is dense in channels-last memory. Its backward overwrites f'."""

    def __init__(self, spec: "BlockSpec", weights: "Weights", x: Tensor, masks: Tensor | None, observer: BlockObserver | None) -> None:
        if _library is None:
            raise RuntimeError("the native kernel is not loaded (deepscale.ops.ensure_ops)")
        self.spec, self.observer = spec, observer
        self.held: list[Any] = [masks]  # the kernel has their addresses only
        images, _, height, width = x.shape
        self.stack = _Stack(
            channels=spec.channels,
            kernel=spec.kernel_size,
            activation=ACTIVATIONS.index(spec.activation),
            norm=NORMS.index(spec.norm),
            skip=spec.adds,
            images=images,
            height=height,
            width=width,
            threads=torch.get_num_threads(),
            float64=x.dtype == torch.float64,
            eps=EPS[spec.norm],
            masks=None if masks is None else masks.data_ptr(),
        )
        for name, value in weights.stacked.items():
            dense = value.contiguous()
            self.held.append(dense)
            setattr(self.stack, name, dense.data_ptr())
        self.address = ctypes.addressof(self.stack)
        self.rows, self.units = images * height * width, 4 * spec.channels
        self.gradients: Gradients | None = None

    def forward(self, x: Tensor, i: int, moments: Tensor | None = None) -> Tensor:
        """Block i, of which nothing is kept: (B, C, H, W) -> (B, C, H, W)."""
        out = torch.empty_like(x)
        _library.deepscale_forward(self.address, i, x.data_ptr(), out.data_ptr(), None, None, None, None)
        return out

    def kept(self, x: Tensor, i: int, moments: Tensor | None = None) -> tuple[Tensor, Saved]:
        """Block i, and what its backward needs."""
        out, saved = torch.empty_like(x), self._empty(x)
        self._forward(saved, i, out.data_ptr())
        return out, saved

    def standard(self, x: Tensor, i: int, moments: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Block i, and what `expanded` needs."""
        out, xhat, inverse = torch.empty_like(x), x.new_empty(self.rows, self.spec.channels), self._inverse(x)
        _library.deepscale_forward(self.address, i, x.data_ptr(), out.data_ptr(), xhat.data_ptr(), inverse.data_ptr() or None, None, None)
        return out, (x, xhat, inverse)

    def hidden(self, x: Tensor, i: int) -> Saved:
        """Block i up to its activation: what its backward needs."""
        saved = self._empty(x)
        self._forward(saved, i, None)
        return saved

    def expanded(self, x: Tensor, xhat: Tensor, inverse: Tensor, i: int) -> Saved:
        """Block i from xhat (M, C) to its activation."""
        saved = Saved(x, xhat, inverse, xhat.new_empty(self.rows, self.units), xhat.new_empty(self.rows, self.units))
        _library.deepscale_forward(self.address, i, None, None, xhat.data_ptr(), None, saved.derivative.data_ptr(), saved.a.data_ptr())
        return saved

    def couple(self, half: Tensor, out: Tensor, sign: int) -> Tensor:
        """half (B, C, H, W) += sign * out, a branch's output, rounded where the half is wider; gives a copy of the sum in the stream's dtype."""
        copy = torch.empty_like(out)
        values = (half.data_ptr(), out.data_ptr(), copy.data_ptr())
        _library.deepscale_couple(self.address, sign, half.dtype != out.dtype, GRID_SHIFT, *values)
        return copy

    def backward(self, g: Tensor, saved: Saved, i: int, grads: "Gradients") -> Tensor:
        """Gradient (M, C) on block i's output -> on its input; the folded weights' gradients are written to `grads`."""
        if self.gradients is not grads:
            self.gradients = grads
            for name, value in grads.stacked.items():
                setattr(self.stack, f"g_{name}", value.data_ptr())
        if self.observer is not None:
            self._observe(self.observer, g, saved, i)
        dx = torch.empty_like(g)
        values = (g, saved.x, saved.xhat, saved.inverse, saved.derivative, saved.a, dx)
        _library.deepscale_backward(self.address, i, *(value.data_ptr() for value in values))
        return dx

    def _observe(self, observer: BlockObserver, g: Tensor, saved: Saved, i: int) -> None:
        numbers = observer.room(i)
        x, derivative = saved.x.data_ptr() if i else None, saved.derivative.data_ptr() if observer.activations else None
        _library.deepscale_observe(self.address, g.data_ptr(), x, derivative, SATURATED, numbers.data_ptr())
        observer.measured(i, numbers, self.rows)

    def _empty(self, x: Tensor) -> Saved:
        hidden = (x.new_empty(self.rows, self.units) for _ in range(2))
        return Saved(x, x.new_empty(self.rows, self.spec.channels), self._inverse(x), *hidden)

    def _inverse(self, x: Tensor) -> Tensor:
        return x.new_empty(self.rows if self.spec.norm != "none" else 0, 1)

    def _forward(self, saved: Saved, i: int, out: int | None) -> None:
        inverse = saved.inverse.data_ptr() or None
        values = (saved.xhat.data_ptr(), inverse, saved.derivative.data_ptr(), saved.a.data_ptr())
        _library.deepscale_forward(self.address, i, saved.x.data_ptr(), out, *values)
