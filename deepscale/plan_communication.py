"""Bytes that ranks send each other in an optimiser step, within a node and between nodes, and how long that takes at a given bandwidth.

Every collective goes round a ring of n ranks, a node's ranks one after the other. Of a tensor of b bytes every rank then sends b (n - 1)/n to gather
it whole or to reduce and scatter it, and twice that to reduce it everywhere (all-reduce). P parameters are 4 P bytes: gradients are averaged and
weights gathered in float32 at every precision. Per optimiser step of a micro batches, read in DeepSpeed 0.19.8 and counted by
`deepscale bench scaling`:

| | gradients | weights |
|---|---|---|
| ZeRO 0, plain torch | all-reduce of 4 P | |
| ZeRO 1 | all-reduce of 4 P | gather of 4 P |
| ZeRO 2 | a times all-reduce of 4 P | gather of 4 P |
| ZeRO 3 | a times reduce-scatter of 4 P | a times gather of up to 8 P, and of what `revolve` runs forward again (plan_gather.py) |

So at a = 1 a rank sends (n - 1)/n of 8 P, 12 P, 12 P and up to 12 P bytes. ZeRO 1 and 2 do not reduce and scatter: DeepSpeed averages a bucket on all
ranks, and each keeps its own part. gloo, the CPU's backend, has no reduce-scatter of its own and sends an all-reduce's bytes for it: up to 16 P.
Stages of a pipeline send each other the stream of every micro batch, and its gradient back.
Not counted: some numbers per step (loss, norm: below 1 kB), records of gradients, evaluation, and what synchronised BatchNorm sends.
"""

from dataclasses import dataclass

from deepscale.config import Config
from deepscale.models.registry import Images
from deepscale.plan_counted import parameters_of
from deepscale.plan_gather import gathered_elements, padded_elements
from deepscale.plan_network import data_ranks, images_of
from deepscale.plan_pipeline import largest_message

# Bytes a second. NVLink of an A100, of one GPU in one direction (an H100 has 450e9); a node's network: one port of 200 Gbit/s.
GPU_BANDWIDTH, NODE_BANDWIDTH = 300e9, 25e9


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `ranks_per_node` ranks. Bytes a second: `gpu_bandwidth` a GPU sends to another of its node, `node_bandwidth` a node sends in all."""

    nodes: int
    ranks_per_node: int
    gpu_bandwidth: float = GPU_BANDWIDTH
    node_bandwidth: float = NODE_BANDWIDTH

    @property
    def ranks(self) -> int:
        """In all."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Communication:
    """Bytes of whole tensors in an optimiser step, by what is done with them, and the ranks that do it."""

    all_reduced: int
    scattered: int  # reduced and scattered
    gathered: int
    ranks: int
    gloo: bool = False
    passed: int = 0  # to another stage of a pipeline, by the rank that passes most

    @property
    def sent(self) -> int:
        """Bytes that each rank sends."""
        twice = 2 * self.all_reduced + (2 if self.gloo else 1) * self.scattered
        return (twice + self.gathered) * (self.ranks - 1) // self.ranks + self.passed


def communication_of(config: Config, ranks: int, channels: int, classes: int, image_size: int = 32) -> Communication:
    """What a step of a configuration that holds no `auto` sends: in a pipeline gradients and weights of a mean stage, between its ranks."""
    gloo, cut, passed = config.engine.device != "cuda", config.engine.pipeline_stages, 0
    if ranks == 1:
        return Communication(0, 0, 0, 1, gloo)
    whole, passes = 4 * parameters_of(config.model, Images(channels, classes=classes)) // cut, config.recipe.accumulation
    if cut > 1:
        passed = passes * largest_message(config, images_of(config, ranks, channels, image_size, classes))
        ranks = data_ranks(config, ranks)
    stage = 0 if config.engine.engine == "torch" else int(config.engine.zero)
    if stage == 3:
        gathered = 4 * gathered_elements(config, ranks, channels, classes)
        scattered = 4 * padded_elements(config, ranks, channels, classes)
        return Communication(0, passes * scattered, passes * gathered, ranks, gloo)
    reduced = whole * (passes if stage == 2 else 1)
    return Communication(reduced, 0, whole if stage else 0, ranks, gloo, passed)


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step on the way: `gpu` each GPU sends within its node, `node` each node sends to the next; seconds if nothing else is done.

    The ring leaves a node once, so that a node sends to others what one rank sends, and the slower of both kinds of link decides.
    Nothing is hidden behind computation: a step takes between the longer of both and their sum.
    """

    gpu: int
    node: int
    seconds: float


def traffic_of(communication: Communication, cluster: Cluster) -> Traffic:
    """Where a step's bytes go in a cluster."""
    sent = communication.sent
    gpu, node = (sent if cluster.ranks_per_node > 1 else 0), (sent if cluster.nodes > 1 else 0)
    return Traffic(gpu, node, max(gpu / cluster.gpu_bandwidth, node / cluster.node_bandwidth))
