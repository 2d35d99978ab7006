"""`deepscale evaluate`: accuracy and loss of trained weights, as the run itself measured them."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepscale import config, kernel, use, world
from deepscale.checkpoints.trained import Trained, trained
from deepscale.config import AUTO, Config
from deepscale.data.sources import load_source
from deepscale.data.splits import Source
from deepscale.data.tensors import EvalFeed
from deepscale.engine import TorchEngine
from deepscale.errors import UsageError
from deepscale.evaluation import evaluate
from deepscale.models.convnext import use_kernel
from deepscale.models.network import Network
from deepscale.parsing import parse_count
from deepscale.plan_network import EVALUATION_BATCH
from deepscale.world import World

SPLITS = ("test", "validation")


def main(arguments: list[str]) -> None:
    """Prints accuracy and loss. Raises UsageError for weights or images that cannot be had."""
    parser = config.parser("deepscale evaluate", "Accuracy and loss of trained weights on the images that the run held back.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint (DIR/step-00001200), a --checkpoint-dir (its newest), or model.safetensors")
    parser.add_argument("--best", action="store_true", help="of a --checkpoint-dir: the checkpoint of best validation instead of the newest")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--eval-images", type=parse_count, metavar="N", help="the first N images of the split (default: as many as the run's)")
    parser.add_argument("--data-dir", help="folder of the images (default: the run's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU where there is one")
    parser.add_argument("--kernel", choices=("auto", "native", "torch"), default="auto", help="what computes the blocks on a CPU (default: auto)")
    parser.add_argument(
        "--without-blocks", type=_counts, default=[], metavar="K,K%,...",
        help=f"also without the K (or K % of the) blocks that the network uses least, measured on {use.MEASURED} validation images",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object on standard output")
    given = parser.parse_args(arguments)
    found = trained(given.checkpoint, given.best, _say)
    opened = open_trained(found, given.data_dir, given.device, given.kernel)
    feed = opened.feed(given.split, given.eval_images)
    result = measure(opened, given.split, feed)
    if given.without_blocks:
        result |= pruned(opened, feed, given.without_blocks)
    if given.json:
        print(json.dumps(result, indent=2))
        return
    where = f"{found.path}{f' after step {found.step:,}' if found.step is not None else ''}"
    measured = f"accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f}, {result['images']:,} images"
    print(f"{where}: {given.split} {measured} of {result['data']}")
    for left in result.get("without", []):
        few = f"without the {left['blocks']:,} least used of {len(result['use']):,} blocks"
        print(f"{few}, which move the stream by up to {left['use']:.2g} of its norm: accuracy {left['accuracy']:.2%}, loss {left['loss']:.4f}")


@dataclass(frozen=True)
class Opened:
    """A trained network, ready to be evaluated in the run's precision, and its images."""

    found: Trained
    model: Network
    engine: TorchEngine
    place: World
    source: Source
    limit: int | None

    def feed(self, split: str, images: int | None = None) -> EvalFeed:
        """The first `images` of a split; None: as many as the run's."""
        limit = self.limit if images is None else images
        return EvalFeed(getattr(self.source, split), self.source.info, batch=EVALUATION_BATCH, device=self.place.device, limit=limit)


def open_trained(found: Trained, data_dir: str | None = None, device: str = "auto", blocks: str = "auto") -> Opened:
    """Trained weights with the images that they were trained on; `blocks` is the kernel. Raises UsageError."""
    described, model = found.described, found.network()
    try:
        data = described["data"]
        asked = Config(model=model.config).replace(
            dataset=data["dataset"], data_dir=data_dir or data["data_dir"], precision=data["precision"],
            grey=data.get("grey", False), image_size=data.get("image_size", AUTO), synthetic_classes=data.get("synthetic_classes", 10),
            engine="torch", device=device, kernel=blocks, download=False,
        )  # fmt: skip
        digest, limit = data["digest"], data["eval_images"]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{found.path} does not say what it was trained on ({error} is missing): it was written by an earlier version") from None
    place = World(0, 1, 0, 1, torch.device(world.choose_device(asked.engine)))
    source = load_source(asked.data, _say)
    if source.info.digest != digest:
        raise UsageError(
            f"{found.path} was trained on other images (digest {digest[:12]}) than {source.info.label} from {source.info.location} "
            f"(digest {source.info.digest[:12]}); give the folder of those: --data-dir FOLDER"
        )
    use_kernel(model, str(kernel.choose(asked, place, _say, _say).engine.kernel))
    return Opened(found, model, TorchEngine(model.to(place.device), asked, place), place, source, limit)


def measure(opened: Opened, split: str, feed: EvalFeed) -> dict[str, Any]:
    """Loss and accuracy over a split."""
    measured = evaluate(opened.engine, feed, opened.place)
    return {
        "checkpoint": str(opened.found.path),
        "step": opened.found.step,
        "data": opened.source.info.label,
        "split": split,
        **measured,
        "images": int(measured["images"]),
    }


def pruned(opened: Opened, feed: EvalFeed, counts: list[str]) -> dict[str, Any]:
    """Every block's use, and loss and accuracy without the least used ones. Raises UsageError for more blocks than there are."""
    names = use.block_names(opened.model)
    numbers = [round(len(names) * float(text[:-1]) / 100) if text.endswith("%") else int(text) for text in counts]
    if max(numbers) > len(names):
        raise UsageError(f"--without-blocks {max(numbers)} is more than the network's {len(names):,} blocks; type fewer")
    shares = use.use_of_blocks(opened.model, opened.feed("validation", use.MEASURED), opened.engine)
    order = use.least_used(shares)
    found = use.without(opened.model, opened.engine, feed, opened.place, order, numbers)
    for row, number in zip(found, numbers, strict=True):
        row["use"] = shares[order[number - 1]] if number else 0.0
    return {"use": dict(zip(names, shares, strict=True)), "without": found}


def _counts(text: str) -> list[str]:
    counts = text.split(",")
    for count in counts:
        digits = count.removesuffix("%")
        if not digits.isdigit() or (count.endswith("%") and int(digits) > 100):
            raise argparse.ArgumentTypeError(f"{count!r} is no number of blocks and no share of them; type for example 10,25%,50%")
    return counts


def _say(text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr, flush=True)
