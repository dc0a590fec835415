"""Values as bytes: registered serializers, references in them, and how exceptions travel."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import cloudpickle
import pytest

from shoal_core.protocol.errors import TaskError, UnserializableException
from shoal_core.protocol.ids import ObjectKey
from shoal_core.protocol.records import Failed
from shoal_core.runtime.data import serializers
from shoal_core.runtime.data.failures import MOST_TEXT_CHARACTERS, error_of, failure, lasting_failure
from shoal_core.runtime.data.serialization import Codec, dumps
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.testing.builders import process_id
from shoal_core.testing.runtimes import lone_runtime


class Locked:
    """What pickle does not take."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.lock = threading.Lock()


class MoreLocked(Locked):
    pass


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    yield
    serializers.registered.clear()


@pytest.fixture
def codec() -> Codec:
    return Codec(lambda ref: None)


def number_of(locked: Locked) -> int:
    return locked.number


class TestSerializers:
    def test_instances_of_exactly_the_class_are_pickled_by_it(self, codec: Codec) -> None:
        serializers.register(Locked, number_of, lambda number: Locked(number + 1))
        data = codec.dump({"a": [Locked(3)]}).data
        serializers.deregister(Locked)
        loaded = pickle.loads(data)["a"][0]  # the deserializer travels with the pickle
        assert (type(loaded), loaded.number) == (Locked, 4)
        with pytest.raises(TypeError, match="lock"):
            codec.dump(Locked(3))

    def test_subclasses_are_not(self, codec: Codec) -> None:
        serializers.register(Locked, number_of, Locked)
        with pytest.raises(TypeError, match="lock"):
            codec.dump(MoreLocked(3))

    def test_the_last_one_counts(self, codec: Codec) -> None:
        serializers.register(Locked, number_of, lambda number: "first")
        serializers.register(Locked, number_of, lambda number: "second")
        assert pickle.loads(codec.dump(Locked(1)).data) == "second"
        serializers.deregister(Locked)
        serializers.deregister(Locked)

    def test_code_and_exceptions_are_pickled_by_it_too(self, codec: Codec) -> None:
        serializers.register(Locked, number_of, Locked)
        captured = Locked(5)
        assert pickle.loads(dumps(lambda: captured.number))() == 5
        failed, _ = failure(codec, "task", ValueError(Locked(6)))
        error = error_of(failed)
        assert isinstance(error, ValueError)
        assert error.args[0].number == 6

    def test_a_serializer_that_raises_is_an_error_of_whoever_pickles(self, codec: Codec) -> None:
        def refuse(locked: Locked) -> NoReturn:
            raise KeyError("refused")

        serializers.register(Locked, refuse, Locked)
        with pytest.raises(KeyError, match="refused"):
            codec.dump(Locked(1))

    @pytest.mark.parametrize("wrong", [3, "Locked", list, int, dict, type(None)])
    def test_what_no_serializer_can_be_registered_for(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="class"):
            serializers.register(wrong, number_of, Locked)

    def test_serializers_that_cannot_be_called(self) -> None:
        with pytest.raises(TypeError, match="deserializer of Locked must be callable"):
            serializers.register(Locked, number_of, None)  # type: ignore[arg-type]


async def test_references_are_noted_once_each_and_in_order() -> None:
    async with lone_runtime(process_id(1)) as lone:
        table, codec = lone.runtime.objects, lone.runtime.codec
        refs = [table.create(ObjectKey(key)) for key in range(5_000)]
        dumped = codec.dump([*refs, *reversed(refs)])
        assert list(dumped.references) == refs
        assert list(codec.dump_whole(refs[:3]).references) == refs[:3]


# ------------------------------------------------------------------------------------ exceptions


