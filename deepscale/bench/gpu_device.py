"""What a device can do: its rate in matrix products, its bandwidths, and what single operators of a block take there."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepscale.bench.gpu_network import synchronise
from deepscale.machine import measure_machine
from deepscale.models.block import BlockSpec
from deepscale.models.components import LayerStandardise
from deepscale.models.stack import BlockStack
from deepscale.world import World

aten = torch.ops.aten
SIDE = {"cuda": 8192, "cpu": 256}  # of the matrices whose product is timed
COPIED = {"cuda": 2**30, "cpu": 2**22}  # bytes of a copy
REPEATS = {"cuda": 20, "cpu": 2}
ROUNDS = 3
STACKED = 16  # blocks of the stack whose block is timed


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int | None = None) -> tuple[float, float]:
    """Seconds of one call when many are issued in a row: until all were issued, and until all were done. The best of a few rounds.

    Where the first is nearly the second, the host is what takes the time: the device waits for launches.
    """
    count = repeats or REPEATS[device.type]
    work()  # the first call chooses and loads kernels
    rounds = []
    for _ in range(ROUNDS):
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(count):
            work()
        issued = time.perf_counter() - begin
        synchronise(device)
        rounds.append(((time.perf_counter() - begin) / count, issued / count))
    done, issued = min(rounds)
    return issued, done


def describe(place: World) -> dict[str, Any]:
    """The device's name, memory and rates. FLOPs and bytes per second."""
    device = place.device
    machine = measure_machine(place)
    cuda = device.type == "cuda"
    found: dict[str, Any] = {
        "name": torch.cuda.get_device_name(device) if cuda else "CPU",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "",
        "total_bytes": torch.cuda.mem_get_info(device)[1] if cuda else machine.host_bytes,
        "free_bytes": machine.device_bytes,
        "host_bytes": machine.host_bytes,
        "bf16": machine.bf16,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    side = SIDE[device.type]
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[f"matmul_{name}_flops"] = 2 * side**3 / seconds_of(lambda a=a, b=b: a @ b, device)[1]  # type: ignore[misc]
    a = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    found["copy_bytes"] = 2 * a.numel() / seconds_of(lambda: b.copy_(a), device)[1]
    for name, pinned in (("pageable", False), ("pinned", True)) if cuda else ():
        host = torch.zeros(a.shape, dtype=torch.uint8, pin_memory=pinned)
        found[f"to_host_{name}_bytes"] = a.numel() / seconds_of(lambda h=host: h.copy_(a, non_blocking=True), device, 2)[1]  # type: ignore[misc]
        found[f"from_host_{name}_bytes"] = a.numel() / seconds_of(lambda h=host: a.copy_(h, non_blocking=True), device, 2)[1]  # type: ignore[misc]
    one = torch.ones(1, device=device)
    issued, done = seconds_of(lambda: one.add_(1), device, 50 * REPEATS[device.type])
    return found | {"launch_issued_s": issued, "launch_done_s": done}


def operators(device: torch.device, shape: tuple[int, int, int, int]) -> dict[str, dict[str, Any]]:
    """Microseconds of a block's operators and of what might replace them, for a stream of this shape (B, C, H, W) and a bf16 branch.

    What the device cannot do is named with the reason.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, work in _operators(device, shape).items():
        try:
            issued, done = seconds_of(work, device)
            found[name] = {"issued_us": 1e6 * issued, "done_us": 1e6 * done}
        except (RuntimeError, TypeError, NotImplementedError) as error:
            found[name] = {"why": str(error).strip().splitlines()[0][:200]}
    return found


def _operators(device: torch.device, shape: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    batch, c, height, width = shape
    low = torch.bfloat16

    def random(*size: int, dtype: torch.dtype = low) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x, weight, bias = random(batch, c, height, width), random(c, 1, 3, 3), random(c)
    last, stream = x.contiguous(memory_format=torch.channels_last), random(batch * height * width, c, dtype=torch.float32)
    rows, hidden, w1, b1 = random(len(stream), c), random(len(stream), 4 * c), random(4 * c, c), random(4 * c)
    gamma, zeros, ones = random(1, dtype=torch.float32), torch.zeros(len(stream), 1, device=device), torch.ones(len(stream), 1, device=device)
    norm, by_operators = LayerStandardise(1e-6), LayerStandardise(1e-6)
    by_operators.KERNEL = ()

    def convolution_backward(g: Tensor) -> Callable[[], object]:
        return lambda: aten.convolution_backward(g, g, weight.to(g.dtype), [c], [1, 1], [1, 1], [1, 1], False, [0, 0], c, [True, True, True])

    work: dict[str, Callable[[], object]] = {
        "depthwise convolution, channels-last": lambda: F.conv2d(last, weight, bias, padding=1, groups=c),
        "depthwise convolution, NCHW": lambda: F.conv2d(x, weight, bias, padding=1, groups=c),
        "its backward, channels-last": convolution_backward(last),
        "its backward, NCHW": convolution_backward(x),
        "its backward, channels-last, float32": convolution_backward(last.float()),
        "the first, fastest by trial": lambda: _by_trial(lambda: F.conv2d(last, weight, bias, padding=1, groups=c)),
        "its backward, channels-last, fastest by trial": lambda: _by_trial(convolution_backward(last)),
        "LayerNorm as blocks do it": lambda: norm.forward(rows if norm.takes(rows) else stream.clone()),
        "LayerNorm by operators": lambda: by_operators.forward(stream.clone()),
        "LayerNorm by torch's kernel, bf16": lambda: aten.native_layer_norm(rows, [c], None, None, 1e-6),
        "its backward, bf16": lambda: aten.native_layer_norm_backward(rows, rows, [c], zeros, ones, None, None, (True, False, False)),
        "W1: addmm": lambda: torch.addmm(b1, rows, w1.t()),
        "GELU": lambda: F.gelu(hidden),
        "its backward": lambda: aten.gelu_backward(hidden, hidden),
        "gradient of W1, copied to float32": lambda: torch.empty(c, 4 * c, device=device).copy_(rows.t() @ hidden),
        "gradient of W1, float32 from the product": lambda: torch.mm(rows.t(), hidden, out_dtype=torch.float32),
        "sum of rows, to float32": lambda: torch.sum(hidden, 0, dtype=torch.float32),
        "gamma and the stream, two operators": lambda: (rows * gamma).add_(stream),
        "gamma and the stream, one operator": lambda: torch.addcmul(stream, rows, gamma),
    }
    work |= _blocks(device, shape)
    return work


def _by_trial(work: Callable[[], object]) -> object:
    """With cuDNN's choice made by trying."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        return work()


def _blocks(device: torch.device, shape: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    """A stack's forward and backward passes; its activations kept."""
    stack = BlockStack(BlockSpec(shape[1], 3, "gelu", "layernorm", "identity", "scalar"), 0, STACKED).to(device)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y: Tensor = stack(x)
        return y

    def both() -> None:
        forward().backward(x.detach())
        stack.zero_grad()

    return {f"{STACKED} blocks, forward": forward, f"{STACKED} blocks, forward and backward": both}
