"""The steps that are recorded: always the first and the last, dense early, never more than the record holds."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepscale.gradflow.schedule import FEWEST, UNMEASURED, record_steps

TOTALS = st.one_of(st.integers(1, 60), st.integers(1, 10**6))
EVERY = st.one_of(st.just("auto"), st.integers(1, 1000))


@given(TOTALS, EVERY, st.integers(2, 300))
def test_first_and_last_ascending_within_capacity(total: int, every: int | str, capacity: int) -> None:
    """Of any run: ascending steps from 1 to the last, at most `capacity`, and thinned only where more were wanted."""
    schedule = record_steps(total, every, capacity)
    steps = schedule.steps
    assert (steps[0], steps[-1]) == (1, total)
    assert list(steps) == sorted(set(steps))
    assert len(steps) <= capacity
    unlimited = record_steps(total, every, 10**6 + 1)
    assert not unlimited.thinned
    assert set(steps) <= set(unlimited.steps)
    assert schedule.thinned == (len(unlimited.steps) > capacity)
    if schedule.thinned:
        assert len(steps) == capacity


@given(st.integers(UNMEASURED + 1, 10**5), EVERY, st.integers(UNMEASURED + 1, 300))
def test_recorded_steps_stay(total: int, every: int | str, capacity: int) -> None:
    """A run whose length is measured: the steps that were recorded before are kept, and else it is as if it had been known."""
    first = record_steps(None, every, capacity).steps
    assert first == (1, 2, 3)
    steps = record_steps(total, every, capacity, recorded=first).steps
    assert steps[: len(first)] == first
    assert steps[-1] == total
    assert len(steps) <= capacity
    unlimited = record_steps(total, every, 10**6)
    assert set(record_steps(total, every, 10**6, recorded=first).steps) == {*first, *unlimited.steps}


@given(TOTALS)
def test_auto_is_dense_early_and_has_enough(total: int) -> None:
    """By powers: gaps never shrink by more than rounding, 12 records of a run with so many steps, 10 in every decade of steps."""
    steps = record_steps(total, "auto", 10**6).steps
    assert len(steps) >= min(total, FEWEST)
    assert all(after / before < 1.6 for before, after in pairwise(steps[2:]))
    decades = [sum(low <= step < 10 * low for step in steps) for low in (10, 100, 1000, 10_000) if 10 * low <= total]
    assert decades == [10, 25, 25, 25][: len(decades)]


@given(st.integers(1, 10**4), st.integers(1, 500))
def test_every_is_its_multiples(total: int, every: int) -> None:
    """Every N against its definition."""
    assert record_steps(total, every, 10**6).steps == tuple(sorted({1, *range(every, total + 1, every), total}))


@pytest.mark.parametrize(("total", "count"), [(1, 1), (2, 2), (12, 12), (13, 12), (100, 18), (1000, 43), (351 * 100, 82), (10**6, 118)])
def test_counts(total: int, count: int) -> None:
    """The numbers that the module's docstring and the README give: 50 to 200 in a long run."""
    assert len(record_steps(total, "auto", 200).steps) == count


def test_thinning_is_even() -> None:
    """Every step of 1,000 with room for 101: gaps that differ by at most one."""
    schedule = record_steps(1000, 1, 101)
    gaps = {after - before for before, after in pairwise(schedule.steps)}
    assert schedule.thinned
    assert gaps <= {9, 10, 11}


def test_none_and_too_little_room() -> None:
    """0 records nothing, known length or not; a capacity without room for the last step is refused."""
    assert record_steps(100, 0, 200).steps == record_steps(None, 0, 200).steps == ()
    assert record_steps(3, "auto", 3, recorded=(1, 2, 3)).steps == (1, 2, 3)
    with pytest.raises(ValueError, match="3 records do not hold 3 recorded steps and the last"):
        record_steps(100, "auto", 3, recorded=(1, 2, 3))
