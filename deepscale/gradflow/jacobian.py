"""Singular values of a part of a network: how much it stretches a small change of its input, in every direction at once."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from deepscale.models.network import Network, Stack


def jacobian(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d body(x) / dx (E, D) at one image x (1, C, H, W) of D values.

    One pass over E copies of the image, for a body that treats the images of a batch by themselves: row e is the gradient of output e.
    """
    with torch.no_grad():
        shape = body(x).shape[1:]
    size = shape.numel()
    copies = x.detach().expand(size, *x.shape[1:]).contiguous().requires_grad_()
    (rows,) = torch.autograd.grad(body(copies), copies, torch.eye(size, dtype=x.dtype, device=x.device).view(size, *shape))
    return rows.flatten(1)


def singular_values(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Those of the Jacobian, descending, float64; NaN where it is not finite. Of isometric layers all are 1, however many there are (Saxe et
    al., arXiv:1312.6120)."""
    rows = jacobian(body, x).double()
    return torch.linalg.svdvals(rows) if bool(rows.isfinite().all()) else rows.new_full((min(rows.shape),), torch.nan)


def longest_part(model: Network) -> tuple[str, nn.Sequential]:
    """The stacks with the most blocks in a row that share a name, such as "stages.2.blocks", as one module."""
    parts: dict[str, list[Stack]] = {}
    for name, stack in model.stacks():
        parts.setdefault(name, []).append(stack)
    name = max(parts, key=lambda own: sum(stack.blocks for stack in parts[own]))
    return name, nn.Sequential(*_modules(parts[name]))


def _modules(stacks: list[Stack]) -> Iterator[nn.Module]:
    for stack in stacks:
        assert isinstance(stack, nn.Module)
        yield stack


@torch.no_grad()
def input_of(part: nn.Sequential, model: nn.Module, images: Tensor) -> Tensor:
    """What a part gets where the model runs on images (B, ...)."""
    seen: list[Tensor] = []
    handle = part[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0]
