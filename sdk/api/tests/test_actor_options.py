"""Options of actors and of their methods: each wrong one is an error at the call that gave it, and is named."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cloudpickle
import pytest

import shoal
from shoal.actor import ActorClass, ActorClassInheritanceException, ActorHandle, ActorProxy
from shoal.actor_options import ACTOR_OPTIONS, METHOD_OPTIONS, check_actor, check_method, resolve_actor
from shoal.handle import MethodDescription, describe_method


class Plain:
    """A class as users write it."""

    def method(self) -> int:
        return 1


def decorate(**options: Any) -> object:
    return shoal.remote(**options)(Plain)


def change(**options: Any) -> object:
    actor_class: Any = shoal.remote(Plain)
    return actor_class.options(**options)


def call(**options: Any) -> object:
    actor_class: Any = shoal.remote(Plain)
    return actor_class._remote(**options)


Use = Callable[..., object]
everywhere = pytest.mark.parametrize("use", [decorate, change, call])

WRONG_TYPES: list[tuple[str, Any]] = [
    ("num_cpus", "1"),
    ("resources", {"licence": "1"}),
    ("name", 1),
    ("namespace", b"colors"),
    ("get_if_exists", 1),
    ("get_if_exists", "yes"),
    ("max_concurrency", 1.5),
    ("max_concurrency", True),
    ("max_restarts", "3"),
    ("max_task_retries", 0.5),
    ("max_pending_calls", "many"),
    ("allow_out_of_order_execution", 1),
]

WRONG_VALUES: list[tuple[str, Any]] = [
    ("num_cpus", -1),
    ("name", ""),
    ("name", "\udc80"),
    ("namespace", ""),
    ("lifetime", "for ever"),
    ("lifetime", True),
    ("max_concurrency", 0),
    ("max_restarts", -2),
    ("max_task_retries", -2),
    ("max_pending_calls", -2),
    ("object_store_memory", 1),
]


@everywhere
@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_a_wrong_type_is_a_type_error_that_names_the_option(use: Use, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        use(**{name: value})


@everywhere
@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_a_wrong_value_is_a_value_error_that_names_the_option(use: Use, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        use(**{name: value})


@everywhere
@pytest.mark.parametrize("name", ["max_retries", "num_returns", "max_calls", "max_restart"])
def test_what_is_no_option_of_actors_is_a_value_error_that_names_it(use: Use, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        use(**{name: 1})


@pytest.mark.parametrize(
    ("groups", "error"),
    [(["io"], TypeError), ({1: 1}, TypeError), ({"": 1}, TypeError), ({"io": 0}, ValueError), ({"io": "1"}, TypeError)],
)
def test_concurrency_groups_are_names_with_numbers(groups: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"concurrency.group"):
        decorate(concurrency_groups=groups)


def test_a_method_in_a_group_that_there_is_not_is_refused_where_an_actor_is_made() -> None:
    class Grouped:
        @shoal.method(concurrency_group="io")
        def read(self) -> None: ...

    assert ActorClass(Grouped, {"concurrency_groups": {"io": 2}}).members()
    lacking = ActorClass(Grouped, {"concurrency_groups": {"compute": 2}})
    for _ in ("first", "again"):
        with pytest.raises(ValueError, match=r"The method read of Grouped is in the concurrency group 'io'"):
            lacking.members()


def test_an_actor_class_and_a_handle_are_types() -> None:
    made: ActorClass[Plain] = ActorClass(Plain, {})
    arguments: ActorClass[Plain, [int]] = ActorClass(Plain, {})
    assert ActorClass[Plain] == ActorClass[Plain, ...]
    assert ActorProxy[Plain] == ActorHandle[Plain]
    assert made._cls is arguments._cls


def test_concurrency_groups_belong_to_the_decorator() -> None:
    assert decorate(concurrency_groups={"io": 2})
    with pytest.raises(ValueError, match="concurrency_groups"):
        change(concurrency_groups={"io": 2})


def test_options_that_do_not_go_together_are_errors() -> None:
    with pytest.raises(ValueError, match="name"):
        change(get_if_exists=True)
    assert change(get_if_exists=True, name="x")


def test_none_means_the_default_and_of_a_placement_group_that_there_is_none() -> None:
    options = dict.fromkeys(ACTOR_OPTIONS)
    check_actor(options)
    assert resolve_actor(options) == replace(resolve_actor({}), group=None)
    del options["placement_group"]
    assert resolve_actor(options) == resolve_actor({})


def test_an_actor_needs_a_cpu_to_be_placed_and_none_to_live_unless_it_says_otherwise() -> None:
    default = resolve_actor({})
    assert default.placement == {"CPU": 10_000}
    assert default.resources == {}
    none = resolve_actor({"num_cpus": 0})
    assert none.placement == none.resources == {}
    two = resolve_actor({"num_cpus": 2, "resources": {"licence": 0.5}})
    assert two.placement == two.resources == {"CPU": 20_000, "licence": 5_000}


def test_defaults_are_rays() -> None:
    default = resolve_actor({})
    assert (default.max_restarts, default.max_task_retries, default.max_pending_calls) == (0, 0, -1)
    assert not default.detached
    assert not default.get_if_exists
    assert not default.unordered
    assert resolve_actor({"lifetime": "detached"}).detached
    assert not resolve_actor({"lifetime": "non_detached"}).detached


def test_options_replace_one_another_and_leave_the_original_alone() -> None:
    base: Any = shoal.remote(max_restarts=1, name="one")(Plain)
    changed = base.options(max_restarts=2)
    assert (base._resolved.max_restarts, changed._resolved.max_restarts) == (1, 2)
    assert changed._resolved.name == "one"


# ------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_returns", -1, ValueError),
        ("num_returns", "two", ValueError),
        ("num_returns", 1.5, TypeError),
        ("concurrency_group", 1, TypeError),
        ("concurrency_group", "", ValueError),
        ("max_task_retries", -2, ValueError),
        ("max_task_retries", "1", TypeError),
        ("retry_exceptions", "all", TypeError),
        ("retry_exceptions", [1], ValueError),
        ("num_cpus", 1, ValueError),
        ("max_retries", 1, ValueError),
    ],
)
def test_a_wrong_option_of_a_method_is_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        shoal.method(**{name: value})
    with pytest.raises(error, match=name):
        check_method({name: value})


def test_an_abstract_class_cannot_be_an_actor() -> None:
    class Shape(ABC):
        @abstractmethod
        def area(self) -> float: ...

    class Square(Shape):
        def area(self) -> float:
            return 1.0

    with pytest.raises(TypeError, match=r"abstract.*area"):
        shoal.remote(Shape)
    assert isinstance(shoal.remote(Square), ActorClass)


def test_the_decorator_of_methods_takes_keywords() -> None:
    def method() -> None:
        pass

    assert shoal.method(method) is method
    assert shoal.method(num_returns=2)(method) is method
    wrong: Any = shoal.method
    for arguments in ((), (2,), (method, 2)):
        with pytest.raises(TypeError, match="keyword"):
            wrong(*arguments)


def test_options_at_the_call_stand_over_those_of_the_decorator() -> None:
    check_method(dict.fromkeys(METHOD_OPTIONS))
    decorated = describe_method({"num_returns": 2, "concurrency_group": "io", "max_task_retries": 3})
    assert decorated == MethodDescription(returns=2, retries=3, group="io")
    assert describe_method({"num_returns": 1}, decorated) == MethodDescription(returns=1, retries=3, group="io")
    assert describe_method({"num_returns": None}, decorated) == decorated


# ------------------------------------------------------------------------------------ classes


def test_an_actor_class_is_called_by_no_other_way_than_remote() -> None:
    actor_class: Any = shoal.remote(Plain)
    with pytest.raises(TypeError, match=r"'Plain\(\)'.*'Plain\.remote\(\)'"):
        actor_class()
    with pytest.raises(ActorClassInheritanceException, match="'Plain'"):

        class Sub(actor_class):  # type: ignore[misc]
            pass

    with pytest.raises(TypeError, match="remote already"):
        shoal.remote(actor_class)


def test_an_actor_class_keeps_name_and_documentation_and_goes_through_pickle() -> None:
    actor_class: Any = shoal.remote(max_restarts=3)(Plain)
    assert (actor_class.__name__, actor_class.__doc__) == ("Plain", "A class as users write it.")
    assert repr(actor_class) == "ActorClass(Plain)"
    copy = pickle.loads(pickle.dumps(actor_class))
    assert isinstance(copy, ActorClass)
    assert copy._cls is Plain
    assert copy._resolved == actor_class._resolved


def test_an_actor_class_has_the_attributes_of_its_class() -> None:
    class Worker:
        BATCH = 32

        @staticmethod
        def double(number: int) -> int:
            return 2 * number

    actor_class: Any = pickle.loads(cloudpickle.dumps(shoal.remote(Worker)))
    assert (actor_class.BATCH, actor_class.double(2)) == (32, 4)
    with pytest.raises(AttributeError, match="missing"):
        _ = actor_class.missing


def test_members_are_methods_and_not_what_every_object_has() -> None:
    class Full:
        constant = 1

        class Inner:
            pass

        def __init__(self) -> None:
            pass

        def method(self) -> None:
            pass

        @classmethod
        def of_class(cls) -> None:
            pass

        @staticmethod
        def of_none() -> None:
            pass

        def __len__(self) -> int:
            return 0

    methods, _ = ActorClass(Full, {}).members()
    assert sorted(methods) == ["__len__", "method", "of_class", "of_none"]
