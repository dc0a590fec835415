"""How control messages and their answers look on the wire: JSON, and a ``Refusal`` in place of any answer.

A refusal is told from an answer by its shape alone: an object with exactly the fields ``code`` and ``detail``, which
no other message has.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError

from shoal_core.protocol.errors import InvalidRequestError, ServiceError, ShoalError, from_wire, wire_code
from shoal_core.protocol.messages import Message, Refusal

M = TypeVar("M", bound=Message)

_REFUSAL_START = b'{"code":'


def encode(message: Message | ShoalError) -> bytes:
    """Return a message as JSON; an error becomes a ``Refusal`` with its wire code."""
    if isinstance(message, ShoalError):
        message = Refusal(code=wire_code(message), detail=str(message))
    return message.__pydantic_serializer__.to_json(message)


def decode(model: type[M], data: bytes) -> M:
    """Return the message that ``data`` holds; ``InvalidRequestError`` names the field that is wrong."""
    try:
        return model.model_validate_json(data)
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
        return model.model_validate_json(data)
    except ValidationError as error:
        raise ServiceError(
            f"the answer is not a valid {model.__name__}: {_explain(error)}; "
            "the service may run another version of Shoal"
        ) from None


def _explain(error: ValidationError) -> str:
    """Return what is wrong with which fields, in one line."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'message'}: {p['msg']}" for p in problems[:5])
