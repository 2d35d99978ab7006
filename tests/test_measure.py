"""What a record measures of a tensor, against loops over its elements in Python's own numbers, however the tensor is cut up."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepscale.engine import Share
from deepscale.gradflow.measure import Measured, rows_of

FIELDS = ("mean_abs", "l2", "max_abs", "zeros", "nonfinite", "weight_l2")
RTOL = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-6, torch.float16: 1e-6}  # low precision is summed in float32


# ----------------------------------------------------------------------------------------------------------------- rows_of


@settings(max_examples=300, deadline=None)
@given(start=st.integers(0, 60), size=st.integers(1, 12), length=st.integers(0, 60))
def test_every_element_is_in_one_part_and_in_its_row(start: int, size: int, length: int) -> None:
    """Any part of a tensor: each element once, in order, in the row that its place in the whole tensor says; at most three parts, no copy."""
    values = torch.arange(start, start + length)
    parts = list(rows_of(values, start, size))
    found = [(first + r, int(value)) for first, part in parts for r, row in enumerate(part) for value in row]
    assert found == [(place // size, place) for place in range(start, start + length)]
    assert len(parts) <= 3
    for first, part in parts:
        assert part.ndim == 2 and part.numel()
        assert part.untyped_storage().data_ptr() == values.untyped_storage().data_ptr(), first


# ---------------------------------------------------------------------------------------------------------------- Measured


def plain(gradient: Tensor, weight: Tensor, size: int) -> dict[str, list[float]]:
    """The fields of rows of `size` elements, by loops over floats."""
    found: dict[str, list[float]] = {name: [] for name in FIELDS}
    for g, w in zip(gradient.view(-1, size).tolist(), weight.view(-1, size).tolist(), strict=True):
        magnitudes = [abs(value) for value in g]
        found["mean_abs"].append(sum(magnitudes) / size)
        found["l2"].append(math.sqrt(sum(value * value for value in g)))
        found["max_abs"].append(math.nan if any(map(math.isnan, g)) else max(magnitudes))
        found["zeros"].append(sum(value == 0 for value in g) / size)
        found["nonfinite"].append(sum(not math.isfinite(value) for value in g) / size)
        found["weight_l2"].append(math.sqrt(sum(value * value for value in w)))
    return found


def measured(gradient: Tensor, weight: Tensor, size: int, cuts: Sequence[int] = ()) -> dict[str, list[float]]:
    """The fields of the rows as layers 1, 3, 5 ... of a record; with `cuts`, as ranks do whose shares end there, added up at the end."""
    rows = gradient.numel() // size
    layers = torch.arange(rows) * 2 + 1
    ranks = []
    for start, end in pairwise([0, *cuts, gradient.numel()]):
        ranks.append(Measured(2 * rows + 1, torch.device("cpu")))
        ranks[-1].gradient(layers, Share(start, gradient[start:end], weight[start:end]), size)
    total, *others = ranks
    for other in others:
        total.sums += other.sums
        total.top = torch.maximum(total.top, other.top)
    fields = total.fields()
    between = torch.ones(2 * rows + 1, dtype=torch.bool)
    between[layers] = False
    assert all(float(fields[name][between].abs().max()) == 0 for name in FIELDS), "layers of other parameters"
    return {name: fields[name][layers].tolist() for name in FIELDS}


def assert_equal(found: dict[str, list[float]], expected: dict[str, list[float]], rtol: float) -> None:
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=rtol, abs=0, nan_ok=True), name


def odd_values(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """Rows of ordinary values, of zeros among others, of zeros only, with NaN, with infinities of both signs, and with both."""
    values = torch.randn(rows, size, dtype=torch.float64)
    values[1, ::2] = 0
    values[2] = 0
    values[2, 1] = -0.0
    values[3, 1] = math.nan
    values[4, 1], values[4, 2] = math.inf, -math.inf
    values[5, 0], values[5, 1] = math.inf, math.nan
    return values.to(dtype).flatten()


@pytest.mark.parametrize("dtype", RTOL)
def test_ordinary_and_odd_values(dtype: torch.dtype) -> None:
    """Rows of both in one tensor, and of ordinary ones alone, which are summed faster."""
    odd, weight = odd_values(8, 5, dtype), torch.randn(40, dtype=torch.float64).to(dtype)
    expected = plain(odd, weight, 5)
    assert expected["zeros"][1:4] == [0.6, 1.0, 0.0] and expected["nonfinite"][3:6] == [0.2, 0.4, 0.4]
    for gradient in (odd, torch.randn(40, dtype=torch.float64).to(dtype)):
        assert_equal(measured(gradient, weight, 5), plain(gradient, weight, 5), RTOL[dtype])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, s) for s in (1e-42, 1e-40, 1e-30, 1e-20, 1e20, 1e30, 3e37)] + [(torch.float64, 1e-100)])
def test_vanished_and_exploded_gradients_have_their_norm(dtype: torch.dtype, scale: float, size: int) -> None:
    """Gradients and weights whose squares float32 does not hold, beside rows of ordinary size; 1e-42 has 10 bits left as it is given."""
    gradient = torch.randn(3, size, dtype=torch.float64)
    gradient[::2] *= scale
    values = gradient.to(dtype).flatten()
    expected = plain(values, values.flip(0), size)
    assert expected["l2"][0] / scale == pytest.approx(float(gradient[0].norm()) / scale, rel=0.05)
    assert_equal(measured(values, values.flip(0), size), expected, RTOL[dtype])


def test_long_rows_keep_their_precision() -> None:
    """4 million elements in one row, against float64: float32 would lose 1e-5 of the norm."""
    gradient = torch.rand(4_000_000) + 0.5
    found = measured(gradient, gradient, len(gradient))
    for name, value in (("l2", gradient.double().norm()), ("weight_l2", gradient.double().norm()), ("mean_abs", gradient.double().mean())):
        assert found[name] == pytest.approx([value.item()], rel=1e-6), name


def test_zeros_beside_vanished_values_are_told_apart() -> None:
    """The smallest float32 there is is no zero."""
    gradient = torch.tensor([0.0, 1e-45, 0.0, 0.0])
    found = measured(gradient, torch.ones(4), 2)
    assert found["zeros"] == [0.5, 1.0]
    assert found["l2"][0] == found["max_abs"][0] > 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_shares_add_up_to_the_whole(data: st.DataObject) -> None:
    """Any tensor with zeros, NaN and infinities, cut anywhere into the shares of 1 to 5 ranks, empty ones among them."""
    rows, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    elements = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, 3e30]) | st.floats(-10, 10, width=32)
    gradient = torch.tensor(data.draw(st.lists(elements, min_size=rows * size, max_size=rows * size)))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows * size), max_size=4)))
    weight = torch.linspace(-1, 2, rows * size)
    assert_equal(measured(gradient, weight, size, cuts), plain(gradient, weight, size), 1e-5)


@pytest.mark.parametrize("cuts", [(), (4, 9)])
@pytest.mark.parametrize("step", [1e-3, 1e-25])
def test_the_change_of_a_weight(cuts: tuple[int, ...], step: float) -> None:
    """Against the difference of two copies; a change of 1e-25 of a weight near 0 has its norm too."""
    before = torch.randn(12) * (0 if step < 1e-7 else 1)
    after = before + step * torch.randn(12)
    total = torch.zeros(4, dtype=torch.float64)
    for start, end in pairwise([0, *cuts, 12]):
        own = Measured(4, torch.device("cpu"))
        own.change(torch.arange(4), Share(start, torch.empty(0), after[start:end]), before[start:end], 3)
        total += own.change_square
    expected = (after.double() - before.double()).view(4, 3).norm(dim=1)
    assert total.sqrt().tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=0)


def test_a_parameters_rows_may_be_any_layers() -> None:
    """The layers of one parameter are given by number, in any order; those of another parameter stay as they are."""
    record = Measured(5, torch.device("cpu"))
    record.gradient(torch.tensor([3, 0]), Share(0, torch.tensor([1.0, -3.0, 0.0, 4.0]), torch.zeros(4)), 2)
    record.gradient(torch.tensor([4]), Share(0, torch.tensor([7.0]), torch.ones(1)), 1)
    fields = record.fields()
    assert fields["mean_abs"].tolist() == pytest.approx([2.0, 0, 0, 2.0, 7.0], rel=1e-6)
    assert fields["max_abs"].tolist() == [4.0, 0, 0, 3.0, 7.0]
    assert fields["weight_l2"].tolist() == [0, 0, 0, 0, 1.0]
