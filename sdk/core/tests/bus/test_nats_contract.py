"""The private names of nats-py 2.16 that the fast bus uses, and what it takes for granted about them.

When a new version breaks one of these, the fast bus must be looked at before the version's pin is moved.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap
from collections.abc import Callable
from importlib.metadata import version

from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from shoal_core.bus import fast

ATTRIBUTES = {
    "_flusher_task",
    "_ping_interval_task",
    "_pings_outstanding",
    "_reading_task",
    "_server_info",
    "_status",
    "_transport",
}
COROUTINES = {"_attempt_reconnect", "_process_connect_init", "_process_info", "_process_op_err", "_send_ping"}
OF_TRANSPORT = {"_io_reader", "_io_writer"}
OF_STREAM_READER = {"_buffer"}


def test_the_version_is_the_one_that_was_read() -> None:
    assert version("nats-py").startswith("2.16.")


def test_the_lists_here_are_what_the_fast_bus_uses() -> None:
    assert _private_names_used() == ATTRIBUTES | COROUTINES | OF_TRANSPORT | OF_STREAM_READER


def test_the_names_exist() -> None:
    assert vars(Client()).keys() >= ATTRIBUTES
    assert all(inspect.iscoroutinefunction(getattr(Client, name)) for name in COROUTINES)
    transport = TcpTransport()  # type: ignore[no-untyped-call]
    assert vars(transport).keys() >= OF_TRANSPORT


async def test_the_stream_reader_keeps_what_was_read_in_a_buffer() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(b"left over")
    assert bytes(vars(reader)["_buffer"]) == b"left over"


def test_the_handshake_ends_by_making_the_tasks() -> None:
    """Nothing is awaited after they are made: the fast bus cancels them before their first step."""
    body = _body(Client._process_connect_init)
    made = [number for number, line in enumerate(body) if ".create_task(" in line]
    assert len(made) == 3
    assert not any("await" in line for line in body[made[0] :])


def test_closing_and_reconnecting_do_without_the_tasks() -> None:
    for function in (Client._close, Client._attempt_reconnect):
        text = inspect.getsource(function)
        for task in ("_reading_task", "_flusher_task", "_ping_interval_task"):
            assert f"self.{task} is not None" in text


def test_a_flush_without_the_tasks_waits_for_nothing() -> None:
    assert "self._reading_task is None" in inspect.getsource(Client.flush)
    assert "self._flusher_task is None" in inspect.getsource(Client._flush_pending)


def test_a_lost_connection_is_only_acted_on_once() -> None:
    assert "if self.is_closed or self.is_reconnecting:\n        return" in textwrap.dedent(
        inspect.getsource(Client._process_op_err)
    )


def _private_names_used() -> set[str]:
    """Return the private names that the source of the fast bus uses or overrides on objects that are not its own."""
    classes = [node for node in ast.parse(inspect.getsource(fast)).body if isinstance(node, ast.ClassDef)]
    names = set()
    for kind in classes:
        for node in ast.walk(kind):
            if isinstance(node, ast.Attribute):
                ours = kind.name != "FastClient" and ast.unparse(node.value) != "self.client"
                names |= set() if ours else {node.attr}
            elif isinstance(node, ast.AsyncFunctionDef) and kind.name == "FastClient":
                names.add(node.name)
    return {name for name in names if name.startswith("_") and not name.startswith("__")} - {"_bus"}


def _body(function: Callable[..., object]) -> list[str]:
    return inspect.getsource(function).splitlines()
