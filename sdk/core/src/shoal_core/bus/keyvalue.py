"""The key-value store: buckets in the broker, changed by compare-and-set only.

A bucket is the JetStream stream that NATS' own tools know as one (``KV_<bucket>``, subjects ``$KV.<bucket>.<key>``,
one message a key), so ``nats kv`` shows it. A revision is the sequence of the key's last message in the stream. A
delete leaves a marker, which counts as nothing.

When the connection is lost during a change, the change may or may not have happened: read through ``get``, which goes
to the stream's leader and shows every change acknowledged before.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal_core.bus.interface import Bus
from shoal_core.bus.jetstream import WRONG_LAST_SEQUENCE, Acknowledged, JetStream, StoredMessage
from shoal_core.protocol.errors import (
    BusError,
    JetStreamError,
    JetStreamUnavailableError,
    NotFoundError,
    RevisionConflict,
)

if TYPE_CHECKING:
    from shoal_core.bus.watch import JetStreamWatch, Watch

OPERATION_HEADER = "KV-Operation"
DELETED = "DEL"
DELETE_OPERATIONS = ("DEL", "PURGE")
KEY = re.compile(r"[-/_=a-zA-Z0-9]+(\.[-/_=a-zA-Z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a key holds."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Deleted:
    """A key that holds nothing any more."""

    key: str
    revision: int


WatchCallback = Callable[[Entry | Deleted], None]


class KeyValue(ABC):
    """One bucket. Keys are tokens of ``[-/_=a-zA-Z0-9]`` separated by dots."""

    bucket: str

    @abstractmethod
    async def get(self, key: str) -> Entry | None:
        """Return what the key holds now; every change acknowledged before is seen."""

    @abstractmethod
    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        """Change a key that is still at ``revision`` (0: it holds nothing); return its new revision.

        Raises ``RevisionConflict`` with what the key holds now.
        """

    @abstractmethod
    async def delete(self, key: str, *, revision: int) -> None:
        """Delete a key that is still at ``revision``; raises ``RevisionConflict`` with what it holds now."""

    @abstractmethod
    def begin(self, key: str, value: bytes | None, settled: Acknowledged, *, revision: int) -> None:
        """Try once to do what ``put`` does (``delete``: None), without waiting; raises where it cannot even be sent.

        ``settled`` is called with the new revision, or with an error: after one for which ``came_too_late`` is true
        nothing was changed and it is not known by whom the key was; after others ``put`` could raise, the change may
        have been made.
        """

    @abstractmethod
    async def purge(self, prefix: str) -> int:
        """Delete all keys below ``prefix`` (it ends in a dot) and leave no trace; return how many there were.

        No compare-and-set, and watches do not hear of it: for keys that nobody watches or changes any more.
        """

    @abstractmethod
    async def watch(self, callback: WatchCallback) -> Watch:
        """Have ``callback`` called with every key as it is now, and then with every change.

        Changes of one key come in order; of several quick ones only the last may be seen, and those that ``begin`` has
        made, and told of, are left out of most. After a reconnect what was missed is made up for, deletions included.
        """


def check_key(key: str) -> None:
    """Refuse what is no key."""
    if KEY.fullmatch(key) is None:
        raise ValueError(f"not a key: {key!r} (tokens of letters, digits and - / _ =, separated by dots)")


def conflict(bucket: str, key: str, revision: int, now: Entry | None) -> RevisionConflict:
    """Return the error for a change that came too late."""
    holds = f"it is at {now.revision}" if now is not None else "it holds nothing"
    text = f"the key {key!r} of {bucket!r} was to be changed at revision {revision}, but {holds}"
    return RevisionConflict(text, key, now.value if now else None, now.revision if now else 0)


class JetStreamKeyValue(KeyValue):
    """A bucket on a real broker; made by ``Bus.key_value``."""

    def __init__(self, bus: Bus, bucket: str) -> None:
        self.bucket = bucket
        self.stream = f"KV_{bucket}"
        self.prefix = f"$KV.{bucket}."
        self.watched = ">"
        self.tells_all = False
        """Whether watches are told of what ``begin`` has made, too."""
        self.jetstream = JetStream(bus)
        self.watches: set[JetStreamWatch] = set()

    async def get(self, key: str) -> Entry | None:
        """Read the key through the stream's leader."""
        check_key(key)
        message = await self.jetstream.last_message(self.stream, self.prefix + key)
        return None if message is None or is_deletion(message) else Entry(key, message.data, message.sequence)

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        """Change the key if it is still at ``revision``."""
        return await self._change(key, value, revision, None)

    async def delete(self, key: str, *, revision: int) -> None:
        """Leave a marker in place of the value if the key is still at ``revision``."""
        await self._change(key, b"", revision, {OPERATION_HEADER: DELETED})

    def begin(self, key: str, value: bytes | None, settled: Acknowledged, *, revision: int) -> None:
        """Publish on the key's subject, and look no further where that is refused."""
        check_key(key)
        headers = {OPERATION_HEADER: DELETED} if value is None else {}

        def acknowledged(outcome: int | BusError | JetStreamUnavailableError) -> None:
            if value is not None and isinstance(outcome, int) and not self.tells_all:
                for watch in self.watches:
                    watch.wrote(key, outcome)
            settled(outcome)

        self.jetstream.begin_publish(
            self.prefix + key, value or b"", acknowledged, headers=headers, expected_revision=revision
        )

    async def purge(self, prefix: str) -> int:
        """Purge the stream below the prefix."""
        return await self.jetstream.purge(self.stream, f"{self.prefix}{prefix}>")

    async def watch(self, callback: WatchCallback) -> Watch:
        """Watch the bucket by a push consumer of the last message of each key."""
        from shoal_core.bus.watch import JetStreamWatch

        watch = JetStreamWatch(self, callback)
        await watch.begin()
        return watch

    def is_gone(self, headers: Mapping[str, str], data: bytes) -> bool:
        """Tell whether a message of the bucket means that its key holds nothing."""
        return headers.get(OPERATION_HEADER) in DELETE_OPERATIONS

    async def _change(self, key: str, value: bytes, revision: int, headers: dict[str, str] | None) -> int:
        """Store a message on the key's subject, provided that nobody did so meanwhile."""
        check_key(key)
        subject = self.prefix + key
        expected = revision
        while True:
            try:
                return await self.jetstream.publish(subject, value, headers=headers, expected_revision=expected)
            except JetStreamError as error:
                if not came_too_late(error):
                    raise
            message = await self.jetstream.last_message(self.stream, subject)
            if message is None or is_deletion(message):
                # For whoever wants a new key a marker is nothing; whoever expected a value comes too late.
                now_expected = message.sequence if message is not None else 0
                if revision == 0 and headers is None and now_expected != expected:
                    expected = now_expected
                    continue
                raise conflict(self.bucket, key, revision, None)
            raise conflict(self.bucket, key, revision, Entry(key, message.data, message.sequence))


