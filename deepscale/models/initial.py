"""All initial values, in one place.

| parameter | initial value |
|---|---|
| convolution and linear weights | normal(0, 0.02) |
| biases (convolution, linear, norm) | 0 |
| norm weights | 1 |
| gamma (LayerScale) | --layerscale-init |

Random values come from a generator seeded by (seed, name of the parameter in the plain network), for example
`stages.2.blocks.117.dwconv.weight`, so they depend neither on the stack size, ZeRO stage, world size nor device.
"""

import hashlib

import torch
from torch import Tensor

STD = 0.02


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def fill(parameter: Tensor, name: str, seed: int, gamma_init: float | None) -> None:
    """Writes the initial value of the plain network's parameter `name` into `parameter`, whatever its device or shape.

    The values are drawn on the CPU in float32 in the parameter's memory order of the plain network, of which `parameter`
    may be a reshaped view.
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
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(0.0, STD, generator=generator))
