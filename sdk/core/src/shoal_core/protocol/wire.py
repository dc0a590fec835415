"""How control messages and their answers look on the wire: JSON, and a ``Refusal`` in place of any answer.

A refusal is told from an answer by its shape alone: an object with exactly the fields ``code`` and ``detail``, which
no other message has.

A message with a bulk field is the JSON of its other fields, a newline, and then the bytes of that field as they are: a
megabyte in base64 would take a third more room, and a hundred times as long.

Messages that come in crowds (``Message.packs``) may be sent as a *packet*: a JSON array of them. Its answer is the
array of theirs, in their order, each of which may be a ``Refusal``; or one ``Refusal`` of all. What is in a packet is
handled as if it had come in messages of its own, except that it gets lost together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from shoal_core.protocol.errors import InvalidRequestError, ServiceError, ShoalError, from_wire, wire_code
from shoal_core.protocol.messages import Message, Refusal

M = TypeVar("M", bound=Message)

MOST_PACKED = 128
MOST_PACKED_BYTES = 256 * 1024
"""A packet is closed when it is so large; its answer is to fit into one message too."""

_REFUSAL_START = b'{"code":'
_PACKET_START = b"["


def encode(message: Message | ShoalError) -> bytes:
    """Return a message as JSON; an error becomes a ``Refusal`` with its wire code."""
    if isinstance(message, ShoalError):
        message = Refusal(code=wire_code(message), detail=str(message))
    if message.bulk_field:
        others = message.__pydantic_serializer__.to_json(message, exclude={message.bulk_field})
        return b"".join((others, b"\n", getattr(message, message.bulk_field)))
    return message.__pydantic_serializer__.to_json(message)


def decode(model: type[M], data: bytes) -> M:
    """Return the message that ``data`` holds; ``InvalidRequestError`` names the field that is wrong."""
    try:
        return _validated(model, data)
    except ValidationError as error:
        raise InvalidRequestError(f"not a valid {model.__name__}: {_explain(error)}") from None


def decode_reply(model: type[M], data: bytes) -> M:
    """Return the answer that ``data`` holds, or raise the error that was sent in its place.

    An answer that is neither is a ``ServiceError``: the peer speaks another protocol.
    """
    if data.startswith(_REFUSAL_START):
        refusal = Refusal.model_validate_json(data)
        raise from_wire(refusal.code, refusal.detail)
    try:
        return _validated(model, data)
    except ValidationError as error:
        raise ServiceError(
            f"the answer is not a valid {model.__name__}: {_explain(error)}; "
            "the service may run another version of Shoal"
        ) from None


def pack(encoded: Sequence[bytes]) -> bytes:
    """Return a packet of messages, or answers, that are encoded; a single one stays as it is."""
    return encoded[0] if len(encoded) == 1 else b"[" + b",".join(encoded) + b"]"


def packets(messages: Iterable[Message]) -> Iterator[tuple[int, bytes]]:
    """Yield packets of messages in their order, each with how many are in it."""
    encoded: list[bytes] = []
    size_bytes = 0
    for message in messages:
        data = encode(message)
        if encoded and (len(encoded) == MOST_PACKED or size_bytes + len(data) > MOST_PACKED_BYTES):
            yield len(encoded), pack(encoded)
            encoded, size_bytes = [], 0
        encoded.append(data)
        size_bytes += len(data)
    if encoded:
        yield len(encoded), pack(encoded)


def decode_packet(model: type[M], data: bytes) -> list[M]:
    """Return the messages of a packet, or the one message that ``data`` holds; raises as ``decode``."""
    if not data.startswith(_PACKET_START):
        return [decode(model, data)]
    try:
        return _list_of(model).validate_json(data)
    except ValidationError as error:
        raise InvalidRequestError(f"not a valid packet of {model.__name__}: {_explain(error)}") from None


def decode_replies(model: type[M], data: bytes, count: int) -> list[M | ShoalError]:
    """Return the answers to a packet of ``count`` requests; what was refused as the error that it means."""
    if not data.startswith(_PACKET_START):
        try:
            answer: M | ShoalError = decode_reply(model, data)
        except ShoalError as error:
            answer = error
        return [answer] * count
    try:
        answers = _answers_of(model).validate_json(data)
    except ValidationError as error:
        unreadable = ServiceError(f"the answer is not a valid packet of {model.__name__}: {_explain(error)}")
        return [unreadable] * count
    if len(answers) != count:
        return [ServiceError(f"{count} requests have {len(answers)} answers")] * count
    return [from_wire(item.code, item.detail) if isinstance(item, Refusal) else item for item in answers]


@cache
def _list_of(model: type[M]) -> TypeAdapter[list[M]]:
    return TypeAdapter(list[model])  # type: ignore[valid-type]


@cache
def _answers_of(model: type[M]) -> TypeAdapter[list[Any]]:
    # The first that is valid is taken; no message is valid as both.
    return TypeAdapter(list[Annotated[model | Refusal, Field(union_mode="left_to_right")]])  # type: ignore[valid-type]


def _validated(model: type[M], data: bytes) -> M:
    """Return the message that ``data`` holds, or raise pydantic's error."""
    if not model.bulk_field:
        return model.model_validate_json(data)
    others, newline, bulk = data.partition(b"\n")
    try:
        fields = from_json(others)
    except ValueError:
        return model.model_validate_json(others)  # it says what is wrong with the JSON
    if isinstance(fields, dict):
        fields.pop(model.bulk_field, None)
        if newline:
            fields[model.bulk_field] = bulk
    return model.model_validate(fields)


def _explain(error: ValidationError) -> str:
    """Return what is wrong with which fields, in one line."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'message'}: {p['msg']}" for p in problems[:5])
