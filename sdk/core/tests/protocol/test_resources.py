"""The arithmetic of resources is exact."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal_core.protocol.resources import (
    UNIT,
    Resources,
    add,
    fits,
    from_units,
    subtract,
    to_amounts,
    to_resources,
    to_units,
)

NAMES = st.sampled_from(["CPU", "GPU", "memory", "special"])
UNITS = st.integers(1, 10**15)
RESOURCES = st.dictionaries(NAMES, UNITS)
SIGNED = st.dictionaries(NAMES, st.integers(-(10**15), 10**15).filter(bool))


@given(UNITS)
def test_units_come_back_from_what_users_see(units: int) -> None:
    assert to_units(from_units(units)) == units


@given(st.integers(0, 2**60))
def test_whole_amounts_are_exact_however_large(amount: int) -> None:
    assert to_units(amount) == amount * UNIT


@given(st.lists(st.integers(0, 10**9), max_size=50))
def test_sums_do_not_drift(parts: list[int]) -> None:
    total: Resources = {}
    for part in parts:
        total = add(total, to_resources({"CPU": part / UNIT}))
    assert total == ({"CPU": sum(parts)} if sum(parts) else {})


def test_ten_tenths_are_one() -> None:
    total: Resources = {}
    for _ in range(10):
        total = add(total, to_resources({"CPU": 0.1}))
    assert total == to_resources({"CPU": 1})
    assert fits(to_resources({"CPU": 1}), total)


@given(st.integers(1, 10 * UNIT), st.floats(0.2, 0.8))
def test_what_is_finer_than_a_unit_is_cut_off(units: int, part: float) -> None:
    assert to_units((units + part) / UNIT) == units


@given(st.floats(0.01, 0.99), st.integers(1, 10**12))
def test_what_is_finer_is_cut_off_however_large_the_amount(part: float, units: int) -> None:
    assert to_units((units + part) / UNIT) == units


@given(st.integers(1, UNIT))
def test_an_nth_fits_n_times(number: int) -> None:
    assert UNIT - number < number * to_units(1 / number) <= UNIT


@pytest.mark.parametrize("amount", [0.00009, 0.00001, 1e-9])
def test_what_is_less_than_a_unit_is_refused(amount: float) -> None:
    with pytest.raises(ValueError, match="must be 0 or at least"):
        to_units(amount)


@given(st.integers(1, UNIT), st.integers(1, 50))
def test_what_was_computed_may_be_off_by_its_rounding(units: int, times: int) -> None:
    assert to_units(times * (units / UNIT)) == times * units
    assert to_units(1 - units / UNIT) == UNIT - units


def test_sums_of_floats_may_be_off_by_their_rounding() -> None:
    assert to_units(0.1 + 0.2) == 3000
    assert to_units(0.3 - 0.2 - 0.1) == 0
    assert to_units(sum([0.1] * 10)) == UNIT


@pytest.mark.parametrize("amount", [math.inf, -math.inf, math.nan, 1e305])
def test_what_is_not_finite_is_refused(amount: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number"):
        to_units(amount)


@pytest.mark.parametrize("amount", [-1, -0.0001, -0.00001, -1e9])
def test_a_negative_amount_is_refused(amount: float) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        to_units(amount)


@given(RESOURCES)
def test_resources_come_back_from_what_users_see(resources: Resources) -> None:
    assert to_resources(to_amounts(resources)) == resources


@given(SIGNED, SIGNED)
def test_no_sum_and_no_difference_keeps_a_zero(left: Resources, right: Resources) -> None:
    for result in (add(left, right), subtract(left, right)):
        assert all(isinstance(units, int) and units for units in result.values())
    assert to_resources({"CPU": 0, "GPU": 0.0}) == {}


@given(SIGNED, SIGNED, SIGNED)
def test_addition_is_what_addition_is(one: Resources, two: Resources, three: Resources) -> None:
    assert add(one, two) == add(two, one)
    assert add(add(one, two), three) == add(one, add(two, three))
    assert add(one, {}) == one
    assert subtract(add(one, two), two) == one
    assert subtract(one, one) == {}


@given(SIGNED, SIGNED)
def test_what_was_given_is_left_as_it_was(left: Resources, right: Resources) -> None:
    before = dict(left), dict(right)
    add(left, right)
    subtract(left, right)
    assert (left, right) == before


@given(RESOURCES, RESOURCES)
def test_what_fits_can_be_taken_out_without_overdraft(wanted: Resources, free: Resources) -> None:
    assert fits(wanted, free) == all(units >= 0 for units in subtract(free, wanted).values())


@given(RESOURCES)
def test_everything_fits_into_itself_and_nothing_more(resources: Resources) -> None:
    assume(resources)
    assert fits(resources, resources)
    assert fits({}, resources)
    name = min(resources)
    assert not fits(add(resources, {name: 1}), resources)
    assert not fits(resources, {})
