"""Trained weights as one safetensors file, stacked or by plain names, with the settings they belong to.

A file is written under a temporary name and renamed, so a reader never sees half of one.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from deepscale import config
from deepscale.checkpoints import tensor_file
from deepscale.config import AUTO, Config
from deepscale.data.splits import DatasetInfo
from deepscale.engine import Engine
from deepscale.engine_pipeline import PipelineEngine
from deepscale.errors import UsageError
from deepscale.files import atomic
from deepscale.models import registry
from deepscale.models.components import average_running_statistics
from deepscale.models.network import Network

WEIGHTS = "model.safetensors"


def check_writable(folder: str | None) -> None:
    """Raises UsageError where a checkpoint could not be written later."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"the checkpoint folder {folder} cannot be written ({error.strerror}); type another --checkpoint-dir") from None


def gathered_state(model: Network, engine: Engine) -> dict[str, Tensor]:
    """The model's whole state on the CPU, whatever ZeRO stage holds it. Every rank must ask."""
    if isinstance(engine, PipelineEngine):
        return engine.gathered()
    average_running_statistics(model)
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if hasattr(value, "ds_id"):  # a parameter that ZeRO-3 has cut into pieces
            import deepspeed

            with deepspeed.zero.GatheredParameters(value):
                state[name] = value.detach().cpu().clone()
        else:
            state[name] = value.detach().cpu()
    return state


def described(settings: Config, info: DatasetInfo, eval_images: int | None = None) -> dict[str, Any]:
    """What rebuilds the network of planned settings, and what evaluates it as the run does: on its first `eval_images`, None for all."""
    dataset = info.name if settings.data.dataset == AUTO else settings.data.dataset
    limit = eval_images if eval_images is not None or settings.data.eval_images == AUTO else settings.data.eval_images
    data = {"dataset": dataset, "data_dir": settings.data.data_dir, "digest": info.digest, "eval_images": limit}
    data |= {"grey": settings.data.grey, "image_size": settings.data.image_size, "synthetic_classes": settings.data.synthetic_classes}
    return {
        "data": data | {"precision": settings.engine.precision},
        "model": dataclasses.asdict(settings.model) | {"blocks": settings.model.stage_blocks or None},
        "stack_size": settings.engine.stack_size,
        "classes": info.classes,
        "channels": info.channels,
        "side": info.image_size,
    }


def save(folder: Path, state: dict[str, Tensor], settings: Config, info: DatasetInfo, eval_images: int | None = None) -> Path:
    """Writes `model.safetensors`: the stacked state and, as metadata, what `described` says."""
    path = folder / WEIGHTS
    write(path, state, {"deepscale": json.dumps(described(settings, info, eval_images)), "layout": "stacked"})
    return path


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, complete or not at all; makes its folder. Raises UsageError where it cannot be written."""
    with atomic(path) as temporary:
        tensor_file.write(temporary, state, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that `save` or `deepscale export` wrote. Raises UsageError."""
    try:
        with tensor_file.TensorFile(path) as file:
            state, metadata = {name: file.read(name) for name in file.entries}, file.metadata
    except UsageError as error:
        raise UsageError(f"{error}; give one that --checkpoint-dir or deepscale export wrote") from None
    if "deepscale" not in metadata:
        raise UsageError(f"{path} was not written by deepscale: it does not say which network it belongs to")
    return state, metadata


def network_of(metadata: dict[str, str]) -> Network:
    """The network a file belongs to, without values yet. Raises UsageError where its description cannot be read."""
    try:
        described = json.loads(metadata["deepscale"])
        fields = described["model"]
        if fields.get("model", "convnext") == "convnext":
            fields |= {"blocks": tuple(fields["blocks"])}
        model = config.ModelConfig(**fields)
        size = described["stack_size"]
        size = tuple(size) if isinstance(size, list) else int(size)
        # Files of before there were other networks do not say the side, on which ConvNeXt does not depend.
        images = registry.Images(described["channels"], described.get("side", 32), described["classes"])
        return registry.build(model, images, size)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the description of the file's network cannot be read ({error!r}): export it with the version that wrote it") from None
