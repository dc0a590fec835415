"""Options of tasks: each wrong one is an error at the call that gave it, and is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import shoal
from shoal.options import TASK_OPTIONS, check, resolve
from shoal.util.scheduling_strategies import In


def double(x: int) -> int:
    return 2 * x


def decorate(**options: Any) -> object:
    return shoal.remote(**options)(double)


def change(**options: Any) -> object:
    return shoal.remote(double).options(**options)


def call(**options: Any) -> object:
    return shoal.remote(double)._remote(args=(1,), **options)


Use = Callable[..., object]
everywhere = pytest.mark.parametrize("use", [decorate, change, call])

WRONG_TYPES: list[tuple[str, Any]] = [
    ("num_cpus", "1"),
    ("num_cpus", True),
    ("num_cpus", [1]),
    ("num_gpus", "1"),
    ("memory", "1 GB"),
    ("resources", ["licence"]),
    ("resources", "licence"),
    ("resources", {1: 1}),
    ("resources", {"licence": "1"}),
    ("resources", {"licence": True}),
    ("accelerator_type", 1),
    ("name", 1),
    ("name", b"name"),
    ("num_returns", 1.5),
    ("num_returns", True),
    ("max_retries", 1.5),
    ("max_retries", "3"),
    ("max_retries", True),
    ("scheduling_strategy", 1),
    ("scheduling_strategy", In("a")),
    ("label_selector", "zone=a"),
    ("label_selector", {"zone": ["a"]}),
    ("fallback_strategy", {"label_selector": {}}),
    ("fallback_strategy", ["zone=a"]),
    ("retry_exceptions", "yes"),
    ("retry_exceptions", ValueError),
]

WRONG_VALUES: list[tuple[str, Any]] = [
    ("retry_exceptions", [ValueError, "KeyError"]),
    ("retry_exceptions", [ValueError("an instance")]),
    ("num_cpus", -1),
    ("num_cpus", 0.00001),
    ("num_cpus", float("nan")),
    ("num_cpus", float("inf")),
    ("num_gpus", -0.5),
    ("num_gpus", 1.5),
    ("memory", -1),
    ("name", "\udc80"),
    ("accelerator_type", "\udc80"),
    ("resources", {"\udc80": 1}),
    ("resources", {"licence": -1}),
    ("resources", {"licence": float("-inf")}),
    ("resources", {"CPU": 1}),
    ("resources", {"GPU": 1}),
    ("resources", {"memory": 1}),
    ("resources", {"object_store_memory": 1}),
    ("num_returns", -1),
    ("num_returns", 1 << 24),
    ("num_returns", "sometimes"),
    ("max_retries", -2),
    ("scheduling_strategy", "NEAR"),
    ("label_selector", {"zone": "in(a"}),
    ("label_selector", {"a b": "c"}),
    ("fallback_strategy", [{"label_selector": {}, "num_cpus": 2}]),
    ("fallback_strategy", [{"label_selector": {"zone": "!!a"}}]),
]


@everywhere
@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_a_wrong_type_is_named_at_the_call(use: Use, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=r"resource" if name == "resources" else name):
        use(**{name: value})
    assert not shoal.is_initialized()


@everywhere
@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_a_wrong_value_is_named_at_the_call(use: Use, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        use(**{name: value})
    assert not shoal.is_initialized()


@everywhere
def test_an_unknown_option_is_named_with_those_that_are_known(use: Use) -> None:
    with pytest.raises(ValueError, match=r"'num_cpu'.*'num_cpus'"):
        use(num_cpu=1)


@pytest.mark.parametrize("value", [-1, 1.5, "1", True])
def test_max_calls_is_an_int_that_is_not_negative(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_calls"):
        decorate(max_calls=value)


@pytest.mark.parametrize("use", [change, call])
def test_max_calls_belongs_into_the_decorator(use: Use) -> None:
    with pytest.raises(ValueError, match=r"max_calls.*decorator"):
        use(max_calls=1)


def test_every_option_may_be_none_which_means_the_default_and_of_a_placement_group_that_there_is_none() -> None:
    options = dict.fromkeys(TASK_OPTIONS)
    check(options)
    assert resolve(options, "f") == replace(resolve({}, "f"), group=None)
    del options["placement_group"]
    assert resolve(options, "f") == resolve({}, "f")


def test_the_defaults_are_rays() -> None:
    resolved = resolve({}, "f")
    assert resolved.scheduling_class.resources == (("CPU", 10_000),)
    assert (resolved.name, resolved.returns, resolved.retries, resolved.retry_on) == ("f", 1, 3, b"")
    assert resolved.max_calls == 0
    assert resolve({"num_gpus": 1}, "f").max_calls == 1
    assert resolve({"num_gpus": 1, "max_calls": 0}, "f").max_calls == 0


def test_resources_add_up_exactly_without_zeros_and_in_one_order() -> None:
    options = {
        "num_cpus": 0,
        "num_gpus": 0.1,
        "memory": 1_000_000,
        "resources": {"b": 0.0001, "a": 2, "none": 0},
        "accelerator_type": "H100",
    }
    check(options)
    assert resolve(options, "f").scheduling_class.resources == (
        ("GPU", 1_000),
        ("a", 20_000),
        ("accelerator_type:H100", 10),
        ("b", 1),
        ("memory", 10_000_000_000),
    )


def test_classes_of_exceptions_to_retry_travel() -> None:
    assert pickle.loads(resolve({"retry_exceptions": [ValueError, KeyError]}, "f").retry_on) == (ValueError, KeyError)
    assert pickle.loads(resolve({"retry_exceptions": []}, "f").retry_on) == ()
    assert resolve({"retry_exceptions": False}, "f").retry_on == b""


def test_options_replace_those_that_are_named_and_leave_the_function_as_it_was() -> None:
    first: Any = decorate(num_cpus=2, name="first")
    second = first.options(name="second")
    assert (first._resolved.name, second._resolved.name) == ("first", "second")
    assert first._resolved.scheduling_class == second._resolved.scheduling_class
    assert second.options(num_cpus=None)._resolved.scheduling_class.resources == (("CPU", 10_000),)


@pytest.mark.parametrize("misuse", [(), (1,), (double, double)])
def test_a_decorator_without_function_or_options_says_how_it_is_used(misuse: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="decorator"):
        shoal.remote(*misuse)


def test_what_cannot_be_remote_is_refused() -> None:
    async def later() -> None:
        pass

    with pytest.raises(ValueError, match="async def"):
        shoal.remote(later)
    with pytest.raises(TypeError, match="remote already"):
        shoal.remote(shoal.remote(double))
    with pytest.raises(TypeError, match=r"double\.remote\(\)"):
        shoal.remote(double)(1)
