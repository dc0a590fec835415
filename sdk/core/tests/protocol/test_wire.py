"""Control messages and refusals as bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.errors import InvalidRequestError, NotFoundError, ServiceError, ShoalError
from shoal_core.protocol.messages import (
    Done,
    DurableChunk,
    DurablePutChunk,
    JobRecord,
    KvGet,
    KvPut,
    KvValue,
    LeaseRequest,
    NodeRecord,
    Refusal,
)
from shoal_core.protocol.wire import decode, decode_reply, encode


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
