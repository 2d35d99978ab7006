"""The in-memory feed: batches out of uint8 arrays, augmented as whole batches.

Everything random comes from (seed, epoch, step): an epoch is one permutation of all training images, cut into global
batches of which each rank takes its part. So the shards are disjoint, every rank agrees without a word, any step can be
made again, and a step sees the same images, augmented alike, for any number of ranks with the same global batch.

The whole-batch idea follows Keller Jordan's airbench (https://github.com/KellerJordan/cifar10-airbench). Different:
crops come from a view of all windows, and work runs on the host's arrays where there is no GPU, never copying the set.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepscale.data.augment import Draws, Normalise, colour, crop, flip, to_device
from deepscale.data.splits import DatasetInfo, Split, epoch_order


class _Pixels:
    """A split's images and labels where batches are made of them: on the GPU if a quarter of its free memory holds them."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self.device = device
        self.images, self.labels = split.images, split.labels
        self.on_device: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda" and split.images.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
            self.on_device = torch.from_numpy(np.array(split.images)).to(device), torch.from_numpy(np.array(split.labels)).to(device)

    def take(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Fresh images uint8 (B, H, W, C) and labels int64 (B,) on the device."""
        if self.on_device is not None:
            index = to_device(chosen, self.device)
            return self.on_device[0].index_select(0, index), self.on_device[1].index_select(0, index)
        return to_device(np.take(self.images, chosen, axis=0), self.device), to_device(np.take(self.labels, chosen), self.device)


class TrainFeed:
    """Shuffled, augmented training batches of equal size; the last incomplete global batch of an epoch is dropped.

    `images` counts the split over all ranks, `steps` the batches an epoch gives on this rank.
    """

    name = "tensors"

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        *,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
        augment: bool = True,
        color_jitter: float = 0.0,
    ) -> None:
        self.images = len(split.labels)
        self.global_batch = micro_batch * world_size
        self.steps = self.images // self.global_batch
        self.mine = slice(rank * micro_batch, (rank + 1) * micro_batch)
        self.seed, self.augment, self.color_jitter = seed, augment, color_jitter
        self.pixels = _Pixels(split, device)
        self.normalise = Normalise(info.mean, info.std, info.image_size, device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (B, C, H, W), normalised, channels_last, and labels int64 (B,), from batch `start` on."""
        order = epoch_order(self.images, self.seed, epoch)
        for step in range(start, self.steps):
            everyone = order[step * self.global_batch : (step + 1) * self.global_batch]
            images, labels = self.pixels.take(everyone[self.mine])
            yield self._transform(images, epoch, step), labels

    def _transform(self, images: Tensor, epoch: int, step: int) -> Tensor:
        if not self.augment and not self.color_jitter:
            return self.normalise(images)
        random = np.random.default_rng([self.seed, epoch, step])
        draws = Draws.make(random, self.global_batch, self.color_jitter).part(self.mine)
        if self.augment:
            images = flip(crop(images, draws.crops), draws.flips)
        return self.normalise(colour(images.float(), draws) if self.color_jitter else images)


class EvalFeed:
    """Every image exactly once over all ranks, in the split's order, as it is but for normalisation.

    The last batch may be smaller, and ranks may get counts that differ by one, even none. `limit` keeps the first
    images alone, which hold the classes equally often.
    """

    name = "tensors"

    def __init__(
        self, split: Split, info: DatasetInfo, *, batch: int, rank: int = 0, world_size: int = 1, device: torch.device, limit: int | None = None
    ) -> None:
        self.batch, self.rank, self.world_size = batch, rank, world_size
        self.split, self.device = split, device
        self.limit(len(split.labels) if limit is None else limit)
        self.normalise = Normalise(info.mean, info.std, info.image_size, device)

    def limit(self, images: int) -> None:
        """Keeps the first `images` of the split, over all ranks."""
        self.images = min(images, len(self.split.labels))
        self.first, self.last = (self.images * part // self.world_size for part in (self.rank, self.rank + 1))
        self.steps = -((self.first - self.last) // self.batch)

    def blank(self) -> Tensor:
        """One normalised image (1, C, H, W), for a rank that has none left."""
        return self.normalise(to_device(self.split.images[:1], self.device))

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (B, C, H, W), normalised, channels_last, and labels int64 (B,), from batch `start` on."""
        for first in range(self.first + start * self.batch, self.last, self.batch):
            part = slice(first, min(first + self.batch, self.last))
            images = to_device(self.split.images[part], self.device)
            yield self.normalise(images), to_device(self.split.labels[part], self.device)
