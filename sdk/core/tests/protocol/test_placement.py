"""What is said of where a lease may be placed: as values, as JSON, and as conditions that labels meet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.errors import InvalidRequestError
from shoal_core.protocol.ids import PlacementGroupId
from shoal_core.protocol.placement import (
    DEFAULT,
    SPREAD,
    Bundle,
    Condition,
    Default,
    NodeAffinity,
    NodeLabels,
    Operator,
    Selected,
    Spread,
    Strategy,
    all_met,
)
from shoal_core.protocol.scheduling import DemandEntry
from shoal_core.protocol.wire import decode, encode
from shoal_core.testing.builders import node_id

WORDS = st.text(max_size=8)
CONDITIONS = st.builds(
    Condition, WORDS, st.sampled_from(Operator), st.lists(WORDS, max_size=3).map(lambda values: tuple(values))
)
SELECTORS = st.lists(CONDITIONS, max_size=3).map(lambda conditions: tuple(conditions))
STRATEGIES: st.SearchStrategy[Strategy] = st.one_of(
    st.just(DEFAULT),
    st.just(SPREAD),
    st.builds(NodeAffinity, st.integers(0, 9).map(node_id), st.booleans(), st.booleans(), st.booleans()),
    st.builds(NodeLabels, SELECTORS, SELECTORS),
    st.builds(Selected, st.lists(SELECTORS, min_size=1, max_size=3).map(lambda all_of: tuple(all_of)), st.booleans()),
    st.builds(Bundle, WORDS.map(PlacementGroupId), st.integers(-1, 9)),
)


def entry(strategy: Strategy) -> DemandEntry:
    return DemandEntry(key=1, name="f", resources={}, strategy=strategy, wanted=1, slots=[])


@given(STRATEGIES)
def test_a_strategy_comes_back_as_it_was_and_serves_as_a_key(strategy: Strategy) -> None:
    back = decode(DemandEntry, encode(entry(strategy))).strategy
    assert back == strategy
    assert {strategy: 1}[back] == 1


def test_strategies_that_say_different_things_differ() -> None:
    assert Default() == DEFAULT
    assert Spread() == SPREAD
    assert len({*map(hash, (DEFAULT, SPREAD))}) == 2
    assert NodeAffinity(node_id(1), True) != NodeAffinity(node_id(1), False) != NodeAffinity(node_id(2), False)
    assert Bundle(PlacementGroupId("a")) == Bundle(PlacementGroupId("a"), -1) != Bundle(PlacementGroupId("a"), 0)


@pytest.mark.parametrize("wrong", ['"SPREAD"', "{}", '{"kind":"nearby"}', '{"kind":"spread","more":1}'])
def test_what_is_no_strategy_is_refused(wrong: str) -> None:
    data = encode(entry(SPREAD)).replace(b'{"kind":"spread"}', wrong.encode())
    with pytest.raises(InvalidRequestError, match="strategy"):
        decode(DemandEntry, data)


@pytest.mark.parametrize(
    ("operator", "values", "same", "other", "none"),
    [
        (Operator.IN, ("a", "b"), True, False, False),
        (Operator.NOT_IN, ("a", "b"), False, True, True),
        (Operator.EXISTS, (), True, True, False),
        (Operator.DOES_NOT_EXIST, (), False, False, True),
    ],
)
def test_a_condition_looks_at_one_label(
    operator: Operator, values: tuple[str, ...], same: bool, other: bool, none: bool
) -> None:
    condition = Condition("zone", operator, values)
    assert condition.met_by({"zone": "a", "more": "c"}) is same
    assert condition.met_by({"zone": "c"}) is other
    assert condition.met_by({"more": "a"}) is none
    assert all_met((), {})
    assert all_met((condition, Condition("more", Operator.EXISTS)), {"zone": "a", "more": "c"}) is same
