"""Placement groups: resources of several nodes, reserved together for the tasks and actors of a program.

Programs import them from ``shoal.util`` and ``shoal.util.placement_group``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from shoal.amounts import check_amount, check_sendable
from shoal.session import runtime
from shoal_core.protocol.errors import BusError, NotFoundError
from shoal_core.protocol.groups import (
    MOST_BUNDLES,
    CreateGroup,
    FindGroup,
    GetGroup,
    GroupDescription,
    GroupList,
    GroupRecord,
    GroupState,
    GroupStrategy,
    ListGroups,
    RemoveGroup,
)
from shoal_core.protocol.ids import NodeId, PlacementGroupId
from shoal_core.protocol.labels import parse_selector
from shoal_core.protocol.placement import Conditions
from shoal_core.protocol.resources import GPU, OBJECT_STORE_MEMORY, Resources, to_amounts, to_resources
from shoal_core.runtime.ownership.identities import PlacementGroupID
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.runtime import REQUEST_SECONDS, Runtime

STRATEGIES = tuple(strategy.value for strategy in GroupStrategy)
LIFETIMES = (None, "detached")
REASON = "it was removed by remove_placement_group()"


class PlacementGroup:
    """Bundles of resources that were asked for together; it may be passed to tasks and actors, and kept anywhere.

    ``id`` names it. It lives until it is removed, or until the job of its creator ends, unless it is detached.
    """

    def __init__(self, id: PlacementGroupID | str, bundle_cache: list[dict[str, float]] | None = None) -> None:
        self.id = PlacementGroupID(id)
        self.bundle_cache = bundle_cache
        self._maker: Runtime | None = None
        self._told = True
        self._removed = False

    @staticmethod
    def empty() -> PlacementGroup:
        """Return the placement group that stands for none."""
        return PlacementGroup(PlacementGroupID.nil(), [])

    @property
    def is_empty(self) -> bool:
        """Whether this stands for no placement group."""
        return self.id.is_nil()

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """The resources of each bundle. ``ValueError`` where the group is not known (any more)."""
        if self.bundle_cache is None:
            self.bundle_cache = [dict(bundle) for bundle in _specs_of(self.to_protocol())]
        return self.bundle_cache

    @property
    def bundle_count(self) -> int:
        """How many bundles there are."""
        return len(self.bundle_specs)

    def ready(self) -> ObjectRef[PlacementGroup]:
        """Return a reference that is ready as soon as all bundles are reserved; its value is the placement group.

        Where the group is removed before, ``get`` of it raises ``TaskPlacementGroupRemoved``.
        """
        group, same = self.to_protocol(), PlacementGroup(self.id, self.bundle_cache)
        current = runtime()
        return current.await_group(group, current.codec.dump(same).inline())

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Wait until all bundles are reserved; False where ``timeout_seconds`` were over before.

        Raises ``TaskPlacementGroupRemoved`` where the group is removed.
        """
        if isinstance(timeout_seconds, bool) or not isinstance(timeout_seconds, (int, float)):
            raise TypeError(f"timeout_seconds must be a number, got {type(timeout_seconds).__name__}.")
        if timeout_seconds < 0:
            raise ValueError(f"timeout_seconds must not be negative, got {timeout_seconds}.")
        current = runtime()
        if self._maker is current and not self._removed and current.group_is_created(self.to_protocol()):
            return True
        ready, _ = current.wait([self.ready()], 1, timeout_seconds)
        if ready:
            current.get(ready, 0)
        return bool(ready)

    def to_protocol(self) -> PlacementGroupId:
        """Return its id as it travels; ``ValueError`` where it has none."""
        if self.is_empty:
            raise ValueError("This placement group is empty: it stands for none, and nothing can be done with it.")
        return PlacementGroupId(str(self.id))

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever gets it must find it: so the control store has it before it is on its way.
        if self._maker is not None and not self._told:
            self._maker.groups_told()
            self._told = True
        return PlacementGroup, (self.id, self.bundle_cache)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"PlacementGroup({self.id})"


# ------------------------------------------------------------------------------------ making and removing


