"""`deepscale evaluate`: accuracy and loss of trained weights, as the run itself measured them."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from deepscale import config, kernel, world
from deepscale.checkpoints.trained import Trained, trained
from deepscale.config import AUTO, Config
from deepscale.data.sources import load_source
from deepscale.data.tensors import EvalFeed
from deepscale.engine import TorchEngine
from deepscale.errors import UsageError
from deepscale.evaluation import evaluate
from deepscale.models.convnext import use_kernel
from deepscale.plan_network import EVALUATION_BATCH
from deepscale.world import World

SPLITS = ("test", "validation")


def main(arguments: list[str]) -> None:
    """Prints accuracy and loss. Raises UsageError for weights or images that cannot be had."""
    parser = config.parser("deepscale evaluate", "Accuracy and loss of trained weights on the images that the run held back.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint (DIR/step-00001200), a --checkpoint-dir (its newest), or model.safetensors")
    parser.add_argument("--best", action="store_true", help="of a --checkpoint-dir: the checkpoint of best validation instead of the newest")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--eval-images", type=config.parse_count, metavar="N", help="the first N images of the split (default: as many as the run's)")
    parser.add_argument("--data-dir", help="folder of the images (default: the run's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU where there is one")
    parser.add_argument("--kernel", choices=("auto", "native", "torch"), default="auto", help="what computes the blocks on a CPU (default: auto)")
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object on standard output")
    given = parser.parse_args(arguments)
    found = trained(given.checkpoint, given.best, _say)
    result = measure(found, given.split, given.data_dir, given.eval_images, given.device, given.kernel)
    if given.json:
        print(json.dumps(result, indent=2))
        return
    where = f"{found.path}{f' after step {found.step:,}' if found.step is not None else ''}"
    measured = f"accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f}, {result['images']:,} images"
    print(f"{where}: {given.split} {measured} of {result['data']}")


def measure(found: Trained, split: str, data_dir: str | None, images: int | None, device: str, blocks: str) -> dict[str, Any]:
    """Loss and accuracy over a split of the images that the weights were trained on, in the run's precision. Raises UsageError."""
    described, model = found.described, found.network()
    try:
        data = described["data"]
        asked = Config(model=model.config).replace(
            dataset=data["dataset"], data_dir=data_dir or data["data_dir"], precision=data["precision"],
            grey=data.get("grey", False), image_size=data.get("image_size", AUTO),
            engine="torch", device=device, kernel=blocks, download=False,
        )  # fmt: skip
        digest, limit = data["digest"], images if images is not None else data["eval_images"]
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
    engine = TorchEngine(model.to(place.device), asked, place)
    feed = EvalFeed(getattr(source, split), source.info, batch=EVALUATION_BATCH, device=place.device, limit=limit)
    measured = evaluate(engine, feed, place)
    return {
        "checkpoint": str(found.path),
        "step": found.step,
        "data": source.info.label,
        "split": split,
        **measured,
        "images": int(measured["images"]),
    }


def _say(text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr, flush=True)
