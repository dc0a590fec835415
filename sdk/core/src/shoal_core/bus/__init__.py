"""The bus: messages between processes over a NATS broker. Nothing outside this package imports nats."""

from __future__ import annotations

from shoal_core.bus.broker import EmbeddedBroker, launch_broker
from shoal_core.bus.connection import connect
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.bus.interface import Bus, Message, Subscription

__all__ = [
    "Bus",
    "Credentials",
    "EmbeddedBroker",
    "Message",
    "Subscription",
    "TlsFiles",
    "connect",
    "launch_broker",
]
