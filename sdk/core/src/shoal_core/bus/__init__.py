"""The bus: messages between processes over a NATS broker. Nothing outside this package imports nats.

Start at ``interface`` (what a bus is) and ``connection`` (how one is made). What takes long to import, nats-py first of
all, is imported when a connection is made.
"""

from __future__ import annotations

from shoal_core.bus.broker import EmbeddedBroker, launch_broker
from shoal_core.bus.connection import connect
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.bus.interface import Bus, Message, Subscription
from shoal_core.bus.jetstream import JetStream, StoredMessage
from shoal_core.bus.keyvalue import Deleted, Entry, KeyValue
from shoal_core.bus.memory import MemoryBroker
from shoal_core.bus.watch import Watch

__all__ = [
    "Bus",
    "Credentials",
    "Deleted",
    "EmbeddedBroker",
    "Entry",
    "JetStream",
    "KeyValue",
    "MemoryBroker",
    "Message",
    "StoredMessage",
    "Subscription",
    "TlsFiles",
    "Watch",
    "connect",
    "launch_broker",
]
