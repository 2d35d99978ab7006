"""The FFCV feed: training images from a .beton, cropped, flipped, jittered and normalised by FFCV's compiled pipeline.

Crop, flip and jitter have torchvision's distributions: RandomCrop(padding=4) with zeros, RandomHorizontalFlip, ColorJitter. The
order of images follows from (seed, epoch) and is that of the tensor feed; the augmentation is drawn from generators that FFCV's
threads seed themselves, and is not reproducible.
FFCV: Leclerc et al. 2023, arXiv:2306.12517, https://github.com/libffcv/ffcv.
"""

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepscale.data.beton_file import FeedUnavailable, Say, beton_path, import_ffcv, verify_beton, write_beton
from deepscale.data.beton_jitter import color_jitter
from deepscale.data.splits import epoch_order

if TYPE_CHECKING:
    from deepscale.config import DataConfig
    from deepscale.data.splits import DatasetInfo, Source

__all__ = ["FeedUnavailable", "FfcvFeed", "beton_path", "open_train_feed", "verify_beton", "write_beton"]

PADDING = 4  # pixels around an image before the random crop


@dataclass(frozen=True)
class Shard:
    """Which images a rank gets: micro batches of `micro_batch` images, dealt to the ranks in turn."""

    micro_batch: int
    rank: int
    world_size: int

    def of(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """This rank's part (steps * micro_batch,) of an epoch's order (M,), steps = M // (micro_batch * world_size) on every rank.

        Step s of rank r is micro batch s * world_size + r of the order; the last incomplete global batch is left out.
        """
        steps = len(order) // (self.micro_batch * self.world_size)
        rows = order[: steps * self.world_size * self.micro_batch].reshape(steps, self.world_size, self.micro_batch)
        return rows[:, self.rank].reshape(-1)


def open_train_feed(
    source: "Source",
    data: "DataConfig",
    *,
    micro_batch: int,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
    workers: int,
    say: Say = print,
) -> "FfcvFeed":
    """The feed of one rank, compiled; its .beton is verified, and written first where it is missing or wrong.

    `workers` are FFCV's threads. The training split must hold a global batch. Raises FeedUnavailable where FFCV or its file
    cannot be had.
    """
    import_ffcv()
    path = beton_path(source, data)
    write_beton(source, path, say)
    feed = FfcvFeed(path, source.info, data, Shard(micro_batch, rank, world_size), seed, torch.device(device), workers, say)
    feed.warm_up()  # here, where a pipeline that does not compile still lets the caller fall back
    return feed


class FfcvFeed:
    """Batches of float32 images (B, C, H, W), normalised, channels_last, and int64 labels (B,), on the rank's device.

    An epoch has images // (B * world_size) steps on every rank; the images left over sit out that epoch. Yielded tensors are the
    caller's own. `images` counts the training split of all ranks.
    """

    name = "ffcv"
    reproducible = False  # the order is, the augmentation is not

    def __init__(
        self, path: Path, info: "DatasetInfo", data: "DataConfig", shard: Shard, seed: int, device: torch.device, workers: int, say: Say = print
    ) -> None:
        self._channels, self._shard, self._seed, self._device, self._say = info.channels, shard, seed, device, say
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        with _kept_threads():
            self._loader = _loader(path, info, data, shard.micro_batch, workers)
        self.images = int(self._loader.reader.num_samples)
        self.steps = self.images // (shard.micro_batch * shard.world_size)
        self._warm = False

    def warm_up(self) -> None:
        """Compiles FFCV's pipeline (5-11 s, once per feed) by reading one batch. Raises FeedUnavailable where that fails."""
        if self._warm:
            return
        self._say("compiling FFCV's pipeline (5-11 s, once per start)")
        start = time.perf_counter()
        for _ in self._read(np.arange(self._shard.micro_batch)):
            self._warm = True
        self._say(f"FFCV's pipeline is compiled ({time.perf_counter() - start:.1f} s)")

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from batch `start` on; may be closed early. One epoch is read at a time."""
        self.warm_up()
        order = self._shard.of(epoch_order(self.images, self._seed, epoch))
        yield from self._read(order[start * self._shard.micro_batch :])

    def _read(self, order: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        # Sets its own order on the finished Loader: version 1.0.2 takes a custom one only as an instance that it then calls.
        self._loader.traversal_order = _FixedOrder(order)
        threads = torch.get_num_threads()
        with _kept_threads():
            batches = iter(self._loader)
        try:
            for step in range(len(order) // self._shard.micro_batch):
                images, labels = _next(batches)
                if step == 0:
                    torch.set_num_threads(threads)  # the reading thread has set them once more, at its start
                yield self._own(images[:, : self._channels], labels.flatten())
        finally:
            _stop(batches)

    def _own(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Copies out of the Loader's buffers, which it writes again two batches later."""
        if self._copies is None:
            # numpy copies on this thread alone: torch's own threads, with FFCV's on the same cores, take 10x the time of the whole feed.
            own = torch.from_numpy(images.permute(0, 2, 3, 1).numpy().copy())  # (B, H, W, C)
            return own.permute(0, 3, 1, 2), labels.clone()
        # On a stream of its own the copy does not wait for the network's step before it, and neither does this thread.
        with torch.cuda.stream(self._copies):
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(self._device, non_blocking=True)
        self._copies.synchronize()
        for tensor in (images, labels):
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return images, labels


class _FixedOrder:
    """FFCV's interface of a traversal order, with the order given."""

    def __init__(self, order: NDArray[np.int64]) -> None:
        self._order = order.astype(np.uint64)

    def sample_order(self, epoch: int) -> NDArray[np.uint64]:
        return self._order


@contextmanager
def _kept_threads() -> Iterator[None]:
    """FFCV sets torch's threads to its own number of workers, for the whole process: this restores them."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loader(path: Path, info: "DatasetInfo", data: "DataConfig", micro_batch: int, workers: int) -> Any:
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    return Loader(
        str(path),
        batch_size=micro_batch,
        num_workers=min(workers, importlib.import_module("numba").config.NUMBA_NUM_THREADS),  # numba refuses more
        order=OrderOption.SEQUENTIAL,
        drop_last=True,
        pipelines={"image": _image_pipeline(info, data), "label": [IntDecoder(), ToTensor()]},
    )


def _image_pipeline(info: "DatasetInfo", data: "DataConfig") -> list[Any]:
    """From the file's (H, W, 3) uint8 to (3, H, W) float32, a greyscale image as three equal channels."""
    from ffcv import transforms
    from ffcv.fields.decoders import SimpleRGBImageDecoder

    steps: list[Any] = [SimpleRGBImageDecoder()]
    if data.augment:
        steps += [transforms.RandomTranslate(padding=PADDING, fill=(0, 0, 0)), transforms.RandomHorizontalFlip(0.5)]
    if data.color_jitter > 0:
        steps.append(color_jitter(data.color_jitter))
    mean, std = (np.broadcast_to(np.asarray(value, dtype=np.float64), (3,)) for value in (info.mean, info.std))
    return [*steps, transforms.NormalizeImage(mean, std, np.dtype(np.float32)), transforms.ToTensor(), transforms.ToTorchImage()]


def _next(batches: Any) -> tuple[Tensor, Tensor]:
    """The next batch. FFCV's own `next` waits for ever where its reading thread died, for example of a pipeline that does not compile."""
    queue = batches.output_queue
    with queue.not_empty:
        while not queue.queue:
            if not batches.is_alive():
                raise FeedUnavailable("FFCV's reading thread died (its error is above); type --feed tensors")
            queue.not_empty.wait(0.5)
    images, labels = next(batches)
    return images, labels


def _stop(batches: Any) -> None:
    """Ends the reading thread: FFCV's own `close` leaves it waiting for ever to put its end mark, where nobody takes the batches before it."""
    batches.iter_ixes = iter(())  # nothing left to read after the batch in work
    batches.close()
    while batches.is_alive():
        with batches.output_queue.not_full:
            batches.output_queue.queue.clear()
            batches.output_queue.not_full.notify()
        batches.join(0.01)
