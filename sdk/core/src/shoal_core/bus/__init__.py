"""The bus: messages between processes over a NATS broker. Nothing outside this package imports nats.

Start at ``interface`` (what a bus is) and ``connection`` (how one is made). What takes long to import stays in modules
of its own: nats-py is imported when a connection is made, and ``broker`` and ``memory`` by those who want them.
"""

from __future__ import annotations

from shoal_core.bus.connection import connect
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.bus.interface import Bus, Message, Subscription
from shoal_core.bus.jetstream import JetStream, StoredMessage
from shoal_core.bus.keyvalue import Deleted, Entry, KeyValue
from shoal_core.bus.watch import Watch

__all__ = [
    "Bus",
    "Credentials",
    "Deleted",
    "Entry",
    "JetStream",
    "KeyValue",
    "Message",
    "StoredMessage",
    "Subscription",
    "TlsFiles",
    "Watch",
    "connect",
]
