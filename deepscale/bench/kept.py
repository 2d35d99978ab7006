"""A program: bytes of activations that are alive after a forward pass, as JSON.

Counted, not sampled: every tensor that an operator makes is noted, and those whose memory still exists when the forward pass
has ended are what is kept for backward. Parameters and the batch are not counted.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepscale import config, errors
from deepscale.bench import networks
from deepscale.bench.options import settings_of, whole


class Alive(TorchDispatchMode):
    """Notes the memory of all tensors made while it is entered, but for what `known` tensors hold."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        # A weak reference keeps the address of a storage from being used again, but not its memory.
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.seen:
                    self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    @property
    def bytes(self) -> int:
        """Memory that still exists."""
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass in training leaves for its backward."""
    with Alive([*model.parameters(), *model.buffers(), images]) as alive:
        logits = model(images)
    kept = alive.bytes
    del logits
    return kept


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the arguments say, and prints the result in the last line."""
    command = config.parser("python -m deepscale.bench.kept", "Count the activations kept for backward in this process.")
    for name in ("depth", "width", "batch-size", "segment", "threads"):
        command.add_argument(f"--{name}", type=whole(), required=True)
    values = command.parse_args(arguments)
    torch.set_num_threads(values.threads)
    images, _ = networks.random_batch(values.batch_size)
    result = {}
    for name, segment in (("recomputed", values.segment), ("all", 0)):
        settings = networks.configuration(**settings_of(values, "depth", "width", "batch_size"), segment=segment)
        result[name] = kept_bytes(networks.build(settings), images)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
