"""Options of tasks, and what those of actors share with them: their names, values, and the error for each wrong one.

An unknown name and an impossible value raise ``ValueError``, a wrong type ``TypeError``, at the call that was
wrong. The names and defaults are Ray's.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle

from shoal.amounts import check_amount, check_sendable
from shoal.placement import (
    GroupWish,
    check_bundle_index,
    check_capture,
    check_fallback,
    check_group,
    check_selector,
    check_strategy,
    group_wish,
    strategy_of,
)
from shoal.runtime_env.runtime_env import check_option as check_runtime_env
from shoal.terms import check_priority
from shoal_core.protocol.ids import MAX_RETURNS
from shoal_core.protocol.resources import CPU, GPU, MEMORY, to_units
from shoal_core.runtime.ownership.streams import STREAMING
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.runtime.worker.work import ALL_EXCEPTIONS

DEFAULT_RETRIES = 3
ACCELERATOR_AMOUNT = 0.001


def _amount(name: str, value: Any) -> None:
    check_amount(f"option {name}", value, devices=name == "num_gpus")


def integer(lowest: int) -> Callable[[str, Any], None]:
    """Return the check of an option that is a whole number of at least ``lowest``."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be an int.")
        if value < lowest:
            raise ValueError(f"The value of option {name} is {value}; it must be at least {lowest}.")

    return check


def returns(name: str, value: Any) -> None:
    """Check ``num_returns``."""
    if isinstance(value, str):
        if value not in ("streaming", "dynamic"):
            raise ValueError(
                f"The value of option num_returns is {value!r}; it must be an int, 'streaming' or 'dynamic'."
            )
        return
    integer(0)(name, value)
    if value > MAX_RETURNS:
        raise ValueError(f"The value of option num_returns is {value}; it must be at most {MAX_RETURNS}.")


def _resources(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"The type of option resources is {type(value).__name__}; it must be a dict of names to amounts."
        )
    for resource, amount in value.items():
        if not isinstance(resource, str):
            raise TypeError(f"The resource name {resource!r} must be a str.")
        text(f"resources[{resource!r}]", resource)
        if resource in (CPU, GPU):
            raise ValueError(f"Use the option num_{resource.lower()}s instead of {resource!r} in resources.")
        if resource in (MEMORY, "object_store_memory"):
            raise ValueError(f"Use the option {resource} instead of {resource!r} in resources.")
        _amount(f"resources[{resource!r}]", amount)


def text(name: str, value: Any) -> None:
    """Check a text."""
    if not isinstance(value, str):
        raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be a str.")
    check_sendable(f"The value of option {name}", value)


def ahead(name: str, value: Any) -> None:
    """Check ``_generator_backpressure_num_objects``."""
    integer(-1)(name, value)
    if value == 0:
        raise ValueError(f"The value of option {name} is 0; it must be -1 (any number) or at least 1.")


def retry_exceptions(name: str, value: Any) -> None:
    """Check ``retry_exceptions``: a bool or a list of exception classes."""
    if isinstance(value, bool):
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"The type of option retry_exceptions is {type(value).__name__}; it must be a bool or a list of exception "
            "classes."
        )
    for item in value:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise ValueError(f"retry_exceptions may hold exception classes only, got {item!r}.")


def anything(name: str, value: Any) -> None:
    """Accept the option; it has no effect."""


COMMON_OPTIONS: dict[str, Callable[[str, Any], None]] = {
    "num_cpus": _amount,
    "num_gpus": _amount,
    "memory": _amount,
    "resources": _resources,
    "accelerator_type": text,
    "scheduling_strategy": check_strategy,
    "priority": check_priority,
    "label_selector": check_selector,
    "fallback_strategy": check_fallback,
    "placement_group": check_group,
    "placement_group_bundle_index": check_bundle_index,
    "placement_group_capture_child_tasks": check_capture,
    "runtime_env": check_runtime_env,
    "enable_task_events": anything,
    "_metadata": anything,
    "_labels": anything,
}
"""The options that tasks and actors share. Where ``placement_group`` is None there is to be none."""

