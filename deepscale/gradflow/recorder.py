"""Records the gradient of every layer, and what every block does, on chosen steps of any training loop."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepscale.engine import Engine, Share, replicated
from deepscale.errors import UsageError
from deepscale.gradflow.flow import BLOCK_FIELDS, LAYER_FIELDS, Floats, Flow
from deepscale.gradflow.layers import Layout, layout_of_modules, layout_of_stacks
from deepscale.gradflow.measure import Measured
from deepscale.gradflow.modules import ModuleObservation
from deepscale.gradflow.observation import Observation, StackObservation, statistics
from deepscale.models.network import Network, has_stacks

RECORDS = 200
BYTES = 100e6  # of all records
CHANGE_BYTES = 8 * 2**20  # of weights are copied to see how much a step changes them, or 1/8 of all where that is more
CHANGE_SHARE = 1 / 8
ALONE = ("stem", "downsample", "head")  # always among them


class Recorder:
    """Records of a model's gradient flow.

        import torch, torchvision
        from deepscale.gradflow import Recorder

        model = torchvision.models.resnet18(num_classes=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        recorder = Recorder(model)
        for step in range(1, 4):
            images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
            recorder.begin(step)  # before the passes of a step that is to be recorded; the others are not touched
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            recorder.gradients()  # when the gradients are complete, before clipping
            optimizer.step()
            recorder.finish()  # what the step changed
            optimizer.zero_grad()
        flow = recorder.flow()  # flow.mean_abs[record, layer]; flow.save(path)

    Any model: layers are its weights with two dimensions or more, in the order of `named_parameters`. `blocks` are the names of the
    modules whose outputs are observed, by default the children of its nn.Sequential and nn.ModuleList (layers.py); what nn.ReLU, GELU,
    SiLU, Tanh and Sigmoid do is counted to the block that they run in or after, functions are not seen. deepscale's own networks
    with stacks have their layers and blocks by the plain network's names, and no `blocks`.

    Gradients are `p.grad` of this process, or, with an `engine` of deepscale (engine.py), those that ZeRO has spread over the ranks;
    then every rank must call every method. Under a GradScaler, call `scaler.unscale_(optimizer)` before `gradients`, and tell it the
    scale. Under DistributedDataParallel `p.grad` is the mean over ranks, blocks are those of this rank's images and loss. Under
    DataParallel, and where a model is compiled, leave out `begin` and call `gradients(step)`: hooks do not see one pass there. With
    activation checkpointing, a block's means are those of its passes with gradients, computed twice or not.

    Memory for `records` records is set aside at once, at most 100 MB; when it is full, every other record is
    dropped, and from then on every other one is kept. Raises UsageError for a model with nothing to record and for blocks that it does not have.
    """

    def __init__(self, model: nn.Module, *, engine: Engine | None = None, records: int = RECORDS, blocks: list[str] | None = None) -> None:
        self.engine = engine
        self.spread = engine is not None and dist.is_initialized() and dist.get_world_size() > 1
        self.data_size = engine.world.data_size if engine is not None else 1
        self.parameters = dict(model.named_parameters())
        own = (parameter for parameter in self.parameters.values() if not parameter.is_meta)  # another stage's
        first = next(own, torch.empty(0))
        self.device = first.device
        self.layout, self.observation = _parts(model, self.device, blocks)
        self.static = self.layout.arrays()
        self.layers = {name: torch.tensor(rows, device=self.device) for name, rows in self.layout.rows.items()}
        self.sizes = {name: _elements(self.parameters[name]) // len(rows) for name, rows in self.layout.rows.items()}
        self.changing = _spread(self.layout, {name: size * len(self.layout.rows[name]) for name, size in self.sizes.items()})
        dtype = np.float64 if first.dtype == torch.float64 else np.float32
        widths = [len(self.layout.names)] * len(LAYER_FIELDS) + [len(self.layout.block_names)] * len(BLOCK_FIELDS)
        # Thinning keeps the first and the last, and must make room for one.
        self.capacity = max(3, min(records, int(BYTES / (sum(widths) * np.dtype(dtype).itemsize))))
        self.values = np.empty((self.capacity, sum(widths)), dtype)
        views = np.split(self.values, np.cumsum(widths)[:-1], axis=1)
        self.fields = dict(zip((*LAYER_FIELDS, *BLOCK_FIELDS), views, strict=True))  # (capacity, L or N) each
        self.steps: list[int] = []
        self.numbers: list[int] = []  # of each record that is kept: how many were made before it
        self.made, self.stride = 0, 1
        self.complete = 0  # of `steps`; the last one may have begun and be without its gradients
        self.measured: Measured | None = None
        self.before: dict[str, tuple[Share, Tensor]] = {}

    def begin(self, step: int, activations: bool = True) -> None:
        """Before the forward passes of a step that is to be recorded; `activations` says whether saturation is counted."""
        self._next(step)
        self.observation.attach(activations)

    @torch.no_grad()
    def gradients(self, step: int | None = None, loss_scale: float = 1.0) -> None:
        """Between the last backward and the step. With `step`, records a step that `begin` was not called for, without its blocks.

        `loss_scale` is what the loss was multiplied by before backward, with `p.grad` divided by it since; an engine knows its own.
        """
        if step is not None:
            self._next(step)
        measured = Measured(len(self.layout.names), self.device)
        for name, layers in self.layers.items():
            share = self._share(name)
            measured.gradient(layers, share, self.sizes[name])
            if name in self.changing:
                self.before[name] = share, share.weight.clone()
        measured.add_up(self.spread)
        scale = self.engine.loss_scale() if self.engine is not None else loss_scale
        blocks = statistics(self.observation.detach(), self.spread, scale, self.data_size)
        nothing = torch.full((len(self.layout.block_names),), torch.nan, dtype=torch.float64, device=self.device)
        fields = measured.fields() | {"update_ratio": torch.full_like(measured.top, torch.nan)}
        row = [fields[name] for name in LAYER_FIELDS] + [blocks.get(name, nothing) for name in BLOCK_FIELDS]
        self.values[len(self.steps) - 1] = torch.cat(row).cpu().numpy()
        self.measured, self.complete = measured, len(self.steps)

    @torch.no_grad()
    def finish(self) -> None:
        """After the optimiser's step: how much it changed the weights."""
        measured = self.measured
        if measured is None:
            return
        for name, (share, before) in self.before.items():
            if share.again is not None:
                share = share._replace(weight=share.again())
            measured.change(self.layers[name], share, before, self.sizes[name])
        self.before, self.measured = {}, None
        if self.spread:
            dist.all_reduce(measured.change_square)
        ratio = (measured.change_square / measured.weight_square).sqrt()
        ratio = torch.where(measured.weight_square > 0, ratio, torch.nan).cpu().numpy()  # a gamma of 0 has no ratio
        changing = [layer for name in self.changing for layer in self.layout.rows[name]]
        self.fields["update_ratio"][len(self.steps) - 1, changing] = ratio[changing]

    def flow(self, meta: dict[str, object] | None = None) -> Flow:
        """All complete records, with `meta` beside them; views of the recorder's memory, to be saved or copied before more are made."""
        count = self.complete
        self.static["block_groups"][:] = self.layout.block_groups  # of any model they are known after a pass
        fields = {name: values[:count] for name, values in self.fields.items()}
        return Flow(np.array(self.steps[:count], np.int64), **self.static, **fields, meta=_said(self.values.dtype) | (meta or {}))

    def state(self) -> tuple[dict[str, Any], Floats]:
        """(numbers that JSON can hold, (S, ...) complete records): what `load` takes to go on recording in another process."""
        count = self.complete
        numbers = {"steps": self.steps[:count], "numbers": self.numbers[:count], "made": self.made, "stride": self.stride}
        return numbers, self.values[:count].copy()

    def load(self, numbers: Mapping[str, Any], values: Floats) -> None:
        """Takes over the records of a recorder of the same model. Raises UsageError for those of another."""
        if values.shape[0] > self.capacity or values.shape[1:] != self.values.shape[1:] or len(values) != len(numbers["steps"]):
            raise UsageError(f"records of shape {values.shape} are another network's: here they have {self.values.shape[1]:,} numbers each")
        self.complete = len(values)
        self.values[: self.complete] = values
        self.steps, self.numbers = list(numbers["steps"]), list(numbers["numbers"])
        self.made, self.stride = int(numbers["made"]), int(numbers["stride"])

    def _next(self, step: int) -> None:
        del self.steps[self.complete :], self.numbers[self.complete :]
        if len(self.steps) == self.capacity:
            self.stride *= 2
        # What stays are the multiples of the stride, and the newest until the next comes.
        kept = [i for i, number in enumerate(self.numbers) if number % self.stride == 0]
        if len(kept) < len(self.steps):
            self.values[: len(kept)] = self.values[kept]
            self.steps, self.numbers = [self.steps[i] for i in kept], [self.numbers[i] for i in kept]
            self.complete = len(kept)
        self.numbers.append(self.made)
        self.made += 1
        self.steps.append(step)
        self.values[len(self.steps) - 1] = np.nan

    def _share(self, name: str) -> Share:
        parameter = self.parameters[name]
        return replicated(parameter) if self.engine is None else self.engine.share(parameter)


def _parts(model: nn.Module, device: torch.device, blocks: list[str] | None) -> tuple[Layout, Observation]:
    if not (isinstance(model, Network) and has_stacks(model)):
        layout = layout_of_modules(model, blocks)
        return layout, ModuleObservation(model, layout, device)
    if blocks is not None:
        raise UsageError(f"the blocks of deepscale's {type(model).__name__} are those of its stacks, all of which are recorded; leave `blocks` out")
    return layout_of_stacks(model), StackObservation(model, device)


def _elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where ZeRO-3 has cut it up."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _spread(layout: Layout, elements: dict[str, int]) -> list[str]:
    """The parameters whose change is measured: all where they are few, else those of every k-th stack or module, and what is in no stack."""
    owners: dict[str, list[str]] = {}
    for name in elements:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    total = 4 * sum(elements.values())
    most = max(CHANGE_BYTES, CHANGE_SHARE * total)
    every = math.ceil(total / most)
    chosen = []
    for i, names in enumerate(owners.values()):
        alone = layout.kinds[layout.rows[names[0]][0]] in ALONE
        # One module of any model may be larger than all others.
        if alone or (i % every == 0 and 4 * sum(elements[name] for name in names) <= most):
            chosen += names
    return chosen


def _said(dtype: np.dtype) -> dict[str, object]:
    """What was recorded, in words, for the file."""
    return {
        "gradients": "of the whole optimiser step's mean loss: averaged over ranks and micro batches, before clipping, without fp16's scale",
        "layers": "weights of convolutions and linear layers, and gammas; of other models, what has two dimensions or more; no biases, no norms",
        "update_ratio": "from copies of the weights, or of some stacks' or modules', spread over the path; NaN on the others",
        "saturation": "not counted on every record, NaN where it was not",
        "precision": str(dtype),
    }
