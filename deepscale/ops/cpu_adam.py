"""DeepSpeed's CPU optimiser (`DeepSpeedCPUAdam`), the only one of its ops that training needs, for ZeRO-Offload (DeepSpeed 0.19).

DeepSpeed also builds `shm_comm` at the first gloo initialisation, which takes half a minute and stops a machine without a
compiler. Only tensor-parallel inference calls it, so it is switched off (`skip_shm_comm`).
"""

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from deepscale.errors import MissingPackageError, UsageError
from deepscale.ops.op import Op, missing_compiler, path_with_ninja


def skip_shm_comm() -> None:
    """Keeps DeepSpeed from building `shm_comm` at its first gloo initialisation; collectives go through gloo as they would anyway."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def cpu_adam_available() -> bool:
    """Whether this process can make a `DeepSpeedCPUAdam`, that is `ensure_ops(["cpu_adam"], ...)` succeeded."""
    return "cpu_adam" in _deepspeed_loaded()


def _deepspeed_loaded() -> dict[str, Any]:
    """DeepSpeed's record of loaded ops: what is in it, its builders return at once."""
    try:
        from deepspeed.ops.op_builder.builder import OpBuilder
    except ImportError:
        raise MissingPackageError("deepspeed", None, "--engine deepspeed") from None
    loaded: dict[str, Any] = OpBuilder._loaded_ops
    return loaded


def _versions() -> dict[str, str]:
    import torch

    skip_shm_comm()
    import deepspeed

    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}",
    }


def missing_for_build() -> str | None:
    """What a build lacks on this machine, as a sentence, or None."""
    if missing := missing_compiler():
        return missing
    if shutil.which("ninja", path=path_with_ninja()) is None:
        return "ninja is missing (pip install ninja)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python are missing (Debian: apt-get install python3-dev)"
    return None


def _build() -> None:
    """Into TORCH_EXTENSIONS_DIR, whose subfolder of the op's name is the working folder."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("CPUAdamBuilder")
    if builder is None:
        raise UsageError("DeepSpeed has no CPUAdamBuilder for this machine's accelerator")
    builder.load(verbose=True)


def _load(library: Path) -> None:
    if cpu_adam_available():  # the build has loaded it
        return
    spec = importlib.util.spec_from_file_location("cpu_adam", library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _deepspeed_loaded()["cpu_adam"] = module


def _check() -> None:
    """One AdamW step of the op equals torch's. Raises RuntimeError."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (torch.linspace(-2.0, 2.0, 1003).requires_grad_() for _ in range(2))
    for parameter, optimizer in ((ours, DeepSpeedCPUAdam([ours], **settings)), (theirs, torch.optim.AdamW([theirs], foreach=False, **settings))):
        parameter.grad = torch.cos(3.0 * parameter.detach())
        optimizer.step()
    difference = (ours - theirs).abs().max().item()
    if not difference < 1e-5:
        raise RuntimeError(f"one step differs from torch's AdamW by {difference:.2g}")


OP = Op(
    title="DeepSpeed's CPU op cpu_adam",
    takes="a minute or two",
    without="training goes on without it, only not with --offload cpu",
    versions=_versions,
    missing=missing_for_build,
    build=_build,
    load=_load,
    loaded=cpu_adam_available,
    check=_check,
)
