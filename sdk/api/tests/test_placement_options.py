"""What the options of placement mean, alone and together, and what each strategy refuses."""

from __future__ import annotations

from typing import Any

import pytest

import shoal
from shoal.actor_options import check_actor, resolve_actor
from shoal.options import check, resolve
from shoal.util.scheduling_strategies import (
    DoesNotExist,
    Exists,
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
)
from shoal_core.protocol.placement import (
    DEFAULT,
    SPREAD,
    Condition,
    NodeAffinity,
    NodeLabels,
    Operator,
    Selected,
    Strategy,
)
from shoal_core.testing.builders import node_id

NODE = node_id(1)


def meaning(**options: Any) -> Strategy:
    """Return what options of placement mean, to a task as to an actor."""
    check(options)
    check_actor(options)
    strategy = resolve(options, "f").scheduling_class.strategy
    assert resolve_actor(options).strategy == strategy
    return strategy


def test_words() -> None:
    assert meaning() is DEFAULT
    assert meaning(scheduling_strategy="DEFAULT") is DEFAULT
    assert meaning(scheduling_strategy="SPREAD") is SPREAD
    assert meaning(scheduling_strategy=None, label_selector=None, fallback_strategy=None) is DEFAULT
    assert meaning(fallback_strategy=[]) is DEFAULT


def test_affinity_to_a_node() -> None:
    hard = NodeAffinitySchedulingStrategy(NODE, soft=False)
    assert meaning(scheduling_strategy=hard) == NodeAffinity(NODE, soft=False)
    assert meaning(scheduling_strategy=NodeAffinitySchedulingStrategy(NODE, True, _spill_on_unavailable=True)) == (
        NodeAffinity(NODE, soft=True, spill=True)
    )
    failing = NodeAffinitySchedulingStrategy(NODE, False, _fail_on_unavailable=True)
    strategy = resolve({"scheduling_strategy": failing}, "f").scheduling_class.strategy
    assert strategy == NodeAffinity(NODE, soft=False, fail=True)
    with pytest.raises(ValueError, match="_fail_on_unavailable"):
        resolve_actor({"scheduling_strategy": failing})
    assert (hard.node_id, hard.soft) == (NODE, False)
    assert repr(hard) == f"NodeAffinitySchedulingStrategy('{NODE}', soft=False)"


def test_a_node_may_be_named_by_anything_that_has_a_hex() -> None:
    assert NodeAffinitySchedulingStrategy(bytes.fromhex(NODE), soft=False).node_id == NODE  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ((1, False), TypeError, "node_id"),
        (("", False), ValueError, "node_id"),
        (("NODE", False), ValueError, "node_id"),
        ((NODE, "no"), TypeError, "soft"),
        ((NODE, True, 1), TypeError, "_spill_on_unavailable"),
        ((NODE, False, False, "no"), TypeError, "_fail_on_unavailable"),
        ((NODE, False, True), ValueError, "_spill_on_unavailable needs soft=True"),
        ((NODE, True, False, True), ValueError, "_fail_on_unavailable needs soft=False"),
    ],
)
def test_a_wrong_affinity_is_named(arguments: tuple[Any, ...], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        NodeAffinitySchedulingStrategy(*arguments)


def test_labels_of_nodes() -> None:
    strategy = NodeLabelSchedulingStrategy(
        {"a": In("1", "2"), "b": NotIn("3")}, soft={"c": Exists(), "d": DoesNotExist()}
    )
    assert meaning(scheduling_strategy=strategy) == NodeLabels(
        (Condition("a", Operator.IN, ("1", "2")), Condition("b", Operator.NOT_IN, ("3",))),
        (Condition("c", Operator.EXISTS), Condition("d", Operator.DOES_NOT_EXIST)),
    )
    assert meaning(scheduling_strategy=NodeLabelSchedulingStrategy({}, soft={"a": Exists()})) == NodeLabels(
        (), (Condition("a", Operator.EXISTS),)
    )
    assert In("a") == In("a") != NotIn("a")
    assert {Exists(), Exists()} == {Exists()}
    assert repr(strategy) == (
        "NodeLabelSchedulingStrategy({'a': In('1', '2'), 'b': NotIn('3')}, soft={'c': Exists(), 'd': DoesNotExist()})"
    )


@pytest.mark.parametrize(
    ("hard", "soft", "error", "names"),
    [
        ({}, None, ValueError, "cannot both be empty"),
        (None, {}, ValueError, "cannot both be empty"),
        ([("a", Exists())], None, TypeError, "hard must be a dict"),
        ({}, {"a": "b"}, ValueError, r"soft\['a'\]"),
        ({1: Exists()}, None, TypeError, "keys of type str"),
        ({"a b": Exists()}, None, ValueError, "key 'a b'"),
    ],
)
def test_wrong_labels_are_named(hard: Any, soft: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        NodeLabelSchedulingStrategy(hard, soft=soft)


@pytest.mark.parametrize("kind", [In, NotIn])
def test_a_match_of_values_has_some(kind: Any) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        kind()
    with pytest.raises(TypeError, match="type str"):
        kind("a", 1)
    with pytest.raises(ValueError, match="value 'a b'"):
        kind("a b")


def test_selectors_and_what_they_fall_back_to() -> None:
    a, b = Condition("zone", Operator.IN, ("a",)), Condition("zone", Operator.NOT_IN, ("b", "c"))
    assert meaning(label_selector={"zone": "a"}) == Selected(((a,),))
    assert meaning(label_selector={"zone": "a"}, scheduling_strategy="SPREAD") == Selected(((a,),), spread=True)
    fallback = [{"label_selector": {"zone": "!in(b,c)"}}, {"label_selector": {}}]
    assert meaning(label_selector={"zone": "a"}, fallback_strategy=fallback) == Selected(((a,), (b,), ()))
    assert meaning(fallback_strategy=fallback) == Selected(((), (b,), ()))


@pytest.mark.parametrize("option", [{"label_selector": {"a": "b"}}, {"fallback_strategy": [{"label_selector": {}}]}])
def test_a_selector_does_not_go_with_another_place(option: dict[str, Any]) -> None:
    strategy = NodeAffinitySchedulingStrategy(NODE, soft=False)
    with pytest.raises(ValueError, match="label_selector and fallback_strategy go with"):
        shoal.remote(scheduling_strategy=strategy, **option)(lambda: None)


def test_what_a_decorator_says_is_replaced_by_options() -> None:
    function: Any = shoal.remote(label_selector={"zone": "a"})(lambda: None)
    nothings: tuple[Any, ...] = ({}, None)
    for nothing in nothings:
        assert function.options(label_selector=nothing)._resolved.scheduling_class.strategy is DEFAULT
        elsewhere = function.options(label_selector=nothing, scheduling_strategy="SPREAD")
        assert elsewhere._resolved.scheduling_class.strategy is SPREAD
