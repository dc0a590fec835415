"""Placement groups as programs state them: what is wrong is an error at once, and who ends up in which group."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import shoal
from shoal.actor_options import check_actor, resolve_actor
from shoal.options import check, resolve
from shoal.placement import place
from shoal.util import placement_group, remove_placement_group
from shoal.util.placement_group import PlacementGroup, PlacementGroupID, get_placement_group, placement_group_table
from shoal.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from shoal.util.state import get_placement_group as get_row
from shoal_core.protocol.ids import PlacementGroupId
from shoal_core.protocol.placement import DEFAULT, SPREAD, Bundle
from shoal_core.protocol.records import InGroup

GROUP_ID = PlacementGroupId("a" * 32)
OTHER_ID = PlacementGroupId("b" * 32)
GROUP = PlacementGroup(GROUP_ID, [{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}])
OTHER = PlacementGroup(OTHER_ID, [{"GPU": 1.0}])
CAPTURING = InGroup(GROUP_ID, captures=True)
NOT_CAPTURING = InGroup(GROUP_ID, captures=False)


@pytest.fixture(autouse=True)
def bundles_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the bundles of a group is told those of ours."""
    known = {group.id: tuple(group.bundle_specs) for group in (GROUP, OTHER)}
    monkeypatch.setattr("shoal.placement_groups._specs_of", lambda group: known[PlacementGroupID(group)])


# ------------------------------------------------------------------------------- making


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"bundles": {"CPU": 1}}, "must be a list, got <class 'dict'>"),
        ({"bundles": []}, "Got an empty list"),
        ({"bundles": [{"CPU": 1}] * 5000}, "at most 4,096 bundles, got 5,000"),
        ({"bundles": ["CPU"]}, r"Got 'CPU' as bundles\[0\]"),
        ({"bundles": [{"CPU": 1}, {1: 1}]}, r"Got \{1: 1\} as bundles\[1\]"),
        ({"bundles": [{"CPU": "1"}]}, r"bundles\[0\]\['CPU'\] is str"),
        ({"bundles": [{"CPU": True}]}, r"bundles\[0\]\['CPU'\] is bool"),
        ({"bundles": [{"CPU": -1}]}, r"bundles\[0\]\['CPU'\] is wrong: .* not be negative"),
        ({"bundles": [{"GPU": 1.5}]}, r"bundles\[0\]\['GPU'\] is 1.5; above 1"),
        ({"bundles": [{"CPU": 1}, {"\udc80": 1}]}, r"bundles\[1\] is .*cannot be sent"),
        ({"bundles": [{}]}, "cannot be an empty dictionary"),
        ({"bundles": [{"CPU": 0}]}, "only 0 values"),
        ({"bundles": [{"object_store_memory": 1}]}, r"bundles\[0\] cannot reserve object_store_memory"),
        ({"strategy": "TIGHT"}, r"Invalid placement group strategy 'TIGHT'.*STRICT_SPREAD"),
        ({"lifetime": "for ever"}, "must be either `None` or 'detached', got 'for ever'"),
        ({"bundle_label_selector": [{"zone": "a"}] * 2}, "should equal the length of `bundles`"),
        ({"bundle_label_selector": {"zone": "a"}}, "should equal the length of `bundles`"),
        ({"bundle_label_selector": [{"zone": "in()"}]}, r"bundle_label_selector\[0\]"),
        ({"_soft_target_node_id": "a" * 16}, "only works with STRICT_PACK but got PACK"),
        ({"_soft_target_node_id": "node", "strategy": "STRICT_PACK"}, "lower-case hex of a node's id"),
    ],
)
def test_what_cannot_be_a_group_is_a_value_error_that_names_it(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        placement_group(**{"bundles": [{"CPU": 1}], **arguments})
    assert not shoal.is_initialized()


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: placement_group([{"CPU": 1}], name=1), TypeError, "name of a placement group"),  # type: ignore[arg-type]
        (lambda: placement_group([{"CPU": 1}], bundle_label_selector=[1]), TypeError, r"selector\[0\]"),  # type: ignore[list-item]
        (lambda: get_placement_group(""), ValueError, "non-empty value to get_placement_group"),
        (lambda: get_placement_group(1), ValueError, "non-empty value to get_placement_group"),  # type: ignore[arg-type]
        (lambda: remove_placement_group(None), TypeError, "PlacementGroup is needed, got NoneType"),  # type: ignore[arg-type]
        (lambda: placement_group_table("a"), TypeError, "PlacementGroup is needed, got str"),  # type: ignore[arg-type]
        (lambda: remove_placement_group(PlacementGroup.empty()), ValueError, "is empty"),
        (lambda: PlacementGroup("a b"), ValueError, "hex digits, got 'a b'"),
        (lambda: GROUP.wait(-1), ValueError, "timeout_seconds must not be negative"),
        (lambda: GROUP.wait("1"), TypeError, "timeout_seconds must be a number, got str"),  # type: ignore[arg-type]
        (lambda: PlacementGroupID.from_hex("ab"), ValueError, "has 16 bytes, got 1"),
    ],
)
def test_what_is_wrong_is_named_before_a_cluster_is_asked(call: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        call()
    assert not shoal.is_initialized()


def test_a_group_is_what_its_id_says() -> None:
    same = pickle.loads(pickle.dumps(GROUP))
    assert same == GROUP != OTHER
    assert {same, GROUP, OTHER} == {GROUP, OTHER}
    assert (same.bundle_specs, same.bundle_count) == ([{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}], 2)
    assert PlacementGroup(GROUP.id).bundle_specs == GROUP.bundle_specs
    assert repr(GROUP) == f"PlacementGroup({GROUP_ID})"
    assert (GROUP.id.hex(), GROUP.id.binary()) == (GROUP_ID, bytes.fromhex(GROUP_ID))
    assert PlacementGroupID.from_hex(GROUP_ID) == GROUP.id
    assert PlacementGroup.empty().is_empty
    assert not GROUP.is_empty
    assert PlacementGroupID.nil().is_nil()
    assert PlacementGroup.empty().bundle_specs == []


# ------------------------------------------------------------------------------- placing


def placed(inside: InGroup | None = None, **options: Any) -> tuple[Bundle, InGroup] | None:
    """Return where a task goes that is submitted ``inside`` with these options; an actor of one CPU goes there too."""
    check(options)
    check_actor(options)
    where = place(resolve(options, "f").group, inside, "f()", {"CPU": 1})
    assert place(resolve_actor(options).group, inside, "A", {}, {"CPU": 1}) == where
    return where


def strategy(*arguments: Any) -> dict[str, Any]:
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(*arguments)}


