"""Bytes of a training step before it runs: the peak over the moments of a step, and what it is made of.

On a CPU bytes are counted over the process just before the network is built, with everything imported; on a GPU they are those
that torch allocates, beside which the driver's context takes some hundred MiB of its own.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from deepscale import pipeline
from deepscale.config import Config
from deepscale.machine import Machine
from deepscale.models import registry
from deepscale.models.convnext import count_parameters
from deepscale.plan_counted import counted
from deepscale.plan_network import (
    EVALUATION_BATCH,
    Images,
    Needs,
    Stage,
    data_ranks,
    evaluated,
    evaluation_bytes,
    images_of,
    kept_on_host,
    needs_of,
    stages_of,
)
from deepscale.plan_pipeline import own_stages, part_costs, sent
from deepscale.plan_states import States, states_of

# On a CPU glibc gives tensors of 32 MiB and more back to the system, smaller ones only at the end of its heap. So the heap's peak stays, with
# holes between what lives long, and with as much again for small tensors that come and go: freed memory that was aligned is seldom found again.
HOLES = 0.08
FITS = 0.9  # of the memory that is free
TENSOR = 1_300  # a tensor's own bytes on a CPU: torch's and Python's objects, what malloc puts before it and leaves after it
FIRST_STEPS = 4_000_000  # code that is read from the libraries, autograd's nodes, Python's objects


@dataclass(frozen=True)
class Moment:
    """Bytes on the device at one moment of a step: in flat buffers, and in other tensors, of which `passing` are small and soon freed."""

    name: str
    flat: int
    heap: int
    passing: int = 0
    host: int = 0  # bytes of what is offloaded

    @property
    def bytes(self) -> int:
        """All of them on the device."""
        return self.flat + self.heap

    @property
    def heap_taken(self) -> int:
        """What glibc's heap takes from the system for them."""
        return self.heap + max(self.passing, int(HOLES * self.heap))


@dataclass(frozen=True)
class Memory:
    """Bytes per rank of a training step, by cause.

    parameters: their number. states: weights, gradients, optimiser and their buffers. kept, kept_host: what the forward pass leaves
    for backward. segment: the peak of one recomputed segment of blocks. workspace: besides it, what one block and one stack need in
    passing. data: a batch. retained: what malloc holds beyond the fullest moment.
    """

    parameters: int
    states: States
    kept: int
    kept_host: int
    segment: int
    workspace: int
    data: int
    retained: int
    moments: tuple[Moment, ...]
    one_memory: bool  # the device is a CPU

    @property
    def device(self) -> int:
        """Bytes on the device at the peak."""
        return max(moment.bytes for moment in self.moments) + self.retained

    @property
    def host(self) -> int:
        """Bytes on the host of what is offloaded."""
        return self.states.host + self.kept_host

    @property
    def states_device(self) -> int:
        """Weights, gradients and optimiser on the device."""
        return self.states.weights + self.states.gradients + self.states.optimizer

    @property
    def states_host(self) -> int:
        """Weights, gradients and optimiser on the host."""
        return self.states.host

    @property
    def total(self) -> int:
        """Bytes on device and host; where they are the same memory, at the fullest moment."""
        if not self.one_memory:
            return self.device + self.host
        return max(m.bytes + m.host for m in self.moments) + self.retained


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether a step fits what is free, with a tenth left."""
    if machine.device == "cpu":
        return memory.total <= FITS * machine.host_bytes
    return memory.device <= FITS * machine.device_bytes and memory.host <= FITS * machine.host_bytes


def memory_of(config: Config, ranks: int, channels: int, image_size: int, classes: int) -> Memory:
    """Bytes of a step of a configuration that holds no `auto`, on each of `ranks` ranks; on those of the pipeline stage that takes most."""
    if config.model.model != "convnext":
        return _counted_memory(config, ranks, registry.Images(channels, image_size, classes))
    found = memories_of(config, ranks, channels, image_size, classes)
    most = max(found, key=lambda memory: memory.total)
    return dataclasses.replace(most, parameters=sum(memory.parameters for memory in found))


def memories_of(config: Config, ranks: int, channels: int, image_size: int, classes: int) -> list[Memory]:
    """The same for each stage of a pipeline: what a rank of it takes, and its own parameters."""
    images, cut = images_of(config, ranks, channels, image_size, classes), config.engine.pipeline_stages
    whole, parameters = stages_of(config, images), count_parameters(config.model, classes, channels)
    if cut == 1:
        return [_memory(config, ranks, images, whole, parameters, Flight())]
    edges, found = pipeline.cut(part_costs(config, images), cut), list[Memory]()
    for i, (first, end) in enumerate(itertools.pairwise(edges)):
        stages = own_stages(whole, first, end)
        head = parameters - sum(stage.parameters for stage in whole) if i + 1 == cut else 0
        # Forward passes that are open at once; of each the input as it came and a copy of it, and the output, until its gradient comes.
        flight = Flight(min(cut - i, config.recipe.accumulation), sent(whole, first), sent(whole, end) if i + 1 < cut else 0)
        found.append(_memory(config, ranks, images, stages, head + sum(stage.parameters for stage in stages), flight))
    return found


@dataclass(frozen=True)
class Flight:
    """A pipeline stage's micro batches: forward passes that are open at once, and bytes of the stream that each takes in and gives away."""

    open: int = 1
    taken: int = 0
    given: int = 0

    @property
    def streams(self) -> int:
        """Bytes of what comes and goes: of every open pass the input, its copy and the output; the buffer to receive in, and a gradient."""
        return self.open * (2 * self.taken + self.given) + max(self.taken, self.given) + self.taken


