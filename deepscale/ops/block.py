"""The kernel of the network's block on the CPU (models/native/block.cpp). It needs a C++ compiler and nothing else, not even torch's headers."""

import hashlib
import subprocess
from pathlib import Path

from deepscale.ops.op import Op, compiler, missing_compiler

# Not -ffast-math: NaN must stay NaN, and linked into a library it would flush tiny numbers to zero in the whole process.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC")
THIS_PROCESSOR = ("-march=native",)


def _source() -> Path:
    from deepscale.models import native

    return native.SOURCE


def _versions() -> dict[str, str]:
    content = _source().read_bytes() + " ".join((*FLAGS, *THIS_PROCESSOR)).encode()
    return {"source": hashlib.sha256(content).hexdigest()[:12]}


def _build() -> None:
    command = [*compiler(), *FLAGS, str(_source()), "-o", "block.so"]
    if subprocess.run([*command, *THIS_PROCESSOR]).returncode:
        subprocess.run(command, check=True)  # a compiler that does not know its own processor


def _load(library: Path) -> None:
    from deepscale.models import native

    native.load(library)


def _loaded() -> bool:
    from deepscale.models import native

    return native.loaded()


def _check() -> None:
    """Output and gradients of two blocks equal those of torch's operators. Raises RuntimeError."""
    import torch

    from deepscale.models.block import BlockSpec
    from deepscale.models.stack import BlockStack

    stack = BlockStack(BlockSpec(8, 3, "gelu", "layernorm", "identity", "scalar"), 0, 2)
    generator = torch.Generator().manual_seed(0)
    for parameter in stack.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    found = []
    for kernel in ("native", "torch"):
        stack.kernel = kernel
        stack.zero_grad()
        x = torch.linspace(-2, 2, 3 * 8 * 6 * 6).reshape(3, 8, 6, 6).requires_grad_()
        out = stack(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(parameter.grad for parameter in stack.parameters())])
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))
    if not difference < 1e-4:
        raise RuntimeError(f"it differs from torch's operators by {difference:.2g}")


OP = Op(
    title="the native kernel of the blocks",
    takes="about ten seconds",
    without="training goes on with torch's operators, two to four times slower on a CPU",
    versions=_versions,
    missing=missing_compiler,
    build=_build,
    load=_load,
    loaded=_loaded,
    check=_check,
)