def placement_group(
    bundles: list[dict[str, float]],
    strategy: str | None = "PACK",
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: list[dict[str, str]] | None = None,
) -> PlacementGroup:
    """Ask for a placement group: all of its bundles are reserved together, or none is.

    It returns at once; ``ready()`` and ``wait()`` of what it returns tell when the resources are there. Only one with a
    name or a lifetime waits until the control store has it.

    ``bundles`` are dicts of resources, each of which lies on one node. ``strategy`` says how they lie to each other:
    "PACK" on as few nodes as possible, "SPREAD" on as many, "STRICT_PACK" all on one, "STRICT_SPREAD" each on another.
    ``name`` is one for ``get_placement_group`` in this namespace. ``lifetime="detached"``: it outlives this job.
    ``bundle_label_selector`` has one selector for each bundle, which its node must meet. ``_soft_target_node_id`` is
    the node to take if it has room ("STRICT_PACK" only).

    Raises ``ValueError`` and ``TypeError`` for what is wrong, and ``PlacementGroupAlreadyExistsError`` (a
    ``ValueError``) where the name is taken.
    """
    resources = _resources(bundles)
    strategy = "PACK" if strategy is None else strategy
    if strategy not in STRATEGIES:
        raise ValueError(f"Invalid placement group strategy {strategy!r}. Supported strategies are: {STRATEGIES}.")
    if lifetime not in LIFETIMES:
        raise ValueError(
            f"Placement group `lifetime` argument must be either `None` or 'detached', got {lifetime!r}. To have it "
            "end with its job, leave it out."
        )
    if not isinstance(name, str):
        raise TypeError(f"The name of a placement group must be a str, got {type(name).__name__}.")
    selectors = _selectors(bundle_label_selector, len(resources))
    soft_target = _soft_target(_soft_target_node_id, strategy)
    current = runtime()
    description = GroupDescription(
        group_id=current.new_group(),
        job_id=current.job,
        owner=current.local,
        name=name,
        namespace=current.namespace if name else "",
        detached=lifetime == "detached",
        bundles=resources,
        strategy=GroupStrategy(strategy),
        selectors=selectors,
        soft_target=soft_target,
        priority=current.priority,
    )
    group = PlacementGroup(description.group_id, _specs(resources))
    if name or description.detached:
        _make_now(current, description)
    else:
        current.make_group(description)
        group._maker, group._told = current, False
    return group


