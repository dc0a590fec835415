"""``inspect_serializability`` names the innermost culprit, wherever it hides."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest

from shoal.util import inspect_serializability
from shoal.util.check_serialize import FailureTuple

module_lock = threading.Lock()


def inspect(obj: Any, **options: Any) -> tuple[bool, set[FailureTuple], str]:
    printed = io.StringIO()
    good, failures = inspect_serializability(obj, print_file=printed, **options)
    return good, failures, printed.getvalue()


class Holder:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> None:
        pass


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Refusing:
    def __reduce__(self) -> Any:
        raise KeyError("never")


class Unprintable(Refusing):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def in_closure(lock: Any) -> Callable[[], Any]:
    def function() -> Any:
        return lock

    return function


def in_inner_closure(lock: Any) -> Callable[[], Any]:
    return in_closure(in_closure(lock))


def in_default(lock: Any) -> Callable[[], Any]:
    def function(number: int = 1, *, held: Any = lock) -> Any:
        return held

    return function


def in_local_class(lock: Any) -> Any:
    class Local:
        held = lock

    return Local


def in_method(lock: Any) -> Any:
    class Local:
        def method(self) -> Any:
            return lock

    return Local()


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (in_closure, "lock"),
        (in_inner_closure, "lock"),
        (in_default, "held"),
        (in_local_class, "held"),
        (in_method, "lock"),
        (lambda lock: Holder(fine=1, held=lock), "held"),
        (lambda lock: Holder(one=Holder(two=lock)), "two"),
        (Slotted, "inner"),
        (lambda lock: [1, lock], "1"),
        (lambda lock: {"key": (0, lock)}, "1"),
        (lambda lock: functools.partial(print, lock), "0"),
        (lambda lock: functools.partial(print, end=lock), "end"),
        (lambda lock: Holder(held=lock).method, "held"),
    ],
)
def test_the_culprit_is_named(wrap: Callable[[Any], Any], name: str) -> None:
    lock = threading.Lock()
    good, failures, printed = inspect(wrap(lock), depth=4)
    assert not good
    (failure,) = failures
    assert failure.obj is lock
    assert failure.name == name
    assert failure.parent is not None
    assert f"{name} = <unlocked _thread.lock" in printed
    assert "cannot pickle '_thread.lock' object" in printed


def test_a_global_of_a_function_that_is_pickled_by_value() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", "lock": module_lock, "fine": 1}
    exec("def outer():\n    def inner():\n        return lock, fine\n    return inner\n", namespace)
    good, failures, printed = inspect(namespace["outer"])
    assert not good
    assert [(failure.obj, failure.name) for failure in failures] == [(module_lock, "lock")]
    assert "global variable lock" in printed


def test_all_culprits_are_named() -> None:
    first, second = threading.Lock(), threading.Lock()
    _, failures, _ = inspect(Holder(first=first, second=[second]))
    assert {id(failure.obj) for failure in failures} == {id(first), id(second)}


def test_no_deeper_than_asked() -> None:
    inner = Holder(two=threading.Lock())
    outer = Holder(one=inner)
    assert [failure.obj for failure in inspect(outer, depth=1)[1]] == [inner]
    assert [failure.obj for failure in inspect(outer, depth=0)[1]] == [outer]
    with pytest.raises(ValueError, match="depth"):
        inspect(outer, depth=-1)


def test_what_is_to_blame_itself_whatever_it_does() -> None:
    for culprit in (Refusing(), Unprintable()):
        good, failures, printed = inspect([culprit], name="the list")
        assert not good
        assert [failure.obj for failure in failures] == [culprit]
        assert "the list" in printed
        assert "KeyError: 'never'" in printed
        assert repr(failures)


def test_circles_end() -> None:
    circle = Holder(lock=threading.Lock())
    circle.itself = circle  # type: ignore[attr-defined]
    assert [failure.name for failure in inspect(circle, depth=10)[1]] == ["lock"]


@pytest.mark.parametrize("fine", [1, "text", len, inspect, Holder(a=1), lambda: 3, [Slotted(1)]])
def test_what_can_be_pickled(fine: Any) -> None:
    good, failures, printed = inspect(fine)
    assert good
    assert failures == set()
    assert "It can be pickled." in printed
