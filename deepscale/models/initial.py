"""All initial values, in one place.

| parameter | initial value |
|---|---|
| convolution and linear weights | --init: normal (0, 0.02), kaiming or orthogonal |
| biases (convolution, linear, norm) | 0 |
| norm weights | 1 |
| gamma (LayerScale) | --layerscale-init |

Random values come from a generator seeded by (seed, name of the parameter in the plain network), for example
`stages.2.blocks.117.dwconv.weight`, so they depend neither on the stack size, ZeRO stage, world size nor device.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

STD = 0.02


Shape = tuple[int, int, int]  # (groups, out, fan in): a depthwise convolution has a group for each channel, all others have one


def normal(shape: Shape, generator: Generator) -> Tensor:
    """The original study's: deviation 0.02, whatever the shape."""
    return _drawn(shape, STD, generator)


def kaiming(shape: Shape, generator: Generator) -> Tensor:
    """He et al. (arXiv:1502.01852): normal of deviation sqrt(2 / fan in), which keeps the scale through ReLU."""
    return _drawn(shape, math.sqrt(2 / shape[2]), generator)


def orthogonal(shape: Shape, generator: Generator) -> Tensor:
    """Saxe et al. (arXiv:1312.6120): every group's rows or columns, the fewer, are orthonormal; drawn evenly among such matrices.

    In float64, so that what a processor or its number of threads change in the last bits is rounded off. A matrix (2048, 512) takes
    0.2 s on one core.
    """
    matrix = _drawn(shape, 1.0, generator, torch.float64)
    wide = shape[1] < shape[2]
    q, r = torch.linalg.qr(matrix.mT if wide else matrix)
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]  # else the draw would lean to what the factorisation prefers
    return q.mT if wide else q


def _drawn(shape: Shape, std: float, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu").normal_(0.0, std, generator=generator)


INITS: dict[str, Callable[[Shape, Generator], Tensor]] = {"normal": normal, "kaiming": kaiming, "orthogonal": orthogonal}


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def fill(parameter: Tensor, name: str, seed: int, gamma_init: float | None, init: str) -> None:
    """Writes the initial value of the plain network's parameter `name` into `parameter`, whatever its device or shape.

    The values are drawn on the CPU in the parameter's memory order of the plain network, of which `parameter` may be a reshaped
    view, and rounded to float32.
    """
    owner, _, kind = name.rpartition(".")
    if kind == "gamma":
        assert gamma_init is not None
        parameter.fill_(gamma_init)
    elif kind == "bias":
        parameter.zero_()
    elif owner.endswith("norm"):
        parameter.fill_(1.0)
    else:
        groups = parameter.shape[0] if owner.endswith("dwconv") else 1
        shape = (groups, parameter.shape[0] // groups, parameter[0].numel())
        values = INITS[init](shape, torch.Generator().manual_seed(seed_of(seed, name)))
        parameter.copy_(values.float().reshape(parameter.shape))