def _memory(config: Config, ranks: int, images: Images, stages: list[Stage], parameters: int, flight: Flight) -> Memory:
    """Of these stages, which are the whole network or what a pipeline stage has of it."""
    states = states_of(config, parameters, data_ranks(config, ranks))
    needs = needs_of(config, stages, images)
    others = (flight.open - 1) * sum(need.kept for need in needs)  # of open passes but the one at hand
    data = 2 * images.bytes + others + flight.streams  # the batch as uint8 and its crops, and the one after it
    flat, heap = _resting(states, 0)
    passing = 2 * flight.taken + flight.given
    evaluating = evaluation_bytes(config, images, stages) + evaluated(config) * passing // images.micro
    evaluation = Moment("evaluation", flat + states.gathered, heap + evaluating)
    host = states.host + flight.open * kept_on_host(config, stages)
    moments = (
        Moment("start", states.start if states.flat else 0, 0 if states.flat else states.start),
        *(dataclasses.replace(m, host=host) for m in (_forward(states, needs, data), *_backward(states, stages, needs, data), evaluation)),
    )
    cpu = config.engine.device != "cuda"
    taken = FIRST_STEPS + states.holes + max(m.heap_taken for m in moments) + TENSOR * sum(need.tensors for need in needs)
    retained = max(m.flat + m.host for m in moments) + taken - max(m.bytes + m.host for m in moments) if cpu else 0
    data = 2 * images.bytes + flight.streams
    kept, segment, work = flight.open * sum(n.kept for n in needs), max(n.segment for n in needs), max(n.work for n in needs)
    return Memory(parameters, states, kept, host - states.host, segment, work, data, retained, moments, cpu)


def _counted_memory(config: Config, ranks: int, images: registry.Images) -> Memory:
    """An estimate for a network that only a pass on the meta device has counted: what autograd saves, and three of its largest tensors in passing."""
    batch = images_of(config, ranks, images.channels, images.side, images.classes)
    found = counted(config.model, images, batch.micro)
    states, work, data = states_of(config, found.parameters, ranks), 3 * found.largest, 2 * batch.bytes
    flat, heap = _resting(states, data)
    gradients = 0 if states.flat else 4 * found.parameters
    evaluation = heap + 2 * found.largest * EVALUATION_BATCH // batch.micro
    moments = (
        Moment("start", states.start if states.flat else 0, 0 if states.flat else states.start),
        Moment("forward", flat, heap + found.kept + work, host=states.host),
        Moment("backward", flat + states.gathered + states.gradients - gradients, heap + found.kept + work + gradients, host=states.host),
        Moment("step", flat + states.gradients - gradients + states.stepping, heap + gradients + states.arrived, host=states.host),
        Moment("evaluation", flat + states.gathered, evaluation, host=states.host),
    )
    cpu = config.engine.device != "cuda"
    retained = FIRST_STEPS + int(HOLES * max(m.heap for m in moments)) if cpu else 0
    return Memory(found.parameters, states, found.kept, 0, 0, work, data, retained, moments, cpu)


def _resting(states: States, data: int) -> tuple[int, int]:
    """(flat, heap) bytes that are there all the time from the second step on."""
    resting = states.weights + states.optimizer + states.buffers
    return (resting, data) if states.flat else (0, resting + data)


def _forward(states: States, needs: list[Needs], data: int) -> Moment:
    """The end of the forward pass."""
    flat, heap = _resting(states, data)
    return Moment("forward", flat, heap + sum(need.kept for need in needs) + max(need.forward for need in needs))


def _backward(states: States, stages: list[Stage], needs: list[Needs], data: int) -> Iterator[Moment]:
    """Each stage's first and last stack, from the last stage to the first: gradients grow while what was kept is used up. Then the step."""
    flat, heap = _resting(states, data)
    done = 0
    for s in reversed(range(len(stages))):
        need, before = needs[s], sum(need.kept for need in needs[:s])
        for left, gradients in ((before + need.kept, done), (before, done + 4 * stages[s].parameters)):
            piled = gradients if states.piled else 0
            arrived = min(gradients, states.gradients) if states.flat else 0
            taken = heap + left + piled + need.segment + need.work
            yield Moment(f"backward, stage {s + 1}", flat + states.gathered + arrived, taken, need.small)
        done += 4 * stages[s].parameters
    piled = done if states.piled else 0
    if states.flat:
        yield Moment("end of backward", flat + states.gathered + states.gradients, heap + piled)
        yield Moment("step", flat + states.gradients + states.stepping, heap)
    else:
        yield Moment("end of backward", flat, heap + piled + states.arrived)
