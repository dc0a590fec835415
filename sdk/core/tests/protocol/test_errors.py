"""The tree of errors, and their codes on the wire."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from shoal_core.protocol import errors
from shoal_core.protocol.errors import (
    WIRE_ERRORS,
    JetStreamError,
    RevisionConflict,
    ServiceError,
    ShoalError,
    TaskError,
    from_wire,
    wire_code,
)

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
ERRORS = {name: value for name, value in CLASSES.items() if issubclass(value, ShoalError)}
SIMPLE = [kind for kind in ERRORS.values() if kind not in (TaskError, RevisionConflict, JetStreamError)]


def tree() -> str:
    assert errors.__doc__ is not None
    return errors.__doc__.partition("::\n")[2].partition("The caller's fault")[0]


def listed() -> list[str]:
    """Return the names of classes in the tree of the docstring; what stands in parentheses is a base or an alias."""
    without_bases = re.sub(r"\([^)]*\)", "", tree())
    return re.findall(
        r"(?<![\w.])([A-Z]\w+(?:Error_?|Exception|Conflict|Exit|Removed|Exceeded|NotAvailable))", without_bases
    )


def test_every_class_of_the_tree_exists() -> None:
    assert [name for name in listed() if name not in ERRORS] == []


def test_every_class_stands_in_the_tree_once() -> None:
    names = listed()
    assert sorted(names) == sorted(set(names))
    kinds = {name for name in ERRORS if name.startswith("ObjectReconstructionFailed") and name not in names}
    assert {issubclass(ERRORS[name], errors.ObjectReconstructionFailedError) for name in kinds} == {True}, "its kinds"
    assert set(ERRORS) - kinds == set(names)


def test_the_tree_shows_who_is_whose_child() -> None:
    parents: dict[str, str] = {}
    branch = ""
    for line in tree().splitlines():
        match = re.match(r"\s*(│?)\s*[├└]── (\w+)", line)
        if match is not None and match[1]:
            parents[match[2]] = branch
        elif match is not None:
            branch = match[2]
            parents[branch] = "ShoalError"
    assert len(parents) > 30
    assert {name: ERRORS[name].__bases__[0].__name__ for name in parents} == parents


def test_the_tree_names_the_builtin_bases() -> None:
    bases = dict(re.findall(r"(\w+) \((\w+)\)", tree()))
    for name, kind in ERRORS.items():
        builtin = [
            base.__name__ for base in kind.__bases__ if not issubclass(base, ShoalError) and base is not Exception
        ]
        if builtin and name in bases:
            assert bases[name] in [*builtin, "RayChannelTimeoutError"]


@pytest.mark.parametrize("code", sorted(set(WIRE_ERRORS) - {"task"}))
def test_a_code_maps_back_and_forth(code: str) -> None:
    error = from_wire(code, "what, where, why")
    assert type(error) is WIRE_ERRORS[code]
    assert str(error) == "what, where, why"
    assert wire_code(error) == code


def test_codes_are_short_words_and_no_class_has_two() -> None:
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in WIRE_ERRORS)
    assert len(set(WIRE_ERRORS.values())) == len(WIRE_ERRORS)


@pytest.mark.parametrize("kind", SIMPLE, ids=lambda kind: kind.__name__)
def test_every_error_crosses_as_its_nearest_class_that_has_a_code(kind: type[ShoalError]) -> None:
    back = from_wire(wire_code(kind("text")), "text")
    with_code = [parent for parent in kind.__mro__ if parent in WIRE_ERRORS.values()]
    assert type(back) is (with_code[0] if with_code else ServiceError)


def test_an_unknown_code_says_so() -> None:
    error = from_wire("from_the_future", "text")
    assert type(error) is ServiceError
    assert str(error) == "text (the peer sent the unknown error code 'from_the_future')"


def test_a_task_error_cannot_be_made_of_a_code_alone() -> None:
    error = TaskError("f", "Traceback …", ValueError("cause"))
    assert wire_code(error) == "task"
    without = from_wire("task", "text")
    assert type(without) is ServiceError
    assert str(without) == "text (the peer sent the error of a task, without the exception that belongs to it)"


@pytest.mark.parametrize("kind", SIMPLE, ids=lambda kind: kind.__name__)
def test_an_error_says_what_it_means_and_survives_pickling(kind: type[ShoalError]) -> None:
    assert kind.__doc__
    error = pickle.loads(pickle.dumps(kind("text")))
    assert type(error) is kind
    assert str(error) == "text"


def test_errors_that_carry_more_survive_pickling() -> None:
    conflict = pickle.loads(pickle.dumps(RevisionConflict("late", "key", b"value", 7)))
    assert (str(conflict), conflict.key, conflict.value, conflict.revision) == ("late", "key", b"value", 7)
    refused = pickle.loads(pickle.dumps(JetStreamError("full", 503, 10077)))
    assert (str(refused), refused.code, refused.error_code) == ("full", 503, 10077)


def test_a_task_error_is_also_an_instance_of_its_cause() -> None:
    error = TaskError("f", "Traceback of f", KeyError("missing")).as_instanceof_cause()
    assert isinstance(error, KeyError)
    assert isinstance(error, TaskError)
    assert str(error) == "Traceback of f"
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, KeyError)
    assert again.args == ("missing",)


def test_what_is_raised_for_a_lack_of_memory_is_an_instance_of_it() -> None:
    """Its class makes its instances in a way of its own, unlike others of the same layout."""
    error = TaskError("f", "Traceback of f", MemoryError("too much")).as_instanceof_cause()
    assert isinstance(error, MemoryError)
    assert (error.args, str(error)) == (("too much",), "Traceback of f")
