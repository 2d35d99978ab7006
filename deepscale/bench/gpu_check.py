"""Whether a device computes rightly: the stacked network against the plain one in float64 on the CPU, every policy, the record, the engines.

An error is the largest relative difference over all parameters' gradients, |found - expected| / |expected| tensor by tensor, each layer's
for itself; a check is (what, error, tolerance). Tolerances are some ten times what a CPU shows; TF32 would exceed those of float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepscale.activations import POLICIES
from deepscale.bench.gpu_network import batch_on, exact, loss_of
from deepscale.bench.networks import CHANNELS, CLASSES, SEED, Training, random_batch
from deepscale.config import IN_SEGMENTS, Config
from deepscale.engine import build_engine
from deepscale.gradflow.recorder import Recorder
from deepscale.models.convnext import ConvNeXt
from deepscale.models.reference import PlainBlock, PlainConvNeXt
from deepscale.train import build_model
from deepscale.world import World

FP32 = 1e-4
BF16, BF16_LOSS, BF16_AGAIN = 0.1, 1e-2, 3e-2  # gradients and loss against float64; the same sums once more
IMAGES = 4
STEPS = 3


class Check(NamedTuple):
    """One comparison."""

    what: str
    error: float
    tolerance: float


class Reference(NamedTuple):
    """The plain network's in float64: loss, gradients by plain name, norms of the gradient at each block's output."""

    loss: float
    gradients: dict[str, Tensor]
    outputs: Tensor


def small(device: str, **values: Any) -> Config:
    """Eleven blocks in stacks of two, with gammas that let gradients through, and nothing left to the planner."""
    settings = Config().replace(
        blocks=(2, 2, 5, 2), width=16, patch_size=1, batch_size=IMAGES, layerscale_init=0.5, layerscale_shape="channel", stack_size=2,
        activations="keep", segment=None, engine="torch", zero=0, offload="none", precision="fp32", device=device, threads=1, workers=1, lr=1e-3,
    )  # fmt: skip
    return settings.replace(**values)


def with_policy(name: str) -> dict[str, Any]:
    """The settings of an activation policy; segments of two blocks where blocks are recomputed."""
    return {"activations": name, "segment": 2 if name in IN_SEGMENTS else None}


def network(settings: Config, place: World) -> ConvNeXt:
    """The network as training builds it, for the bench's images."""
    model = build_model(settings, _Images(CLASSES, CHANNELS, 32), place)  # type: ignore[arg-type]
    assert isinstance(model, ConvNeXt)
    return model


class _Images(NamedTuple):
    """What a network's shape depends on."""

    classes: int
    channels: int
    image_size: int