class NeedsTwo(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class HoldsALock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class ReduceRaises(Exception):
    def __reduce__(self) -> Any:
        raise OSError("no reducing")


class RestoreRaises(Exception):
    def __setstate__(self, state: Any) -> None:
        raise OSError("no restoring")

    def __reduce__(self) -> Any:
        return type(self), self.args, {"some": "state"}


class StrRaises(HoldsALock):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Ends(BaseException):
    """Not an ``Exception``."""


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def travelled(codec: Codec, error: BaseException) -> TaskError:
    failed, _ = failure(codec, "work", raised(error))
    arrived = error_of(failed)
    assert isinstance(arrived, TaskError)
    assert type(error).__name__ in str(arrived)
    assert "in raised" in str(arrived), "the remote traceback is part of the text"
    return arrived


@pytest.mark.parametrize("error", [NeedsTwo(1, 2), HoldsALock("held"), ReduceRaises("text"), RestoreRaises("text")])
def test_an_exception_that_cannot_travel_comes_with_class_text_and_traceback(codec: Codec, error: Exception) -> None:
    arrived = travelled(codec, error)
    assert isinstance(arrived.cause, UnserializableException)
    assert isinstance(arrived, UnserializableException)
    assert f"{type(error).__name__}: {error}" in str(arrived.cause)


def test_an_exception_without_a_text_travels_as_its_class(codec: Codec) -> None:
    assert "StrRaises" in str(travelled(codec, StrRaises("hidden")).cause)


@pytest.mark.parametrize("error", [Ends("over"), KeyboardInterrupt("stop"), SystemExit(3), GeneratorExit()])
def test_exceptions_that_are_not_errors_travel(codec: Codec, error: BaseException) -> None:
    arrived = travelled(codec, error)
    assert isinstance(arrived, type(error))
    assert arrived.cause.args == error.args


def test_groups_travel_with_what_is_in_them(codec: Codec) -> None:
    arrived = travelled(codec, ExceptionGroup("several", [ValueError("one"), KeyError("two")]))
    assert isinstance(arrived.cause, ExceptionGroup)
    assert [type(error) for error in arrived.cause.exceptions] == [ValueError, KeyError]
    assert "ValueError: one" in str(arrived)
    with pytest.raises(ExceptionGroup) as caught:
        raise arrived
    assert caught.value.split(ValueError)[0] is not None
    assert isinstance(travelled(codec, ExceptionGroup("mixed", [HoldsALock("held")])).cause, UnserializableException)


def test_causes_in_a_circle(codec: Codec) -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    arrived = travelled(codec, first)
    assert isinstance(arrived, ValueError)
    assert "second" in str(arrived)


def test_a_huge_text_is_cut_and_the_exception_is_whole(codec: Codec) -> None:
    arrived = travelled(codec, ValueError("x" * 5_000_000))
    assert len(str(arrived)) < MOST_TEXT_CHARACTERS + 1_000
    assert "characters were left out" in str(arrived)
    assert len(arrived.cause.args[0]) == 5_000_000
    held = travelled(codec, HoldsALock("x" * 5_000_000))
    assert len(str(held.cause)) < MOST_TEXT_CHARACTERS + 1_000


def test_an_exception_that_this_process_cannot_unpickle(codec: Codec) -> None:
    data = cloudpickle.dumps(TaskError("work", "the text", ValueError("x"))).replace(b"TaskError", b"TaskErrol")
    error = error_of(Failed("task", "the text", data))
    assert isinstance(error, TaskError)
    assert "the text" in str(error)
    assert "cannot be unpickled in this process" in str(error)
    assert isinstance(error.cause, UnserializableException)


def test_an_exception_that_outlives_its_process_is_the_same() -> None:
    text, data = lasting_failure("Actor.__init__", raised(HoldsALock("held")))
    assert "HoldsALock: held" in text
    assert isinstance(pickle.loads(data).cause, UnserializableException)


async def test_references_inside_an_exception_are_named_and_held() -> None:
    async with lone_runtime(process_id(1)) as lone:
        ref: ObjectRef[Any] = lone.runtime.objects.create(ObjectKey(1))
        lone.runtime.install()
        failed, pickled = failure(lone.runtime.codec, "work", ValueError("see", ref))
        lone.runtime.uninstall()
        assert failed.contained == (ref._state.wire(),)
        assert list(pickled.references) == [ref]
        assert lone.reactor.pinned == [], "nothing is kept until the job ends"