def test_a_task_goes_where_its_strategy_says() -> None:
    assert placed(**strategy(GROUP)) == (Bundle(GROUP_ID), NOT_CAPTURING)
    assert placed(**strategy(GROUP, 1)) == (Bundle(GROUP_ID, 1), NOT_CAPTURING)
    assert placed(**strategy(GROUP, 1, True)) == (Bundle(GROUP_ID, 1), CAPTURING)
    assert placed(**strategy(None)) is None
    assert placed(**strategy(PlacementGroup.empty())) is None
    assert placed() is None
    assert repr(strategy(GROUP, 1)["scheduling_strategy"]) == f"PlacementGroupSchedulingStrategy({GROUP!r}, 1, None)"


def test_the_options_of_old_mean_the_same() -> None:
    assert placed(placement_group=GROUP) == (Bundle(GROUP_ID), NOT_CAPTURING)
    assert placed(placement_group=GROUP, placement_group_bundle_index=0) == (Bundle(GROUP_ID, 0), NOT_CAPTURING)
    assert placed(placement_group=GROUP, placement_group_capture_child_tasks=True) == (Bundle(GROUP_ID), CAPTURING)
    assert placed(placement_group="default", placement_group_bundle_index=None) is None
    assert placed(placement_group=None) is None
    assert resolve({"placement_group": GROUP}, "f").scheduling_class.strategy is DEFAULT


def test_children_go_into_the_group_of_whoever_captures_them() -> None:
    assert placed(CAPTURING) == (Bundle(GROUP_ID), CAPTURING)
    assert placed(CAPTURING, placement_group_bundle_index=1) == (Bundle(GROUP_ID, 1), CAPTURING)
    assert placed(NOT_CAPTURING) is None
    assert placed(NOT_CAPTURING, placement_group_capture_child_tasks=True) == (Bundle(GROUP_ID), CAPTURING)
    assert placed(CAPTURING, placement_group_capture_child_tasks=False) is None


