"""Where a step's time goes on a GPU: kernels, gaps between them, host synchronisations, and what a CUDA graph makes of the same passes."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepscale.bench.gpu_network import batch_on, build, loss_of, synchronise
from deepscale.config import Config
from deepscale.world import World

TOP = 15  # kernels that are listed
LOST = "called a synchronizing CUDA operation"  # of torch's warning


class Kernel(NamedTuple):
    """One piece of work of the device, microseconds."""

    name: str
    start: float
    end: float


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one kernel runs."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def summary(kernels: list[Kernel], blocks: int, step_s: float) -> dict[str, Any]:
    """Of one step of `step_s` seconds, measured without the profiler, whose kernels are these."""
    busy = busy_us(kernels) / 1e6
    times, counts = Counter[str](), Counter[str]()
    for kernel in kernels:
        times[kernel.name] += kernel.end - kernel.start  # type: ignore[assignment]
        counts[kernel.name] += 1
    top = [{"name": name[:120], "count": counts[name], "us": round(us, 1)} for name, us in times.most_common(TOP)]
    return {
        "kernels": len(kernels),
        "kernels_per_block": len(kernels) / blocks,
        "busy_s": busy,
        "step_s": step_s,
        "gaps": max(0.0, 1 - busy / step_s),
        "top": top,
    }


def kernels_of(events: Iterable[Any]) -> list[Kernel]:
    """The device's work among a profiler's events; ranges that a program has named span kernels and are none."""
    own = (e for e in events if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False))
    return [Kernel(e.name, e.time_range.start, e.time_range.end) for e in own if "#" not in e.name]


def synchronisations(step: Callable[[], object], device: torch.device) -> int:
    """How often the host waits for the device in a step, as torch warns of it."""
    if device.type != "cuda":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(LOST in str(warning.message) for warning in caught)


def profile(step: Callable[[], object], blocks: int, device: torch.device) -> dict[str, Any]:
    """One warm step under torch's profiler, beside the same step without it."""
    for _ in range(2):
        step()
    synchronise(device)
    begin = time.perf_counter()
    step()
    synchronise(device)
    step_s = time.perf_counter() - begin
    waits = synchronisations(step, device)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profiler:
        step()
        synchronise(device)
    found = summary(kernels_of(profiler.events()), blocks, step_s) | {"synchronisations": waits}
    if device.type == "cuda" and not found["kernels"]:
        return {"why": "the profiler saw no kernels; it may not be allowed to (CUPTI)", "step_s": step_s, "synchronisations": waits}
    return found


class Passes:
    """Forward and backward of one network on one batch: operator by operator, and as one CUDA graph."""

    def __init__(self, settings: Config, place: World, plain: bool = False) -> None:
        self.settings, self.device = settings, place.device
        self.model = build(settings, place.device, plain)
        self.images, self.labels = batch_on(int(settings.data.batch_size), place.device)

    def __call__(self) -> Tensor:
        """The loss; gradients are made anew."""
        self.model.zero_grad()
        loss = loss_of(self.model, self.images, self.labels, self.settings.engine.precision)
        loss.backward()
        return loss.detach()

    def graphed(self) -> dict[str, Any]:
        """Seconds of both, and how far their gradients are apart. Of a CUDA graph the device launches the kernels itself."""
        eager_s = timed(self, self.device)
        expected = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self()
        torch.cuda.current_stream().wait_stream(side)
        self.model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        begin = time.perf_counter()
        with torch.cuda.graph(graph):
            self()
        synchronise(self.device)
        capture_s = time.perf_counter() - begin
        graph_s = timed(graph.replay, self.device)
        apart = worst_difference(expected, [p.grad for p in self.model.parameters() if p.grad is not None])
        return {"eager_s": eager_s, "graph_s": graph_s, "capture_s": capture_s, "gradients_apart": apart}


def against_plain(settings: Config, place: World) -> dict[str, Any]:
    """Seconds of forward and backward, nothing recomputed: the published network, and the stacked one."""
    kept = settings.replace(activations="keep", segment=None)
    return {f"{name}_s": timed(Passes(kept, place, plain), place.device) for name, plain in (("plain", True), ("stacked", False))}


def worst_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest relative difference of two lists of tensors, tensor by tensor."""
    apart = [(a - b).norm() / a.norm().clamp_min(1e-30) for a, b in zip(expected, found, strict=True)]
    return float(torch.stack(apart).max())


def timed(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The fastest of a few calls, seconds, after one that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        synchronise(device)
        begin = time.perf_counter()
        work()
        synchronise(device)
        taken.append(time.perf_counter() - begin)
    return min(taken)
