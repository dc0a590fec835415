"""Durable objects in a JetStream stream: chunks, and a manifest that says what they make.

An object's messages lie on ``obj.<cluster>.<object>.<upload>.<index>`` and ``obj.<cluster>.<object>.manifest``, one on
each. The manifest is changed by compare-and-set, through the interface of a key-value bucket; chunks are written once,
read by direct get (any replica of the stream answers) and from the leader where that one lags behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal_core.bus.interface import STATUS_HEADER, Bus
from shoal_core.bus.jetstream import API, CALL_SECONDS, WRONG_LAST_SEQUENCE, JetStream
from shoal_core.bus.keyvalue import JetStreamKeyValue
from shoal_core.protocol.errors import JetStreamError, NoRespondersError

MANIFEST = "manifest"
NO_SPACE = (10047, 10077, 10023)


class Manifests(JetStreamKeyValue):
    """The manifests of an object stream as a bucket; its keys are ``<object>.manifest``."""

    def __init__(self, bus: Bus, stream: str, prefix: str) -> None:
        super().__init__(bus, stream)
        self.stream = stream
        self.prefix = prefix
        self.watched = f"*.{MANIFEST}"
        self.tells_all = True  # what is there is counted by what the watch tells

    def is_gone(self, headers: Mapping[str, str], data: bytes) -> bool:
        """Tell whether nothing is left of an object: its manifest is an empty one, until it is purged."""
        return not data


class ObjectStream:
    """The durable tier's stream; made by ``open_object_stream``. Prefix: ``obj.<cluster>.``."""

    def __init__(self, bus: Bus, stream: str, prefix: str) -> None:
        self.manifests = Manifests(bus, stream, prefix)
        self._stream = stream
        self._prefix = prefix
        self._bus = bus
        self._jetstream = JetStream(bus)

    async def put_chunk(self, place: str, index: int, data: bytes) -> bool:
        """Store a chunk; False if there is one already. Returns once it is acknowledged.

        Raises ``JetStreamError`` (see ``is_full``) and the errors of ``Bus.request``.
        """
        try:
            await self._jetstream.publish(f"{self._prefix}{place}.{index}", data, expected_revision=0)
        except JetStreamError as error:
            if error.error_code not in WRONG_LAST_SEQUENCE:
                raise
            return False
        return True

    async def get_chunk_directly(self, place: str, index: int) -> bytes | None:
        """Return a chunk as any replica of the stream has it; None if that one has none."""
        answer = await self._bus.request(
            f"{API}.DIRECT.GET.{self._stream}.{self._prefix}{place}.{index}", b"", timeout_seconds=CALL_SECONDS
        )
        return answer.data if answer.headers is None or STATUS_HEADER not in answer.headers else None

    async def get_chunk(self, place: str, index: int) -> bytes | None:
        """Return a chunk; None if there is none."""
        try:
            data = await self.get_chunk_directly(place, index)
        except NoRespondersError:
            data = None
        if data is None:
            message = await self._jetstream.last_message(self._stream, f"{self._prefix}{place}.{index}")
            data = message.data if message is not None else None
        return data

    async def count_chunks(self, place: str) -> int:
        """Return how many chunks there are of an upload, as the stream's leader knows."""
        return (await self._subjects(0, f"{place}.*"))[1]

    async def purge(self, object_id: str) -> int:
        """Delete an object's chunks and its manifest together; return how many messages there were."""
        return await self._jetstream.purge(self._stream, f"{self._prefix}{object_id}.>")

    async def counts(self) -> dict[str, tuple[int, bool]]:
        """Return of every object how many chunks lie here, and whether it has a manifest."""
        found: dict[str, tuple[int, bool]] = {}
        offset = 0
        while True:
            subjects, total = await self._subjects(offset, ">")
            for subject in subjects:
                object_id, _, part = subject.removeprefix(self._prefix).rpartition(".")
                chunks, has_manifest = found.get(object_id, (0, False))
                found[object_id] = (chunks, True) if part == MANIFEST else (chunks + 1, has_manifest)
            offset += len(subjects)
            if not subjects or offset >= total:
                return found

    async def _subjects(self, offset: int, pattern: str) -> tuple[list[str], int]:
        """Return one page of the subjects below a pattern that hold a message, and how many there are in all."""
        query: dict[str, Any] = {"subjects_filter": f"{self._prefix}{pattern}", "offset": offset}
        answer = await self._jetstream.call(f"STREAM.INFO.{self._stream}", query)
        subjects = list(answer.get("state", {}).get("subjects") or {})
        return subjects, answer.get("total", len(subjects))


def is_full(error: JetStreamError) -> bool:
    """Tell whether a write failed because there is no room for it."""
    return error.error_code in NO_SPACE


async def open_object_stream(
    bus: Bus, stream: str, prefix: str, *, replicas: int = 1, max_bytes: int = -1, memory: bool = False
) -> ObjectStream:
    """Open an object stream, making it first if it does not exist; ``max_bytes`` -1: bounded by the broker alone.

    One that exists gets these bounds and replicas; where its chunks lie, on file or in memory, does not change.
    Raises ``JetStreamUnavailableError`` where the broker runs without JetStream.
    """
    jetstream = JetStream(bus)
    wanted = {"max_bytes": max_bytes, "num_replicas": replicas}
    found = await jetstream.ensure_stream(
        {
            **wanted,
            "name": stream,
            "subjects": [f"{prefix}>"],
            "storage": "memory" if memory else "file",
            "max_msgs_per_subject": 1,
            "max_msgs": -1,
            "max_consumers": -1,
            "retention": "limits",
            "discard": "new",
            "allow_direct": True,
        }
    )
    if any(found.get(name) != value for name, value in wanted.items()):
        await jetstream.call(f"STREAM.UPDATE.{stream}", {**found, **wanted})
    return ObjectStream(bus, stream, prefix)
