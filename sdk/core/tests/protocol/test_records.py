"""Records on the wire: whole, and readable by whoever knows fewer or more fields."""

from __future__ import annotations

import gc
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.ids import FunctionId, LeaseId, ObjectKey, TaskNumber
from shoal_core.protocol.records import (
    Failed,
    Inline,
    Record,
    Reference,
    Stored,
    Task,
    TaskDone,
    Value,
    contained_in,
    decode,
    encode,
)
from shoal_core.testing.builders import process_id

KINDS: tuple[type[msgspec.Struct], ...] = get_args(Record)

FIRST_FIELDS = {
    1: "number attempt lease position function name returns arguments dependencies retry_on trace depth",
    2: "number attempt lease values seconds retryable kept",
    3: "lease numbers blocked",
    4: "lease blocked",
    5: "lease owner job resources gpus config",
    6: "lease key slot worker",
    7: "lease kill",
    8: "lease",
    9: "lease begun reason out_of_memory",
    10: "pid",
    11: "key",
    12: "key value",
    13: "key",
    14: "key",
    15: "key count",
    16: "transfer",
    17: "transfer references",
    18: "segment",
    19: "segment serial",
    20: "segment owner",
    21: "key node",
    22: "",
}
"""What each record began with when its kind was made: a peer of that version still sends and expects just these."""


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for a field's type."""
    if hasattr(hint, "__supertype__"):
        return values_of(hint.__supertype__)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return records_of(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**64 - 1),
        str: st.text(),
        bytes: st.binary(),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
    }
    return simple[hint]


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    factory: Any = field.default_factory
    return field.default if factory is msgspec.NODEFAULT else factory()


def records_of(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in msgspec.structs.fields(kind)})


by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@by_kind
def test_a_record_comes_back_as_it_was(kind: type[msgspec.Struct]) -> None:
    @given(record=records_of(kind))
    def holds(record: Any) -> None:
        assert decode(encode([record])) == [record]

    holds()


@given(st.lists(st.one_of(*map(records_of, KINDS)), max_size=5))
def test_a_batch_keeps_its_order(records: list[Any]) -> None:
    assert decode(encode(records)) == records


@by_kind
def test_a_record_of_an_older_peer_lacks_the_last_fields_and_is_read(kind: type[msgspec.Struct]) -> None:
    fields = msgspec.structs.fields(kind)
    optional = [field for field in fields if not field.required]

    @given(record=records_of(kind), missing=st.integers(0, len(optional)))
    def holds(record: Any, missing: int) -> None:
        [array] = msgspec.msgpack.decode(encode([record]))
        old = msgspec.msgpack.encode([array[: len(array) - missing]])
        defaults = {field.name: default_of(field) for field in fields[len(fields) - missing :]}
        assert decode(old) == [msgspec.structs.replace(record, **defaults)]

    holds()


@by_kind
def test_a_record_of_a_newer_peer_has_more_fields_and_is_read(kind: type[msgspec.Struct]) -> None:
    @given(record=records_of(kind))
    def holds(record: Any) -> None:
        [array] = msgspec.msgpack.decode(encode([record]))
        assert decode(msgspec.msgpack.encode([[*array, "new"]])) == [record]

    holds()


@by_kind
def test_fields_are_added_at_the_end_and_with_a_default(kind: type[msgspec.Struct]) -> None:
    tag = kind.__struct_config__.tag
    assert isinstance(tag, int)
    if tag > max(FIRST_FIELDS):
        assert tag <= len(KINDS), "tags are given out without gaps"
        return
    fields = msgspec.structs.fields(kind)
    first = FIRST_FIELDS[tag].split()
    assert [field.name for field in fields[: len(first)]] == first
    assert not any(field.required for field in fields[len(first) :])


def test_tags_are_numbers_that_are_used_once() -> None:
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(tags) == len(set(tags))
    assert set(tags) == set(range(1, len(KINDS) + 1))


@by_kind
def test_a_record_says_who_sends_it_to_whom(kind: type[msgspec.Struct]) -> None:
    assert kind.__doc__ is not None
    assert " → " in kind.__doc__


@pytest.mark.parametrize(
    "data", [b"", b"\x91", b"\xff", msgspec.msgpack.encode([[99]]), msgspec.msgpack.encode([["x"]])]
)
def test_bytes_that_are_no_records_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(data)


def test_a_field_of_another_type_is_refused_by_its_place() -> None:
    with pytest.raises(msgspec.ValidationError, match="Expected `int`"):
        decode(msgspec.msgpack.encode([[10, "pid"]]))


@given(values_of(Value))
def test_the_references_in_a_value_are_those_it_names(value: Inline | Stored | Failed) -> None:
    contained = contained_in(value)
    assert contained == value.contained
    assert all(isinstance(reference, Reference) for reference in contained)


def test_the_garbage_collector_leaves_records_of_tasks_alone() -> None:
    """There may be a million of them, and gone through again and again they would cost a task a tenth of its time."""
    made = Task(TaskNumber(2), 0, LeaseId(1), 1, FunctionId("f"), "f", 1, Inline(b"x"), (Inline(b"y"),))
    done = TaskDone(TaskNumber(2), 0, LeaseId(1), (Failed("code", "text"),), 0.1)
    own = [made, done, made.arguments, *made.dependencies, *done.values, Reference(process_id(1), ObjectKey(1))]
    assert not any(map(gc.is_tracked, own))
