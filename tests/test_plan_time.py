"""Seconds of a step, on clocks that the tests wind, and FLOPs against torch's own count."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepscale import plan_time
from deepscale.activations import policy_of
from deepscale.bench.networks import configuration
from deepscale.config import Config
from deepscale.models.convnext import ConvNeXt, count_parameters
from deepscale.models.reference import PlainConvNeXt
from deepscale.plan_network import Images, flops_of, images_of
from deepscale.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SMALL: dict[str, Any] = {
    "width": 4,
    "patch_size": 2,
    "batch_size": 4,
    "stack_size": 2,
    "zero": 0,
    "offload": "none",
    "precision": "fp32",
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def fresh_rates() -> Iterator[None]:
    """Rates are measured once per process: not on one test's clock for another."""
    plan_time._rates.cache_clear()
    yield
    plan_time._rates.cache_clear()


def images(settings: Config, ranks: int = 1) -> Images:
    return images_of(settings, ranks, 3, 32, 10)


def test_a_step_is_measured_with_real_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that adds a second per reading: one for every block, for stem, downsamplings and head, in every micro batch; and one update."""
    fixed = SMALL | {"engine": "torch", "precision": "bf16", "activations": "recompute", "segment": 4, "batch_size": 8}
    assert 0 < plan_time.measure_step_s(Config().replace(**fixed), ALONE, images(Config().replace(**fixed))) < 60
    readings = itertools.count()
    monkeypatch.setattr(plan_time.time, "perf_counter", lambda: float(next(readings)))
    plan_time._rates.cache_clear()
    for norm in ("layernorm", "batchnorm"):
        settings = Config().replace(**fixed, norm=norm, sync_batchnorm=norm == "batchnorm", blocks=(1, 2, 30, 4))
        update = count_parameters(settings.model) / plan_time.RATE_ELEMENTS
        assert plan_time.measure_step_s(settings, ALONE, images(settings)) == pytest.approx(37 + 5 + update)
        accumulated = settings.replace(accumulation=4)
        assert plan_time.measure_step_s(accumulated, ALONE, images(accumulated)) == pytest.approx(4 * 42 + update)


def test_deepspeed_takes_longer_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that stands still but for updates: the parts of a step that hang on parameters and tensors alone."""
    monkeypatch.setattr(plan_time, "_median_s", lambda run, world, runs=1: 1e-9)
    seconds = []
    for engine, zero in (("torch", 0), ("deepspeed", 0), ("deepspeed", 2), ("deepspeed", 3)):
        settings = Config().replace(**SMALL | {"engine": engine, "zero": zero}, activations="keep", segment=None, blocks=(1, 1, 5, 1))
        seconds.append(plan_time.measure_step_s(settings, ALONE, images(settings)))
    assert seconds[0] < min(seconds[1:])


def test_no_rank_waits_for_another_while_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may measure different candidates: synchronised statistics would mix them up, or hang."""
    settings = Config().replace(**SMALL | {"zero": 1, "batch_size": 8}, activations="keep", segment=None, norm="batchnorm", sync_batchnorm=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "all_reduce", lambda *given, **named: pytest.fail("a collective"))
        assert plan_time.measure_step_s(settings, World(0, 2, 0, 2, torch.device("cpu")), images(settings, 2)) > 0


def _convolution_backward(grad: Any, x: Any, weight: Any, *others: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of the gradients on input and weight. torch's own formula counts a depthwise convolution's weight gradient C times."""
    asked = others[-1][:2]
    return sum(asked) * 2 * math.prod(grad) * math.prod(weight[1:])


def counted(model: torch.nn.Module, batch: int) -> tuple[int, int]:
    """(forward, backward) FLOPs of a training pass, counted by torch as its operators run."""
    corrected = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.randn(batch, 3, 32, 32)).sum()
    with FlopCounterMode(display=False, custom_mapping=corrected) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


POLICIES: list[tuple[str, int | None]] = [("keep", None), ("selective", None), ("recompute", 1), ("recompute", 2), ("recompute", 3), ("offload", 2)]
POLICIES += [("revolve", 1), ("revolve", 2)]


@pytest.mark.parametrize(("policy", "segment"), POLICIES)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
def test_flops_are_those_that_torch_counts(policy: str, segment: int | None, norm: str) -> None:
    """A whole network, forward, backward and what is computed again, against FlopCounterMode, to the last one."""
    settings = configuration(depth=44, width=4, batch_size=3, engine="torch").replace(norm=norm, activations=policy, segment=segment)
    settings = settings.replace(patch_size=2, stack_size=4)
    found = flops_of(settings, 1, 3, 32, 10)
    assert sum(counted(policy_of(settings).apply(ConvNeXt(settings.model, stack_size=4)).initialise(0), 3)) == found.total
    assert (found.again > 0) is (policy != "keep")


def test_flops_of_the_plain_network_are_the_same_but_for_the_row_means() -> None:
    """Without a norm there are none: the published network takes what the formula says, forward and backward apart."""
    settings = configuration(depth=26, width=4, batch_size=2, segment=0, engine="torch").replace(norm="none")
    found = flops_of(settings, 1, 3, 32, 10)
    assert (found.forward, found.backward) == counted(PlainConvNeXt(settings.model).initialise(0), 2)
    assert found.again == 0