def reference() -> Reference:
    """The plain network in float64 on the CPU, by autograd throughout."""
    model = PlainConvNeXt(small("cpu").model, classes=CLASSES, channels=CHANNELS).initialise(SEED).double()
    outputs: list[Tensor] = []

    def keep(block: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for module in model.modules():
        if isinstance(module, PlainBlock):
            module.register_forward_hook(keep)
    images, labels = random_batch(IMAGES)
    loss = loss_of(model, images.double(), labels, "fp32")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(float(loss.detach()), gradients, torch.stack([output.grad.norm() for output in outputs if output.grad is not None]))


def gradients_of(model: ConvNeXt) -> dict[str, Tensor]:
    """Every layer's gradient by its name in the plain network, float64 on the CPU."""
    own = {name: parameter.grad.double().cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {plain: own[where.name] if where.index is None else own[where.name][where.index] for plain, where in model.plain_names()}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference, tensor by tensor; infinite where a value is not finite."""
    worst = max(float((found[name].flatten() - value.flatten()).norm() / value.norm().clamp_min(1e-30)) for name, value in expected.items())
    return worst if worst == worst else float("inf")


def check_network(place: World) -> tuple[list[Check], list[str]]:
    """Loss, gradients, policies and the record of the stacked network on this device. The expectation is the plain network's in float64.

    Also the policies that do not run at all, with the reason: the others are still worth measuring.
    """
    expected, device = reference(), place.device
    images, labels = batch_on(IMAGES, device)
    checks = []
    others = [name for name in POLICIES if name != "keep"]

    def passes(settings: Config, recorded: bool = False) -> tuple[float, dict[str, Tensor], Recorder | None]:
        model = network(settings, place)
        recorder = Recorder(model) if recorded else None
        if recorder is not None:
            recorder.begin(1)
        loss = loss_of(model, images, labels, settings.engine.precision)
        loss.backward()
        if recorder is not None:
            recorder.gradients()
        return float(loss.detach()), gradients_of(model), recorder

    with exact():
        loss, kept, recorder = passes(small(device.type), recorded=True)
        assert recorder is not None
        checks.append(Check("loss, float32", abs(loss - expected.loss) / expected.loss, FP32))
        checks.append(Check("gradients, float32", apart(kept, expected.gradients), FP32))
        checks += _check_record(recorder, expected)
    loss, low, _ = passes(small(device.type, precision="bf16"))
    checks.append(Check("loss, bf16 branches", abs(loss - expected.loss) / expected.loss, BF16_LOSS))
    checks.append(Check("gradients, bf16 branches", apart(low, expected.gradients), BF16))
    broken = []
    for name in others:
        try:
            with exact():
                again = passes(small(device.type, **with_policy(name)))[1]
            low_again = passes(small(device.type, precision="bf16", **with_policy(name)))[1]
        except RuntimeError as error:
            broken.append(f"--activations {name} does not run here: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
            continue
        checks.append(Check(f"gradients, {name}, against keep", apart(again, kept), FP32))
        checks.append(Check(f"gradients, bf16, {name}, against keep", apart(low_again, low), BF16_AGAIN))
    return checks, broken


def _check_record(recorder: Recorder, expected: Reference) -> list[Check]:
    """The record's norms of every layer's gradient, and of the gradient at every block's output."""
    flow = recorder.flow()
    norms = {name: expected.gradients[name].norm() for name in flow.layer_names.tolist()}
    layers = {name: torch.tensor(value).double() for name, value in zip(norms, flow.l2[0].tolist(), strict=True)}
    blocks = torch.from_numpy(flow.output_grad_l2[0]).double()
    return [
        Check(f"record, norms of {len(norms)} layers' gradients", apart(layers, norms), FP32),
        Check(f"record, gradient at {len(blocks)} blocks' outputs", apart({"": blocks}, {"": expected.outputs}), FP32),
    ]


def trained(settings: Config, place: World) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps, and the first step's gradients as the engine gives them."""
    model = network(settings, place)
    engine = build_engine(model, settings, place)
    training = Training(engine, place, batch_on(IMAGES, place.device))
    first: dict[str, Tensor] = {}
    note = training.note

    def noted(totals: Tensor) -> None:
        if not first:
            found = {name: engine.gradient(parameter) for name, parameter in model.named_parameters()}
            first.update({name: gradient.double().cpu() for name, gradient in found.items() if gradient is not None})
        note(totals)

    training.note = noted  # type: ignore[method-assign]
    for _ in range(STEPS):
        training.step()
    return training.losses, first


def check_engines(place: World) -> list[Check]:
    """A few steps through DeepSpeed, ZeRO 2 with and without offload, against plain torch."""
    checks = []
    with exact():
        for precision, tolerance in (("fp32", FP32), ("bf16", BF16_AGAIN)):
            losses, gradients = trained(small(place.device.type, precision=precision), place)
            for offload in ("none", "cpu"):
                settings = small(place.device.type, engine="deepspeed", zero=2, offload=offload, precision=precision, **with_policy("recompute"))
                found, first = trained(settings, place)
                name = f"ZeRO 2{', offloaded' if offload == 'cpu' else ''}, {precision}, against torch"
                checks.append(Check(f"gradients, {name}", apart(first, gradients), tolerance))
                worst = max(abs(a - b) / b for a, b in zip(found, losses, strict=True))
                checks.append(Check(f"losses of {STEPS} steps, {name}", worst, tolerance))
    return checks
