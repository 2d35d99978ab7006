"""All initial values, in one place.

| parameter | initial value |
|---|---|
| convolution and linear weights | --init, one of `INITS` |
| biases (convolution, linear, norm) | 0; with --init torch those of convolution and linear layers are drawn |
| norm weights | 1 |
| gamma (LayerScale) | --layerscale-init |

Random values come from a generator seeded by (seed, name of the parameter in the plain network), for example
`stages.2.blocks.117.dwconv.weight`, so they depend neither on the stack size, ZeRO stage, world size nor device.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from deepscale.config import ModelConfig

STD = 0.02
BRANCH_LAYERS = 3  # of a block: dwconv, pwconv1, pwconv2


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, and what its initial weights may depend on.

    `name` is the plain network's, without `.weight`. A depthwise convolution has a group for each channel, all others have one;
    `outputs` and `inputs` are channels of a group, `area` the pixels of the kernel. `blocks` are all of the network's.
    """

    name: str
    groups: int
    outputs: int
    inputs: int
    area: int
    blocks: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, out, fan in) of the weights."""
        return self.groups, self.outputs, self.inputs * self.area

    @property
    def fan_in(self) -> int:
        """Inputs of an output."""
        return self.inputs * self.area

    @property
    def fan_out(self) -> int:
        """Outputs of an input."""
        return self.outputs * self.area

    @property
    def in_block(self) -> bool:
        """Whether it is one of a block's, and so on a residual branch where there is a skip connection."""
        return ".blocks." in self.name

    @property
    def on_patches(self) -> bool:
        """Whether its patches do not overlap, as in stem and downsamplings: then it is a matrix on patches."""
        return self.name.startswith("stem.") or ".downsample." in self.name


def normal(layer: Layer, generator: Generator, std: float = STD) -> Tensor:
    """Of one deviation (--init-std), whatever the shape; the original depth study's 0.02."""
    return _drawn(layer, std, generator)


def kaiming(layer: Layer, generator: Generator) -> Tensor:
    """He et al. (arXiv:1502.01852): normal of deviation sqrt(2 / fan in), which keeps the scale through ReLU."""
    return _drawn(layer, math.sqrt(2 / layer.fan_in), generator)


def fixup(layer: Layer, generator: Generator) -> Tensor:
    """Fixup (Zhang et al. 2019, arXiv:1901.09321), for residual networks without norms: `kaiming`, but the last layer of every branch and
    the head are 0, and the other layers of a branch are scaled by L^(-1 / (2m - 2)), with L blocks and m = 3 layers a branch: L^(-1/4).

    A step of gradient descent on the weights then changes the network's output by an amount that does not grow with the depth (that of biases
    does; the paper gives them a tenth of the learning rate, this does not). Fixup's third rule adds
    scalars to the network. Its multiplier, 1 at first, is gamma (--layerscale-init 1, the `auto` of this init). Of its biases, 0 at first, the
    block without a norm has those before pwconv1 and before the activation: dwconv's and pwconv1's own, one per channel instead of one. It
    lacks the one before pwconv2, whose effect pwconv2's own bias has, and the one before dwconv, whose effect dwconv's own has but for the
    padded border.
    """
    if layer.name.endswith(".pwconv2") or layer.name == "head.linear":
        return torch.zeros(layer.shape)
    values = kaiming(layer, generator)
    return values * layer.blocks ** (-1 / (2 * BRANCH_LAYERS - 2)) if layer.in_block else values


def deepnorm(layer: Layer, generator: Generator) -> Tensor:
    """DeepNorm's (Wang et al. 2022, arXiv:2203.00555), to go with --skip deepnorm: Xavier normal of deviation gain * sqrt(2 / (fan in + fan out)).

    The gain is beta = (4L)^(-1/4) in pwconv1 and pwconv2, the paper's feed-forward layers, for L blocks, and 1 elsewhere. The paper's
    (8N)^(-1/4) is of an encoder of N layers, which has 2N branches where this network has L.
    """
    gain = (4 * layer.blocks) ** -0.25 if layer.in_block and not layer.name.endswith(".dwconv") else 1.0
    return _drawn(layer, gain * math.sqrt(2 / (layer.fan_in + layer.fan_out)), generator)


def orthogonal(layer: Layer, generator: Generator) -> Tensor:
    """Saxe et al. (arXiv:1312.6120): every group's rows or columns, the fewer, are orthonormal; drawn evenly among such matrices.

    In float64, so that what a processor or its number of threads change in the last bits is rounded off. A matrix (2048, 512) takes
    0.2 s on one core.
    """
    matrix = _drawn(layer, 1.0, generator, torch.float64)
    wide = layer.outputs < layer.fan_in
    q, r = torch.linalg.qr(matrix.mT if wide else matrix)
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]  # else the draw would lean to what the factorisation prefers
    return q.mT if wide else q


def delta_orthogonal(layer: Layer, generator: Generator) -> Tensor:
    """Xiao et al. (arXiv:1806.05393), algorithm 2: an orthogonal matrix at the kernel's centre, and 0 around it.

    Such a convolution keeps the norm of every image, with whatever padding, where it has no fewer channels out than in. A layer on
    patches, of which the centre would be a single pixel, is `orthogonal`.
    """
    if layer.on_patches:
        return orthogonal(layer, generator)
    return _centred(layer, orthogonal(dataclasses.replace(layer, area=1), generator))


def paired(layer: Layer, generator: Generator) -> Tensor:
    """For ConvNeXt's block without a skip: dwconv passes its input on, pwconv1 has orthonormal columns, and pwconv2 is its transpose.

    But for norm and activation the block is the identity. Of two independent orthogonal matrices C -> 4C -> C (arXiv:1312.6120) the
    second keeps a quarter of what the first gives it, each block another one, and what is left of any signal is 0 after some ten.
    """
    if layer.name.endswith(".dwconv"):
        return _centred(layer, torch.ones(layer.groups, layer.outputs, layer.inputs, dtype=torch.float64))
    return delta_orthogonal(layer, generator)


