"""Options of actors and of their methods: which there are, what they may be, and the error for each wrong one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.options import (
    COMMON_OPTIONS,
    ahead,
    amounts_of,
    anything,
    check_table,
    integer,
    retry_exceptions,
    returns,
    text,
)
from shoal.placement import GroupWish, group_wish, strategy_of
from shoal_core.protocol.placement import NodeAffinity, Strategy
from shoal_core.protocol.resources import CPU, Resources, to_resources

LIFETIMES = ("detached", "non_detached")


def _lifetime(name: str, value: Any) -> None:
    if value not in LIFETIMES:
        raise ValueError(f"The value of option lifetime is {value!r}; it must be one of {LIFETIMES}.")


def _name(name: str, value: Any) -> None:
    text(name, value)
    if not value:
        raise ValueError(f"The value of option {name} must not be an empty string; leave it out instead.")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be a bool.")


def _groups(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be a dict of names to numbers.")
    for group, limit in value.items():
        if not isinstance(group, str) or not group:
            raise TypeError(f"The name of a concurrency group must be a str that is not empty, got {group!r}.")
        integer(1)(f"{name}[{group!r}]", limit)


def _refused(name: str, value: Any) -> None:
    raise ValueError(f"The option {name} is not supported for actors: the object store is the node's, not an actor's.")


ACTOR_OPTIONS: dict[str, Callable[[str, Any], None]] = {
    **COMMON_OPTIONS,
    "name": _name,
    "namespace": _name,
    "lifetime": _lifetime,
    "get_if_exists": _flag,
    "max_concurrency": integer(1),
    "max_restarts": integer(-1),
    "max_task_retries": integer(-1),
    "max_pending_calls": integer(-1),
    "concurrency_groups": _groups,
    "allow_out_of_order_execution": _flag,
    "object_store_memory": _refused,
}
"""Every option of an actor, and the check of its value. None is always allowed and means the default."""

METHOD_OPTIONS: dict[str, Callable[[str, Any], None]] = {
    "num_returns": returns,
    "_generator_backpressure_num_objects": ahead,
    "concurrency_group": _name,
    "max_task_retries": integer(-1),
    "retry_exceptions": retry_exceptions,
    "name": _name,
    "enable_task_events": anything,
}
"""Every option of a method, and the check of its value."""

_DECORATOR_ONLY = frozenset({"concurrency_groups"})


def check_actor(options: Mapping[str, Any], *, in_options: bool = False) -> None:
    """Raise for the first option of an actor that is unknown or wrong."""
    check_table(options, ACTOR_OPTIONS, "actors", _DECORATOR_ONLY if in_options else frozenset())


def check_method(options: Mapping[str, Any]) -> None:
    """Raise for the first option of a method that is unknown or wrong."""
    check_table(options, METHOD_OPTIONS, "methods of actors", frozenset())


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """The options of an actor in the form in which they are used."""

    placement: Resources
    resources: Resources
    strategy: Strategy
    group: GroupWish | None
    runtime_env: Mapping[str, Any] | None
    priority: int | None
    name: str
    namespace: str
    detached: bool
    get_if_exists: bool
    concurrency: int
    groups: dict[str, int]
    max_restarts: int
    max_task_retries: int
    max_pending_calls: int
    unordered: bool | None


def resolve_actor(options: Mapping[str, Any]) -> ActorOptions:
    """Turn checked options into what creating an actor needs, with Ray's defaults; look at those that go together."""
    given = {name: value for name, value in options.items() if value is not None}
    amounts = amounts_of(given)
    resources = to_resources(amounts)
    placement = resources if "num_cpus" in given else to_resources({**amounts, CPU: 1})
    if given.get("get_if_exists") and "name" not in given:
        raise ValueError("The actor name must be given, since get_if_exists is set: there is nothing to look for.")
    strategy = strategy_of(given)
    if isinstance(strategy, NodeAffinity) and strategy.fail:
        raise ValueError("The option scheduling_strategy of an actor cannot have _fail_on_unavailable=True.")
    return ActorOptions(
        placement=placement,
        resources=resources,
        strategy=strategy,
        group=group_wish(options),
        runtime_env=given.get("runtime_env"),
        priority=given.get("priority"),
        name=given.get("name", ""),
        namespace=given.get("namespace", ""),
        detached=given.get("lifetime") == "detached",
        get_if_exists=given.get("get_if_exists", False),
        concurrency=given.get("max_concurrency", 0),
        groups=dict(given.get("concurrency_groups", {})),
        max_restarts=given.get("max_restarts", 0),
        max_task_retries=given.get("max_task_retries", 0),
        max_pending_calls=given.get("max_pending_calls", -1),
        unordered=given.get("allow_out_of_order_execution"),
    )