def _make_now(current: Runtime, description: GroupDescription) -> None:
    """Have a group made, and wait until the control store has it."""
    try:
        current.ask_about_groups("create_group", CreateGroup(description=description))
    except BusError:  # it may have been made all the same
        current.remove_group(description.group_id, "its creator has given up waiting for it")
        raise


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Remove a placement group: what runs in it is killed, and its resources are free again, soon after this returns.

    Its tasks fail with ``TaskPlacementGroupRemoved``, calls of its actors with ``ActorPlacementGroupRemoved``. To
    remove it again is no error.
    """
    group = _checked(placement_group).to_protocol()
    current = runtime()
    if placement_group._maker is current:
        current.remove_group(group, REASON)
        placement_group._removed = True
        return
    try:
        current.ask_about_groups("remove_group", RemoveGroup(group_id=group, reason=REASON))
    except NotFoundError:
        return  # it was removed so long ago that nothing is known of it


# ------------------------------------------------------------------------------------ finding


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """Return the placement group that has a name in this namespace; ``ValueError`` where none has."""
    if not isinstance(placement_group_name, str) or not placement_group_name:
        raise ValueError(f"Please supply a non-empty value to get_placement_group, got {placement_group_name!r}.")
    current = runtime()
    request = FindGroup(name=placement_group_name, namespace=current.namespace)
    try:
        record = current.ask_about_groups("find_group", request)
    except NotFoundError:
        raise ValueError(
            f"Failed to look up placement group with name: {placement_group_name!r} in namespace "
            f"{current.namespace!r}. It has not been created, it was removed, or it is in another namespace."
        ) from None
    assert isinstance(record, GroupRecord)
    return _of(record)


def get_current_placement_group() -> PlacementGroup | None:
    """Return the placement group that the task or actor which calls this is in; None where it is in none."""
    inside = runtime().in_group
    return None if inside is None else PlacementGroup(inside.group)


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """Return what is known of a placement group, or by id of all; empty where it is not known (any more).

    ``state`` is PENDING, CREATED, RESCHEDULING (a node with bundles has died) or REMOVED; ``bundles_to_node_id`` has
    the bundles that are reserved; ``stats`` has how many attempts were made to reserve them, and why it was removed.
    """
    if placement_group is not None:
        group = _checked(placement_group).to_protocol()
        record = find_record(runtime(), group)
        return {} if record is None else row_of(record)
    return {record.description.group_id: row_of(record) for record in list_records(runtime())}


def find_record(
    current: Runtime, group: PlacementGroupId, timeout_seconds: float = REQUEST_SECONDS
) -> GroupRecord | None:
    """Return what is recorded of a group, None where nothing is (any more)."""
    try:
        record = current.ask_about_groups("get_group", GetGroup(group_id=group), timeout_seconds)
    except NotFoundError:
        return None
    assert isinstance(record, GroupRecord)
    return record


def list_records(current: Runtime, timeout_seconds: float = REQUEST_SECONDS) -> list[GroupRecord]:
    """Return what is recorded of all groups, oldest first."""
    listed = current.ask_about_groups("list_groups", ListGroups(), timeout_seconds)
    assert isinstance(listed, GroupList)
    return listed.groups


def _checked(group: Any) -> PlacementGroup:
    if not isinstance(group, PlacementGroup):
        raise TypeError(f"A PlacementGroup is needed, got {type(group).__name__}.")
    return group


def _of(record: GroupRecord) -> PlacementGroup:
    about = record.description
    return PlacementGroup(about.group_id, _specs(about.bundles))


def row_of(record: GroupRecord) -> dict[str, Any]:
    """Return what users see of a record."""
    about = record.description
    return {
        "placement_group_id": about.group_id,
        "name": about.name,
        "bundles": dict(enumerate(_specs(about.bundles))),
        "bundles_to_node_id": {index: node for index, node in enumerate(record.nodes) if node is not None},
        "strategy": about.strategy.value,
        "state": record.state.value,
        "stats": {
            "scheduling_attempt": record.attempt,
            "scheduling_state": _SCHEDULING[record.state],
            "removal_reason": record.reason,
        },
    }


_SCHEDULING = {
    GroupState.NAMING: "QUEUED",
    GroupState.PENDING: "QUEUED",
    GroupState.CREATED: "FINISHED",
    GroupState.RESCHEDULING: "QUEUED",
    GroupState.REMOVED: "REMOVED",
}


@functools.lru_cache(maxsize=128)
def _specs_of(group: PlacementGroupId) -> tuple[dict[str, float], ...]:
    """Return the bundles of a group, which never change."""
    record = find_record(runtime(), group)
    if record is None:
        raise ValueError(f"Placement group {group} does not exist (any more).")
    return tuple(_specs(record.description.bundles))


def _specs(bundles: list[Resources]) -> list[dict[str, float]]:
    return [to_amounts(bundle) for bundle in bundles]


# ------------------------------------------------------------------------------------ checks


_EXAMPLE = '`[{"CPU": 1.0}, {"GPU": 1.0}]`'


def _resources(bundles: Any) -> list[Resources]:
    """Return checked bundles as they travel."""
    if not isinstance(bundles, list):
        raise ValueError(f"Placement group bundles must be a list, got {type(bundles)}.")
    if not bundles:
        raise ValueError(
            f"Bundles must be a non-empty list of resource dictionaries, for example {_EXAMPLE}. Got an empty list."
        )
    if len(bundles) > MOST_BUNDLES:
        raise ValueError(f"A placement group has at most {MOST_BUNDLES:,} bundles, got {len(bundles):,}.")
    return [_bundle(index, bundle) for index, bundle in enumerate(bundles)]


def _bundle(index: int, bundle: Any) -> Resources:
    if not isinstance(bundle, Mapping) or not all(isinstance(name, str) for name in bundle):
        raise ValueError(
            f"Bundles must be a non-empty list of resource dictionaries, for example {_EXAMPLE}. Got {bundle!r} as "
            f"bundles[{index}]."
        )
    if OBJECT_STORE_MEMORY in bundle:
        raise ValueError(
            f"bundles[{index}] cannot reserve {OBJECT_STORE_MEMORY}: all of a node share its object store."
        )
    for name, amount in bundle.items():
        check_sendable(f"A name in bundles[{index}]", name)
        try:
            check_amount(f"bundles[{index}][{name!r}]", amount, devices=name == GPU)
        except TypeError as error:
            raise ValueError(str(error)) from None
    resources = to_resources(bundle)
    if not resources:
        raise ValueError(
            "Bundles cannot be an empty dictionary or resources with only 0 values, got "
            f"{bundle!r} as bundles[{index}]."
        )
    return resources


def _selectors(selectors: Any, count: int) -> list[Conditions]:
    if selectors is None:
        return []
    if not isinstance(selectors, list) or len(selectors) != count:
        raise ValueError(
            f"Invalid bundle label selector {selectors!r}. The length of `bundle_label_selector` should equal the "
            "length of `bundles`."
        )
    return [parse_selector(f"bundle_label_selector[{index}]", each) for index, each in enumerate(selectors)]


def _soft_target(node: Any, strategy: str) -> NodeId | None:
    if node is None:
        return None
    if strategy != GroupStrategy.STRICT_PACK:
        raise ValueError(f"_soft_target_node_id currently only works with STRICT_PACK but got {strategy}.")
    if not isinstance(node, str) or not node or set(node) - set("0123456789abcdef"):
        raise ValueError(f"_soft_target_node_id must be the lower-case hex of a node's id, got {node!r}.")
    return NodeId(node)