def mirrored(layer: Layer, generator: Generator) -> Tensor:
    """As `paired`, with half of pwconv1's units the negatives of the others ("looks linear", Balduzzi et al. 2017, arXiv:1702.08591).

    f(h) - f(-h) is h for ReLU, GELU and SiLU, so that with these the block is the identity but for its norm: Q^T (f(Qx) - f(-Qx)) = x.
    tanh is odd: with it the slope at 0 is 2.
    """
    if layer.name.endswith(".pwconv1"):
        half = orthogonal(dataclasses.replace(layer, outputs=layer.outputs // 2), generator)
        return torch.cat([half, -half], dim=1)
    return paired(layer, generator)


def _centred(layer: Layer, matrices: Tensor) -> Tensor:
    """(groups, out, in) at the centre of a kernel that is 0 elsewhere."""
    values = matrices.new_zeros(*matrices.shape, layer.area)
    values[..., layer.area // 2] = matrices
    return values.flatten(2)


def torch_default(layer: Layer, generator: Generator) -> Tensor:
    """torch's own of convolution and linear layers: uniform within 1 / sqrt(fan in), a variance of 1 / (3 fan in). Their biases are drawn from
    the same range."""
    return _uniform(layer.shape, layer.fan_in, generator)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: Generator) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape, device="cpu", dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _drawn(layer: Layer, std: float, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(layer.shape, dtype=dtype, device="cpu").normal_(0.0, std, generator=generator)


Init = Callable[[Layer, Generator], Tensor]
INITS: dict[str, Init] = {
    "normal": normal,
    "kaiming": kaiming,
    "orthogonal": orthogonal,
    "torch": torch_default,
    "delta-orthogonal": delta_orthogonal,
    "paired": paired,
    "mirrored": mirrored,
    "fixup": fixup,
    "deepnorm": deepnorm,
}
TRANSPOSED = (paired, mirrored)  # their pwconv2 is their pwconv1, transposed
# (sigma_w^2, sigma_b^2) at which neither signal nor gradient grows or shrinks with depth in a network of convolutions and activations alone, with
# weights sigma_w times orthogonal ones: a point of tanh's critical line (Xiao et al., arXiv:1806.05393), and ReLU's only one.
CRITICAL = {"tanh": (1.05, 2.01e-5), "relu": (2.0, 0.0)}


def sigmas(model: ModelConfig) -> tuple[float, float]:
    """(sigma_w, sigma_b): what weights are multiplied by, and the deviation of the biases."""
    critical = model.model == "plain" and model.init == "delta-orthogonal"
    w, b = (math.sqrt(value) for value in (CRITICAL.get(model.activation, (1.0, 0.0)) if critical else (1.0, 0.0)))
    return w if model.sigma_w is None else model.sigma_w, b if model.sigma_b is None else model.sigma_b


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1


def _generator(seed: int, name: str) -> Generator:
    return torch.Generator().manual_seed(seed_of(seed, name))


@torch.no_grad()
def fill_all(parameters: Iterable[tuple[str, Tensor]], seed: int, model: ModelConfig) -> None:
    """Writes the initial values of (name in the plain network, parameter) pairs, of which a layer's weight comes before its bias."""
    fan_in: dict[str, int] = {}
    for name, parameter in parameters:
        owner, _, kind = name.rpartition(".")
        if kind == "weight" and parameter.ndim > 1:
            fan_in[owner] = parameter[0].numel()
        fill(parameter, name, seed, model, fan_in.get(owner))


@torch.no_grad()
def fill(parameter: Tensor, name: str, seed: int, model: ModelConfig, fan_in: int | None = None) -> None:
    """Writes the initial value of the plain network's parameter `name` into `parameter`, whatever its device or shape.

    `fan_in`: inputs of an output of the layer that a bias belongs to; None for a norm's.

    The values are drawn on the CPU in the parameter's memory order of the plain network, of which `parameter` may be a reshaped
    view, and rounded to float32.
    """
    owner, _, kind = name.rpartition(".")
    if kind == "gamma":
        assert model.gamma_init is not None
        parameter.fill_(model.gamma_init)
    elif kind == "bias":
        parameter.zero_()
        if model.init == "torch" and fan_in is not None:
            parameter.copy_(_uniform(parameter.shape, fan_in, _generator(seed, name)))
        elif fan_in is not None and (deviation := sigmas(model)[1]):
            values = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
            parameter.copy_(values.normal_(0.0, deviation, generator=_generator(seed, name)))
    elif owner.endswith("norm"):
        parameter.fill_(1.0)
    else:
        groups = parameter.shape[0] if owner.endswith("dwconv") else 1
        area = parameter.shape[2:].numel()
        layer = Layer(owner, groups, parameter.shape[0] // groups, parameter[0].numel() // area, area, sum(model.stage_blocks))
        init = functools.partial(normal, std=model.init_std) if model.init == "normal" else INITS[model.init]
        values = _weights(layer, seed, init)
        scale = sigmas(model)[0]
        parameter.copy_((values if scale == 1.0 else scale * values).float().reshape(parameter.shape))


def _weights(layer: Layer, seed: int, init: Init) -> Tensor:
    if init in TRANSPOSED and layer.name.endswith(".pwconv2"):
        twin = dataclasses.replace(layer, name=f"{layer.name[:-1]}1", outputs=layer.inputs, inputs=layer.outputs)
        return _weights(twin, seed, init).mT
    return init(layer, _generator(seed, f"{layer.name}.weight"))