TASK_OPTIONS: dict[str, Callable[[str, Any], None]] = {
    **COMMON_OPTIONS,
    "name": text,
    "num_returns": returns,
    "_generator_backpressure_num_objects": ahead,
    "max_calls": integer(0),
    "max_retries": integer(-1),
    "retry_exceptions": retry_exceptions,
}
"""Every option of a task, and the check of its value. None is always allowed and means the default."""

DECORATOR_ONLY = frozenset({"max_calls"})


def check(options: Mapping[str, Any], *, in_options: bool = False) -> None:
    """Raise for the first option of a task that is unknown or wrong."""
    check_table(options, TASK_OPTIONS, "remote functions", DECORATOR_ONLY if in_options else frozenset())


def check_table(
    options: Mapping[str, Any], table: Mapping[str, Callable[[str, Any], None]], what: str, forbidden: frozenset[str]
) -> None:
    """Raise for the first option that ``table`` does not know, that is ``forbidden`` here, or that is wrong."""
    for name, value in options.items():
        known = table.get(name)
        if known is None:
            raise ValueError(f"Invalid option keyword {name!r} for {what}. Valid ones are {sorted(table)}.")
        if name in forbidden:
            raise ValueError(f"The option {name} belongs into the decorator; .options() does not take it.")
        if value is not None:
            known(name, value)


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The options of a call in the form in which they are used."""

    scheduling_class: SchedulingClass
    group: GroupWish | None
    runtime_env: Mapping[str, Any] | None
    name: str
    returns: int
    retries: int
    retry_on: bytes
    max_calls: int
    ahead: int
    dynamic: bool


def resolve(options: Mapping[str, Any], function_name: str, *, generator: bool = False) -> TaskOptions:
    """Turn checked options into what a call needs, with Ray's defaults; a ``generator`` streams unless told not to."""
    given = {name: value for name, value in options.items() if value is not None}
    amounts = {CPU: 1.0, **amounts_of(given)}
    resources = tuple(sorted((name, to_units(amount)) for name, amount in amounts.items() if amount))
    return TaskOptions(
        scheduling_class=SchedulingClass(resources, strategy_of(given), priority=given.get("priority")),
        group=group_wish(options),
        runtime_env=given.get("runtime_env"),
        name=given.get("name", function_name),
        returns=returns_of(given.get("num_returns"), generator=generator),
        retries=given.get("max_retries", DEFAULT_RETRIES),
        retry_on=retry_on(given.get("retry_exceptions", False)),
        max_calls=given.get("max_calls", 1 if amounts.get(GPU) else 0),
        ahead=max(0, given.get("_generator_backpressure_num_objects", 0)),
        dynamic=given.get("num_returns") == "dynamic",
    )


def returns_of(value: Any, *, generator: bool) -> int:
    """Return a checked ``num_returns`` as it travels."""
    if value is None:
        return STREAMING if generator else 1
    if value == "dynamic":
        return 1
    return STREAMING if value == "streaming" else int(value)


def amounts_of(given: Mapping[str, Any]) -> dict[str, float]:
    """Return the amounts of all resources that checked options ask for by name."""
    amounts: dict[str, float] = dict(given.get("resources", {}))
    for option, resource in (("num_cpus", CPU), ("num_gpus", GPU), ("memory", MEMORY)):
        if option in given:
            amounts[resource] = given[option]
    if "accelerator_type" in given:
        amounts[f"accelerator_type:{given['accelerator_type']}"] = ACCELERATOR_AMOUNT
    return amounts


def retry_on(retry: bool | Sequence[type[BaseException]]) -> bytes:
    """Return ``retry_exceptions`` as it travels: nothing, a mark for all exceptions, or pickled classes."""
    if isinstance(retry, bool):
        return ALL_EXCEPTIONS if retry else b""
    return pickle.dumps((), 5) if not retry else cloudpickle.dumps(tuple(retry), protocol=5)
