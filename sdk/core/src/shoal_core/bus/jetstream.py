"""JetStream over a bus: streams, messages stored in them, and the errors of its API.

This speaks JetStream's JSON API by ordinary requests, so that it works alike over every implementation of the bus.
Every call waits for the broker's answer; a lost connection fails it at once.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.wire import parse_headers
from shoal_core.protocol.errors import (
    BusError,
    JetStreamError,
    JetStreamUnavailableError,
    NoRespondersError,
    RequestTimeoutError,
)

API = "$JS.API"
CALL_SECONDS = 10.0
MAKING_SECONDS = (2.0, 5.0, CALL_SECONDS)
"""How long a stream or a consumer that is asked for is waited for, each time that it is."""
NOT_FOUND = 404
NAME_IN_USE = 10058
WRONG_LAST_SEQUENCE = (10071, 10164)
NOT_ENABLED = (10039, 10076)
EXPECTED_REVISION_HEADER = "Nats-Expected-Last-Subject-Sequence"


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message in a stream; ``sequence`` is its number there."""

    subject: str
    sequence: int
    data: bytes
    headers: Mapping[str, str]


T = TypeVar("T")

Acknowledged = Callable[[int | BusError | JetStreamUnavailableError], None]


async def until_answered(ask: Callable[[float], Awaitable[T]]) -> T:
    """Ask for a stream or a consumer until there is an answer; ``ask`` is given how many seconds to wait for it.

    It is asked for again since the answer is sent once, by the server that comes to lead what is made, and one that is
    lost does not come again. To ask twice must do no harm.
    """
    for seconds in MAKING_SECONDS[:-1]:
        with contextlib.suppress(RequestTimeoutError):
            return await ask(seconds)
    return await ask(MAKING_SECONDS[-1])


class JetStream:
    """JetStream's API as seen from one connection."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def call(self, verb: str, body: Mapping[str, Any], timeout_seconds: float = CALL_SECONDS) -> dict[str, Any]:
        """Return the answer of the API to ``$JS.API.<verb>``.

        Raises ``JetStreamError`` with the codes of its error, ``JetStreamUnavailableError`` where JetStream does not
        run or is not open to this account, and the errors of ``Bus.request``.
        """
        try:
            reply = await self.bus.request(
                f"{API}.{verb}", json.dumps(body).encode() if body else b"", timeout_seconds=timeout_seconds
            )
        except NoRespondersError:
            raise _unavailable("nobody answers its API") from None
        return _checked(json.loads(reply.data), verb)

    async def ensure_stream(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """Make a stream unless it exists; return its configuration as the broker has it.

        One that exists is left as it is, also when it was made with another configuration.
        """
        name = configuration["name"]
        try:
            answer = await until_answered(lambda seconds: self.call(f"STREAM.CREATE.{name}", configuration, seconds))
        except JetStreamError as error:
            if error.error_code != NAME_IN_USE:
                raise
            answer = await self.call(f"STREAM.INFO.{name}", {})
        found: dict[str, Any] = answer["config"]
        return found

    async def stream_exists(self, name: str) -> bool:
        """Tell whether there is a stream of this name."""
        try:
            await self.call(f"STREAM.INFO.{name}", {})
        except JetStreamError as error:
            if error.code == NOT_FOUND:
                return False
            raise
        return True

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        expected_revision: int | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> int:
        """Store a message in the stream that holds ``subject``; return its sequence once it is acknowledged.

        With ``expected_revision`` only if the last message on the subject has this sequence (0: there is none). Where
        the connection is lost before the acknowledgement, the message may or may not have been stored.
        """
        if expected_revision is not None:
            headers = {**(headers or {}), EXPECTED_REVISION_HEADER: str(expected_revision)}
        reply = await self.bus.request(subject, data, timeout_seconds=timeout_seconds, headers=headers)
        return _sequence(reply, subject)

    def begin_publish(
        self, subject: str, data: bytes, acknowledged: Acknowledged, *, headers: dict[str, str], expected_revision: int
    ) -> None:
        """Do what ``publish`` does without waiting; ``acknowledged`` is called with the sequence, or with an error."""

        def settled(reply: Message | BusError) -> None:
            try:
                outcome: int | BusError | JetStreamUnavailableError = (
                    _sequence(reply, subject) if isinstance(reply, Message) else reply
                )
            except (JetStreamError, JetStreamUnavailableError) as error:
                outcome = error
            acknowledged(outcome)

        headers[EXPECTED_REVISION_HEADER] = str(expected_revision)
        self.bus.call(subject, data, settled, timeout_seconds=CALL_SECONDS, headers=headers)

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """Return the last message on a subject, read through the stream's leader: it shows every write before it."""
        try:
            answer = await self.call(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject})
        except JetStreamError as error:
            if error.code == NOT_FOUND:
                return None
            raise
        found = answer["message"]
        return StoredMessage(
            found["subject"],
            found["seq"],
            base64.b64decode(found.get("data", "")),
            parse_headers(base64.b64decode(found["hdrs"])) if "hdrs" in found else {},
        )

    async def purge(self, stream: str, subject: str, *, below_sequence: int | None = None) -> int:
        """Delete all messages on a subject pattern (below a sequence if given); return how many there were."""
        body: dict[str, Any] = {"filter": subject}
        if below_sequence is not None:
            body["seq"] = below_sequence
        purged: int = (await self.call(f"STREAM.PURGE.{stream}", body)).get("purged", 0)
        return purged


def _sequence(reply: Message, subject: str) -> int:
    """Return the sequence that an acknowledgement tells, or raise the error it carries."""
    sequence: int = _checked(msgspec.json.decode(reply.data), subject)["seq"]
    return sequence


def _checked(answer: dict[str, Any], what: str) -> dict[str, Any]:
    """Return an answer of the API, or raise the error it carries."""
    error = answer.get("error")
    if error is None:
        return answer
    code, error_code = error.get("code", 0), error.get("err_code", 0)
    if error_code in NOT_ENABLED:
        raise _unavailable(error.get("description", ""))
    raise JetStreamError(f"JetStream refused {what}: {error.get('description')} ({error_code})", code, error_code)


def _unavailable(why: str) -> JetStreamUnavailableError:
    return JetStreamUnavailableError(
        f"the broker has no JetStream for this account ({why}); Shoal keeps its records there: "
        "start nats-server with `--jetstream`, or enable it for the account"
    )
