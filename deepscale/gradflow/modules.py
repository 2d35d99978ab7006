"""The blocks of any torch model while they run on a recorded step, seen by hooks.

Hooks are there between `attach` and `detach` only: steps that are not recorded run as if there were no recorder.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepscale.gradflow.layers import Layout
from deepscale.models.components import ACTIVATIONS, MODULES, Activation
from deepscale.models.observe import SATURATED, BlockObserver

# By their exact type: what a subclass computes is not known.
KNOWN: dict[type[nn.Module], Activation] = {MODULES[name]: activation for name, activation in ACTIVATIONS.items()}
Call = tuple[str, int]  # an activation module's name, and how many times it had run before in the same pass


class ModuleObserver:
    """What one block does in the passes of an optimiser step: its outputs, and the activations that run in it, pooled.

    As with `BlockObserver`, `collect` makes sums, which add up with those of other ranks that ran the same calls.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset(False)

    def reset(self, activations: bool) -> None:
        """Forgets all passes."""
        self.activations, self.collected = activations, False
        self.block = BlockObserver(1, 0, self.device)  # the output and its gradient
        self.block.reset(activations=False)
        self.shape: torch.Size | None = None  # of the first output, without the batch
        self.gradients = 0
        self.calls: dict[Call, tuple[Tensor, int]] = {}  # saturated outputs of each unit (units,), rows

    def output(self, x: Tensor) -> None:
        """An output x (B, ...) of the block."""
        self.shape = x.shape[1:] if self.shape is None else self.shape
        self.block.output(0, x)

    def gradient(self, g: Tensor) -> None:
        """The gradient with respect to one of its outputs."""
        self.gradients += 1
        self.block.gradient(0, g)

    def derivative(self, call: Call, derivative: Tensor) -> None:
        """f' of an activation that ran in the block: units are dimension 1 of (B, C, H, W) and the last one of any other shape."""
        unit = 1 if derivative.ndim >= 4 else derivative.ndim - 1
        rows = derivative.movedim(unit, -1).reshape(-1, derivative.shape[unit])
        counts = (rows.abs() < SATURATED).sum(0).double()
        before, seen = self.calls.get(call, (torch.zeros_like(counts), 0))
        self.calls[call] = before + counts, seen + len(rows)

    @torch.no_grad()
    def collect(self) -> None:
        """Makes `sums` and `saturated`, float64, of what was kept; a second call changes nothing."""
        if self.collected:
            return
        self.block.collect()
        rows = [float(seen) for _, seen in self.calls.values()]
        others = torch.tensor([float(self.gradients), *rows], dtype=torch.float64, device=self.device)
        self.sums = torch.cat([self.block.sums.flatten(), others])
        counts = [counts.to(self.device) for counts, _ in self.calls.values()]
        self.saturated = torch.cat(counts) if counts else self.sums.new_empty(0)
        self.units = [len(c) for c in counts]
        self.collected = True

    def statistics(self) -> dict[str, Tensor]:
        """(1,) each, as BlockObserver's; NaN where nothing was seen."""
        self.collect()
        own = self.block.sums.numel()
        self.block.sums = self.sums[:own].view_as(self.block.sums)
        found = self.block.statistics()
        if not self.sums[own]:
            found["output_grad_l2"] = torch.full_like(found["output_grad_l2"], torch.nan)
        if self.units:
            rows = self.sums[own + 1 :].repeat_interleave(torch.tensor(self.units, device=self.device))
            found["saturated"] = (self.saturated.sum() / rows.sum())[None]
            found["dead"] = (self.saturated == rows).double().mean()[None]
        return found


class ModuleObservation:
    """The blocks of any model by forward hooks, and by hooks on their outputs for the gradients.

    An activation belongs to the block that runs, or that ran last. Passes without gradients are not observed. A block whose
    output does not come from what is trained has no gradient: NaN.
    """

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device) -> None:
        self.model, self.layout = model, layout
        self.blocks = {name: model.get_submodule(name) for name in layout.block_names}
        self.known = {name: module for name, module in model.named_modules() if type(module) in KNOWN}
        self.observers = {name: ModuleObserver(device) for name in self.blocks}
        self.handles: list[RemovableHandle] = []
        self._start_pass()

    def attach(self, activations: bool) -> None:
        """Begins to observe every pass; `activations` says whether saturation is counted."""
        self._remove()
        self.handles.append(self.model.register_forward_pre_hook(self._start_pass))
        # Before the blocks', so that an activation which is a block is its own.
        for name, module in self.known.items() if activations else ():
            if getattr(module, "inplace", False):
                self.handles.append(module.register_forward_pre_hook(partial(self._keep, name)))
            self.handles.append(module.register_forward_hook(partial(self._activated, name)))
        for name, module in self.blocks.items():
            self.observers[name].reset(activations)
            self.handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self.handles.append(module.register_forward_hook(partial(self._leave, name)))

    def detach(self) -> list[ModuleObserver]:
        """Ends it, and gives the observers, none without `attach`. Now that shapes are known, the layout's groups are."""
        if not self.handles:
            return []
        self._remove()
        shapes = [self.observers[name].shape for name in self.layout.block_names]
        group, last = 0, None
        for i, shape in enumerate(shapes):
            group += shape is not None and last is not None and shape != last
            last = last if shape is None else shape
            self.layout.block_groups[i] = group
        return list(self.observers.values())

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._start_pass()

    def _start_pass(self, *_: Any) -> None:
        self.running: list[str] = []  # names of the blocks that run, the innermost last
        self.last: str | None = None
        self.ran: Counter[str] = Counter()
        self.kept: dict[str, Tensor] = {}

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.running.append(name)

    def _leave(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        if self.running:
            self.running.pop()
        self.last = name
        x = first_tensor(out)
        if x is None or not torch.is_grad_enabled():
            return
        observer = self.observers[name]
        observer.output(x.detach())
        if x.requires_grad:
            x.register_hook(self._shown_to(observer))

    def _shown_to(self, observer: ModuleObserver) -> Callable[[Tensor], None]:
        return lambda g: observer.gradient(g.detach())

    def _keep(self, name: str, module: nn.Module, args: Any) -> None:
        # An activation in place leaves no h behind.
        if args and torch.is_grad_enabled():
            self.kept[name] = args[0].detach().clone()

    @torch.no_grad()
    def _measure(self, block: str, name: str, h: Tensor, a: Tensor) -> None:
        derivative = KNOWN[type(self.known[name])].backward(torch.ones_like(h), h, a)
        self.observers[block].derivative((name, self.ran[name]), derivative)

    def _activated(self, name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        block = self.running[-1] if self.running else self.last
        h = self.kept.pop(name, args[0].detach() if args else None)
        if block is not None and h is not None and torch.is_grad_enabled():
            self._measure(block, name, h, out.detach())
        self.ran[name] += 1


def first_tensor(out: Any) -> Tensor | None:
    """The first floating-point tensor (B, ...) of a module's output, which may be in tuples, lists and dictionaries."""
    if isinstance(out, Tensor):
        return out if out.is_floating_point() and out.ndim else None
    parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else ()
    return next((x for x in map(first_tensor, parts) if x is not None), None)
