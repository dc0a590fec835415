"""Control messages and refusals as bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.errors import InvalidRequestError, NotFoundError, ServiceError, ShoalError
from shoal_core.protocol.groups import RemoveGroup
from shoal_core.protocol.ids import PlacementGroupId
from shoal_core.protocol.messages import Done, JobRecord, KvGet, KvPut, KvValue, NodeRecord, Refusal
from shoal_core.protocol.scheduling import LeaseRequest
from shoal_core.protocol.storage import DurableChunk, DurablePutChunk
from shoal_core.protocol.wire import (
    MOST_PACKED,
    MOST_PACKED_BYTES,
    decode,
    decode_packet,
    decode_replies,
    decode_reply,
    encode,
    pack,
    packets,
)


@given(st.text(), st.text(), st.binary(), st.booleans())
def test_a_message_comes_back_as_it_was(namespace: str, key: str, value: bytes, overwrite: bool) -> None:
    message = KvPut(namespace=namespace, key=key, value=value, overwrite=overwrite)
    assert decode(KvPut, encode(message)) == message


@given(st.none() | st.binary())
def test_an_answer_comes_back_as_it_was(value: bytes | None) -> None:
    assert decode_reply(KvValue, encode(KvValue(value=value))) == KvValue(value=value)
    assert decode_reply(Done, encode(Done())) == Done()


@given(st.text())
def test_an_error_in_place_of_an_answer_is_raised_as_what_it_was(text: str) -> None:
    with pytest.raises(NotFoundError) as error:
        decode_reply(Done, encode(NotFoundError(text)))
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b'{"namespace":"n"}', ["KvGet", "key: Field required"]),
        (b'{"namespace":1,"key":"k"}', ["namespace: Input should be a valid string"]),
        (b'{"namespace":"n","key":"k","more":1}', ["more: Extra inputs"]),
        (b"{", ["message: Invalid JSON"]),
        (b"\xff", ["message: Invalid JSON"]),
        (b"[]", ["message: "]),
        (b"", ["message: "]),
        (b"{}", ["namespace: Field required; key: Field required"]),
    ],
)
def test_a_wrong_request_is_refused_by_the_name_of_its_field(data: bytes, names: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as error:
        decode(KvGet, data)
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


def test_a_field_deep_inside_is_named_by_its_path() -> None:
    request = {"scheduler": "s", "owner": "o", "job_id": "j", "key": 1, "slots": [1], "resources": {"CPU": "many"}}
    with pytest.raises(InvalidRequestError, match=r"resources\.CPU: Input should be a valid integer"):
        decode(LeaseRequest, json.dumps(request).encode())


def test_bytes_that_are_no_base64_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="value: "):
        decode(KvPut, b'{"namespace":"x","key":"y","value":"!"}')


def test_a_message_with_much_wrong_names_five_fields_at_most() -> None:
    with pytest.raises(InvalidRequestError) as error:
        decode(JobRecord, b"{}")
    assert str(error.value).count("Field required") == 5


@pytest.mark.parametrize("data", [b"", b"{", b'{"unexpected":1}', b"null"])
def test_an_answer_that_is_none_is_the_services_fault(data: bytes) -> None:
    with pytest.raises(ServiceError, match=r"not a valid NodeRecord: .*another version"):
        decode_reply(NodeRecord, data)


def test_a_refusal_has_a_code_and_a_text() -> None:
    assert json.loads(encode(NotFoundError("no such thing"))) == {"code": "not_found", "detail": "no such thing"}
    assert decode(Refusal, encode(ShoalError("odd"))) == Refusal(code="service", detail="odd")


@pytest.mark.parametrize("data", [b"", b"\n", b"{}\n{}", bytes(range(256))])
def test_bulk_bytes_travel_as_they_are(data: bytes) -> None:
    message = DurablePutChunk(object_id="x", index=3, data=data)
    assert encode(message).endswith(b"\n" + data)
    assert decode(DurablePutChunk, encode(message)) == message
    assert decode_reply(DurableChunk, encode(DurableChunk(data=data))) == DurableChunk(data=data)


@pytest.mark.parametrize("data", [b"", b"no json\nx", b'{"object_id":"x"}\nx', b'{"object_id":"x","index":0}', b"[]\n"])
def test_a_message_with_bulk_bytes_that_is_wrong_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="DurablePutChunk"):
        decode(DurablePutChunk, data)


def removals(sizes: list[int]) -> list[RemoveGroup]:
    return [RemoveGroup(group_id=PlacementGroupId(f"{i:032x}"), reason="r" * size) for i, size in enumerate(sizes)]


@given(st.lists(st.sampled_from([0, 10, MOST_PACKED_BYTES // 3, MOST_PACKED_BYTES + 1]), max_size=3 * MOST_PACKED))
def test_packets_hold_all_messages_in_their_order_and_are_bounded(sizes: list[int]) -> None:
    messages = removals(sizes)
    sent = list(packets(messages))
    assert [message for _, data in sent for message in decode_packet(RemoveGroup, data)] == messages
    for count, data in sent:
        assert count == len(decode_packet(RemoveGroup, data)) <= MOST_PACKED
        assert count == 1 or len(data) <= MOST_PACKED_BYTES + 2 * MOST_PACKED


def test_of_a_packet_each_request_has_its_answer_or_its_error() -> None:
    answers: list[KvValue | ShoalError] = [KvValue(value=b"a"), NotFoundError("there is none"), KvValue(value=None)]
    first, second, third = decode_replies(KvValue, pack([encode(answer) for answer in answers]), 3)
    assert (first, third) == (answers[0], answers[2])
    assert isinstance(second, NotFoundError)
    assert str(second) == "there is none"
    assert decode_replies(KvValue, encode(answers[0]), 1) == [answers[0]]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encode(InvalidRequestError("not a packet")), InvalidRequestError),
        (pack([encode(Done())]), ServiceError),
        (pack([encode(KvValue(value=None))] * 3), ServiceError),
        (b"[{}, {}]", ServiceError),
        (b"[", ServiceError),
    ],
)
def test_an_answer_that_is_not_one_of_the_packet_is_an_error_of_all_of_it(data: bytes, kind: type[ShoalError]) -> None:
    answers = decode_replies(KvValue, data, 2)
    assert len(answers) == 2
    assert all(isinstance(answer, kind) for answer in answers)


def test_a_packet_with_something_else_in_it_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"not a valid packet of KvGet: 1\.key: Field required"):
        decode_packet(KvGet, b'[{"namespace":"n","key":"k"},{"namespace":"n"}]')
