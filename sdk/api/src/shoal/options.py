"""Options of tasks: which there are, what they may be, and the error for each wrong one.

An unknown name and an impossible value raise ``ValueError``, a wrong type ``TypeError``, at the call that was
wrong. The names and defaults are Ray's.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle

from shoal_core.protocol.ids import MAX_RETURNS
from shoal_core.protocol.resources import CPU, GPU, MEMORY, UNIT, to_units
from shoal_core.runtime.submission import SchedulingClass
from shoal_core.runtime.work import ALL_EXCEPTIONS

DEFAULT_RETRIES = 3
ACCELERATOR_AMOUNT = 0.001
STRATEGIES = ("DEFAULT", "SPREAD")


def _amount(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be a number, such as 1 or 0.5.")
    try:
        units = to_units(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"The value of option {name} is wrong: {error}.") from None
    if name == "num_gpus" and units > UNIT and units % UNIT:
        raise ValueError(f"The value of option num_gpus is {value}; above 1 it must be a whole number.")


def _integer(lowest: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be an int.")
        if value < lowest:
            raise ValueError(f"The value of option {name} is {value}; it must be at least {lowest}.")

    return check


def _returns(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise ValueError(f"num_returns={value!r} is not supported in this version; pass an int.")
    _integer(0)(name, value)
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
        if resource in (CPU, GPU):
            raise ValueError(f"Use the option num_{resource.lower()}s instead of {resource!r} in resources.")
        if resource in (MEMORY, "object_store_memory"):
            raise ValueError(f"Use the option {resource} instead of {resource!r} in resources.")
        _amount(f"resources[{resource!r}]", amount)


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be a str.")


def _retry_exceptions(name: str, value: Any) -> None:
    if isinstance(value, bool):
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"The type of option retry_exceptions is {type(value).__name__}; it must be a bool or a list of exception "
            "classes."
        )
    for item in value:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise TypeError(f"retry_exceptions may hold exception classes only, got {item!r}.")


def _strategy(name: str, value: Any) -> None:
    if value not in STRATEGIES:
        raise ValueError(f"scheduling_strategy={value!r} is not supported in this version; pass one of {STRATEGIES}.")


def _anything(name: str, value: Any) -> None:
    """Accept the option; it has no effect."""


TASK_OPTIONS: dict[str, Callable[[str, Any], None]] = {
    "num_cpus": _amount,
    "num_gpus": _amount,
    "memory": _amount,
    "resources": _resources,
    "accelerator_type": _text,
    "name": _text,
    "num_returns": _returns,
    "max_calls": _integer(0),
    "max_retries": _integer(-1),
    "retry_exceptions": _retry_exceptions,
    "scheduling_strategy": _strategy,
    "enable_task_events": _anything,
    "_metadata": _anything,
    "_labels": _anything,
}
"""Every option of a task, and the check of its value. None is always allowed and means the default."""

DECORATOR_ONLY = frozenset({"max_calls"})


def check(options: Mapping[str, Any], *, in_options: bool = False) -> None:
    """Raise for the first option that is unknown or wrong."""
    for name, value in options.items():
        known = TASK_OPTIONS.get(name)
        if known is None:
            raise ValueError(
                f"Invalid option keyword {name!r} for remote functions. Valid ones are {sorted(TASK_OPTIONS)}."
            )
        if in_options and name in DECORATOR_ONLY:
            raise ValueError(f"The option {name} belongs into the decorator; .options() does not take it.")
        if value is not None:
            known(name, value)


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The options of a call in the form in which they are used."""

    scheduling_class: SchedulingClass
    name: str
    returns: int
    retries: int
    retry_on: bytes
    max_calls: int


def resolve(options: Mapping[str, Any], function_name: str) -> TaskOptions:
    """Turn checked options into what a call needs, with Ray's defaults."""
    given = {name: value for name, value in options.items() if value is not None}
    amounts = dict(given.get("resources", {}))
    amounts[CPU] = given.get("num_cpus", 1)
    amounts[GPU] = given.get("num_gpus", 0)
    amounts[MEMORY] = given.get("memory", 0)
    if "accelerator_type" in given:
        amounts[f"accelerator_type:{given['accelerator_type']}"] = ACCELERATOR_AMOUNT
    resources = tuple(sorted((name, to_units(amount)) for name, amount in amounts.items() if amount))
    retry = given.get("retry_exceptions", False)
    if isinstance(retry, bool):
        retry_on = ALL_EXCEPTIONS if retry else b""
    else:
        retry_on = pickle.dumps((), 5) if not retry else cloudpickle.dumps(tuple(retry), protocol=5)
    return TaskOptions(
        scheduling_class=SchedulingClass(resources, given.get("scheduling_strategy", "DEFAULT")),
        name=given.get("name", function_name),
        returns=given.get("num_returns", 1),
        retries=given.get("max_retries", DEFAULT_RETRIES),
        retry_on=retry_on,
        max_calls=given.get("max_calls", 1 if amounts[GPU] else 0),
    )