def test_children_that_say_otherwise_do_not() -> None:
    assert placed(CAPTURING, placement_group=None) is None
    assert placed(CAPTURING, **strategy(None)) is None
    assert placed(CAPTURING, scheduling_strategy="DEFAULT") is None
    assert placed(CAPTURING, label_selector={"zone": "a"}) is None
    assert resolve({"scheduling_strategy": "SPREAD"}, "f").scheduling_class.strategy is SPREAD


def test_whether_a_child_captures_in_turn_is_as_for_its_parent_unless_it_says_so() -> None:
    inside = InGroup(OTHER_ID, captures=True)
    assert placed(inside, **strategy(GROUP)) == (Bundle(GROUP_ID), CAPTURING)
    assert placed(inside, **strategy(GROUP, -1, False)) == (Bundle(GROUP_ID), NOT_CAPTURING)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"placement_group": "g"}, ValueError, "placement_group is 'g'"),
        ({"placement_group": 1}, TypeError, "placement_group must be a PlacementGroup or None, got int"),
        ({"placement_group_bundle_index": "1"}, TypeError, "bundle_index must be an int, got str"),
        ({"placement_group_bundle_index": -2}, ValueError, "at least -1"),
        ({"placement_group_capture_child_tasks": 1}, TypeError, "capture_child_tasks must be a bool"),
        ({"placement_group": GROUP, "scheduling_strategy": "SPREAD"}, ValueError, "do not go together"),
        ({"placement_group": GROUP, **strategy(GROUP)}, ValueError, "do not go together"),
        ({"placement_group": GROUP, "label_selector": {"a": "b"}}, ValueError, "label_selector and fallback_strategy"),
        ({**strategy(GROUP), "label_selector": {"a": "b"}}, ValueError, "label_selector and fallback_strategy"),
        ({"scheduling_strategy": "SPREAD", "placement_group_bundle_index": 1}, ValueError, "index must be -1"),
        ({"placement_group": None, "placement_group_bundle_index": 1}, ValueError, "index must be -1"),
        ({**strategy(None, 1)}, ValueError, "index must be -1"),
    ],
)
def test_options_that_are_wrong_or_do_not_go_together(
    options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        shoal.remote(**options)(lambda: None)
    with pytest.raises(error, match=names):
        shoal.remote(**options)(type("A", (), {}))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(("g",), TypeError), ((GROUP, 0.5), TypeError), ((GROUP, -2), ValueError), ((GROUP, 0, "yes"), TypeError)],
)
def test_a_wrong_strategy_is_an_error(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error, match="placement_group"):
        PlacementGroupSchedulingStrategy(*arguments)


def test_a_bundle_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"bundle index 2 is invalid. Valid placement group indexes: 0-1"):
        placed(**strategy(GROUP, 2))
    with pytest.raises(ValueError, match="index must be -1"):
        placed(placement_group_bundle_index=0)


def test_what_no_bundle_can_hold_is_an_error() -> None:
    def task(resources: dict[str, float], *arguments: Any) -> object:
        return place(resolve(strategy(*arguments), "f").group, None, "f()", resources)

    assert task({"CPU": 2}, GROUP, 0)
    assert task({"CPU": 1, "GPU": 0.5}, GROUP)
    assert task({}, OTHER)
    with pytest.raises(ValueError, match=r"Cannot schedule f\(\) .*\{'CPU': 3\} cannot fit into any bundles"):
        task({"CPU": 3}, GROUP)
    with pytest.raises(ValueError, match=r"\{'CPU': 2, 'GPU': 1\} cannot fit"):
        task({"CPU": 2, "GPU": 1}, GROUP)
    with pytest.raises(ValueError, match=r"cannot fit into bundle 1, \{'CPU': 1.0, 'GPU': 1.0\}"):
        task({"CPU": 2}, GROUP, 1)
    with pytest.raises(ValueError, match=r"Cannot schedule A .*requires 1 CPU for creation.*with CPU resources"):
        place(resolve_actor(strategy(OTHER)).group, None, "A", {"GPU": 1}, {"CPU": 1, "GPU": 1})


def test_rows_are_asked_for_by_a_whole_id() -> None:
    with pytest.raises(ValueError, match="timeout must be positive"):
        get_row(GROUP_ID, timeout=0)