def came_too_late(error: Exception) -> bool:
    """Tell whether JetStream refused a change because the key is at another revision."""
    return isinstance(error, JetStreamError) and error.error_code in WRONG_LAST_SEQUENCE


def is_deletion(message: StoredMessage) -> bool:
    """Tell whether a message of a bucket is the marker of a deletion."""
    return message.headers.get(OPERATION_HEADER) in DELETE_OPERATIONS


async def open_bucket(bus: Bus, bucket: str, *, create: bool, memory: bool, replicas: int) -> KeyValue:
    """Open a bucket on a real broker (see ``Bus.key_value``); raises ``NotFoundError`` where it is not to be made."""
    key_value = JetStreamKeyValue(bus, bucket)
    if create:
        await key_value.jetstream.ensure_stream(
            {
                "name": key_value.stream,
                "subjects": [f"{key_value.prefix}>"],
                "storage": "memory" if memory else "file",
                "num_replicas": replicas,
                "max_msgs_per_subject": 1,
                "max_msgs": -1,
                "max_bytes": -1,
                "max_consumers": -1,
                "retention": "limits",
                "discard": "new",
                "deny_delete": True,
                "allow_rollup_hdrs": True,
                "allow_direct": True,
            }
        )
    elif not await key_value.jetstream.stream_exists(key_value.stream):
        raise NotFoundError(f"the broker has no key-value bucket {bucket!r}")
    return key_value
