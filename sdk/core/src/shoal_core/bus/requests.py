"""Asking a service, with patience: control requests are idempotent, so one that got lost is simply sent again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from shoal_core.bus.interface import Bus
from shoal_core.bus.interface import Message as Answer
from shoal_core.bus.tracing import message_headers
from shoal_core.protocol.errors import DisconnectedError, NoRespondersError, RequestTimeoutError, ShoalError
from shoal_core.protocol.messages import Message
from shoal_core.protocol.traces import headers_of
from shoal_core.protocol.verbs import REPLIES
from shoal_core.protocol.wire import decode_replies, decode_reply, encode

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5


async def ask(
    bus: Bus,
    subject: str,
    message: Message,
    timeout_seconds: float = 10.0,
    attempts: int | None = None,
    trace: str = "",
    absent_seconds: float | None = None,
) -> Message:
    """Send a request and return its answer; sent again until ``timeout_seconds`` are over or ``attempts`` were made.

    What makes it send again is a lost connection, nobody who listens (so long as ``absent_seconds``, where that is
    given), or no answer in its share of the time (an equal part of it where ``attempts`` is given, else 2 s). Raises
    the service's refusal, or the last of those errors. The request belongs to ``trace``, or to what happens here now.
    """
    headers = headers_of(trace) if trace else message_headers()
    answer = await _patiently(bus, subject, encode(message), headers, timeout_seconds, attempts, absent_seconds)
    return decode_reply(REPLIES[type(message)], answer.data)


async def ask_packed(
    bus: Bus, subject: str, model: type[Message], packet: bytes, count: int, timeout_seconds: float = 10.0
) -> list[Message | ShoalError]:
    """Send a packet of ``count`` requests of one kind and return their answers in its order; sent again as in ``ask``.

    Raises where the packet as a whole could not be asked for; what was refused is among the answers.
    """
    answer = await _patiently(bus, subject, packet, message_headers(), timeout_seconds, None, None)
    return decode_replies(REPLIES[model], answer.data, count)


async def _patiently(
    bus: Bus,
    subject: str,
    data: bytes,
    headers: Mapping[str, str] | None,
    timeout_seconds: float,
    attempts: int | None,
    absent_seconds: float | None,
) -> Answer:
    began = time.monotonic()
    deadline = began + timeout_seconds
    absent_until = deadline if absent_seconds is None else began + absent_seconds
    share_seconds = timeout_seconds / attempts if attempts else 2.0
    pause_seconds = FIRST_PAUSE_SECONDS
    made = 0
    while True:
        left_seconds = deadline - time.monotonic()
        try:
            patience_seconds = max(0.001, min(share_seconds, left_seconds))
            return await bus.request(subject, data, timeout_seconds=patience_seconds, headers=headers)
        except (DisconnectedError, NoRespondersError, RequestTimeoutError) as error:
            made += 1
            until = absent_until if isinstance(error, NoRespondersError) else deadline
            if made == attempts or time.monotonic() + pause_seconds >= until:
                raise
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
