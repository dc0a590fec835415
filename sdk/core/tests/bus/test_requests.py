"""Asking with patience: what is asked again, and for how long."""

from __future__ import annotations

from unittest.mock import AsyncMock

import pytest

from shoal_core.bus.interface import Message
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import NoRespondersError, RequestTimeoutError
from shoal_core.protocol.messages import Done
from shoal_core.protocol.storage import DurableDelete
from shoal_core.protocol.wire import encode

REQUEST = DurableDelete(object_id="0" * 48, holder="put")
ANSWER = Message("subject", "", encode(Done()))


def bus(*answers: object) -> AsyncMock:
    """Return a bus on which requests end so, one after the other."""
    one = AsyncMock()
    one.request.side_effect = answers
    return one


async def test_who_is_not_there_is_asked_again_and_so_is_who_is_slow() -> None:
    one = bus(NoRespondersError("nobody"), RequestTimeoutError("late"), ANSWER)
    assert await ask(one, "subject", REQUEST, 60) == Done()


async def test_who_is_absent_may_be_waited_for_less_long_than_who_is_slow() -> None:
    one = bus(NoRespondersError("nobody"), ANSWER)
    with pytest.raises(NoRespondersError):
        await ask(one, "subject", REQUEST, 60, absent_seconds=0.001)
    assert one.request.await_count == 1
    one = bus(RequestTimeoutError("late"), ANSWER)
    assert await ask(one, "subject", REQUEST, 60, absent_seconds=0.001) == Done()


async def test_attempts_are_counted() -> None:
    one = bus(RequestTimeoutError("late"), NoRespondersError("nobody"), ANSWER)
    with pytest.raises(NoRespondersError):
        await ask(one, "subject", REQUEST, 60, attempts=2)
    assert one.request.await_count == 2
