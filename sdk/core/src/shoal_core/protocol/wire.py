"""How control messages and their answers look on the wire: JSON, and a ``Refusal`` in place of any answer.

A refusal is told from an answer by its shape alone: an object with exactly the fields ``code`` and ``detail``, which
no other message has.

A message with a bulk field is the JSON of its other fields, a newline, and then the bytes of that field as they are: a
megabyte in base64 would take a third more room, and a hundred times as long.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from shoal_core.protocol.errors import InvalidRequestError, ServiceError, ShoalError, from_wire, wire_code
from shoal_core.protocol.messages import Message, Refusal

M = TypeVar("M", bound=Message)

_REFUSAL_START = b'{"code":'


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
