"""Turning Python values into bytes and back.

Values are pickled with protocol 5 and out-of-band buffers, by cloudpickle where code may be involved and by plain
pickle where the value is visibly made of plain data. References met on the way are collected, so that whoever
sends the bytes knows what it must keep alive.

The layout of a value in a segment: ``<QQ`` (pickle bytes, number of buffers), one ``<Q`` length for each buffer,
then the pickle, then each buffer on a 64-byte boundary, as array libraries like it. A pickle length of
``RAW_BYTES`` says that the one buffer is itself a ``bytes`` object.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import msgspec

from shoal_core.protocol.records import Inline, Reference
from shoal_core.runtime.data.serializers import registered
from shoal_core.runtime.ownership.objects import ObjectRef, restore_reference

INLINE_BYTES = 100 * 1024
ALIGNMENT = 64
RAW_BYTES = 0xFFFF_FFFF_FFFF_FFFF


class Dependency(msgspec.Struct, frozen=True):
    """Stands in pickled arguments for the value of a reference that the task was given as an argument."""

    index: int


_PLAIN: frozenset[type] = frozenset({int, float, bool, type(None), str, bytes, complex, Dependency})
_PLAIN_ITEMS = 32


@dataclass(slots=True)
class Serialized:
    """A value as bytes: its pickle, the buffers that stayed outside, and the references it contains."""

    data: bytes
    buffers: Sequence[memoryview] = ()
    references: Sequence[ObjectRef[Any]] = ()
    raw: bool = False

    @property
    def size_bytes(self) -> int:
        """How many bytes of payload this is."""
        return len(self.data) + sum(buffer.nbytes for buffer in self.buffers)

    @property
    def contained(self) -> tuple[Reference, ...]:
        """The names of the references inside."""
        return tuple([ref._state.wire() for ref in self.references])

    def inline(self) -> Inline:
        """Return the value in the form that travels inside a record."""
        if self.raw:
            return Inline(pickle.dumps(bytes(self.buffers[0]), 5))
        if not self.buffers and not self.references:
            return Inline(self.data)
        return Inline(self.data, tuple([bytes(buffer) for buffer in self.buffers]), self.contained)


class Codec:
    """Serializes for one runtime; ``remember`` is told of every reference that is pickled."""

    def __init__(self, remember: Callable[[ObjectRef[Any]], None]) -> None:
        self._remember = remember

    def dump(self, value: Any) -> Serialized:
        """Pickle a value; whatever the pickler raises names the culprit."""
        kind = type(value)
        if kind in _PLAIN:
            if kind is bytes and len(value) > INLINE_BYTES:
                return Serialized(b"", (memoryview(value),), raw=True)
            return Serialized(pickle.dumps(value, 5))
        if _is_plain(value):
            return Serialized(pickle.dumps(value, 5))
        buffers: list[pickle.PickleBuffer] = []
        sink = io.BytesIO()
        pickler = _Collector(sink, buffers.append, self._remember)
        pickler.dump(value)
        return Serialized(sink.getvalue(), [_flat(buffer) for buffer in buffers], list(pickler.references))

    def dump_whole(self, value: Any) -> Serialized:
        """Pickle a value without taking buffers out of it: its pickle is all of it."""
        sink = io.BytesIO()
        pickler = _Collector(sink, None, self._remember)
        pickler.dump(value)
        return Serialized(sink.getvalue(), (), list(pickler.references))

    def dump_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Serialized:
        """Pickle the arguments of a call, as ``(args, kwargs)``."""
        if _is_plain(args) and (not kwargs or _is_plain(kwargs)):
            return Serialized(pickle.dumps((args, kwargs), 5))
        return self.dump((args, kwargs))

    def load(self, value: Inline) -> Any:
        """Unpickle a value that travelled inside a record."""
        if value.buffers:
            return pickle.loads(value.data, buffers=value.buffers)
        return pickle.loads(value.data)


def _flat(buffer: pickle.PickleBuffer) -> memoryview:
    try:
        return buffer.raw()
    except BufferError:
        return memoryview(memoryview(buffer).tobytes())


def _is_plain(value: Any) -> bool:
    """Tell cheaply whether plain pickle is as good as cloudpickle for a small flat container."""
    kind = type(value)
    if kind is list or kind is tuple:
        return len(value) <= _PLAIN_ITEMS and all(type(item) in _PLAIN for item in value)
    if kind is dict:
        return len(value) <= _PLAIN_ITEMS and all(
            type(key) in _PLAIN and type(item) in _PLAIN for key, item in value.items()
        )
    return False


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle that asks the serializers which users registered first."""

    def reducer_override(self, obj: Any) -> Any:
        """Say how an object is pickled, or ``NotImplemented`` to leave that to the pickler."""
        if (reduce := registered.get(type(obj))) is not None:
            return reduce(obj)
        return super().reducer_override(obj)


class _Collector(Pickler):
    """Notes the references it meets, each once, in order."""

    def __init__(
        self,
        sink: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None,
        remember: Callable[[ObjectRef[Any]], None],
    ) -> None:
        super().__init__(sink, protocol=5, buffer_callback=buffer_callback)
        self.references: dict[ObjectRef[Any], None] = {}
        self._remember = remember

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is ObjectRef:
            self._remember(obj)
            self.references[obj] = None
            return restore_reference, (obj._state.owner, obj._state.key)
        return super().reducer_override(obj)


def dumps(value: Any) -> bytes:
    """Pickle what leaves the counting of references, such as code: references inside are kept until the job ends."""
    sink = io.BytesIO()
    Pickler(sink, protocol=5).dump(value)
    return sink.getvalue()


def dumps_uncounted(value: Any) -> bytes:
    """Pickle what is not sent anywhere, as ``Codec.dump_whole`` does; references inside are not kept."""
    return Codec(_nothing).dump_whole(value).data


def _nothing(ref: ObjectRef[Any]) -> None:
    """Nobody will unpickle the reference."""


# ------------------------------------------------------------------------------------ segments


def segment_bytes(value: Serialized) -> int:
    """Return how many bytes a value takes in a segment."""
    offset = 16 + 8 * len(value.buffers) + len(value.data)
    for buffer in value.buffers:
        offset = _align(offset) + buffer.nbytes
    return offset


def write_segment(value: Serialized, target: memoryview, copy: Callable[[memoryview, memoryview], None]) -> None:
    """Write a value into a segment of at least ``segment_bytes``; ``copy(to, from)`` moves large buffers."""
    count = len(value.buffers)
    struct.pack_into("<QQ", target, 0, RAW_BYTES if value.raw else len(value.data), count)
    struct.pack_into(f"<{count}Q", target, 16, *(buffer.nbytes for buffer in value.buffers))
    offset = 16 + 8 * count
    target[offset : offset + len(value.data)] = value.data
    offset += len(value.data)
    for buffer in value.buffers:
        offset = _align(offset)
        copy(target[offset : offset + buffer.nbytes], buffer)
        offset += buffer.nbytes


def written(value: Serialized) -> bytes:
    """Return a value as it would lie in a segment."""
    target = bytearray(segment_bytes(value))

    def copy(to: memoryview, source: memoryview) -> None:
        to[:] = source.cast("B") if source.nbytes else source

    write_segment(value, memoryview(target), copy)
    return bytes(target)


def as_inline(source: bytes) -> Inline:
    """Return the value that would lie so in a segment, in the form that travels inside a record."""
    view = memoryview(source)
    data, buffers, raw = _parts(view)
    if raw:
        return Inline(pickle.dumps(bytes(buffers[0]), 5))
    return Inline(bytes(data), tuple([bytes(buffer) for buffer in buffers]))


def read_segment(source: memoryview) -> Any:
    """Unpickle the value of a segment; its buffers stay in the segment, read-only."""
    data, buffers, raw = _parts(source)
    return bytes(buffers[0]) if raw else pickle.loads(data, buffers=buffers)


def _parts(source: memoryview) -> tuple[memoryview, list[memoryview], bool]:
    """Return the pickle in a segment, its buffers, and whether the one buffer is itself a ``bytes`` object."""
    length, count = struct.unpack_from("<QQ", source, 0)
    sizes = struct.unpack_from(f"<{count}Q", source, 16)
    offset = 16 + 8 * count
    raw = length == RAW_BYTES
    data = source[offset:offset] if raw else source[offset : offset + length]
    offset += data.nbytes
    buffers = []
    for size in sizes:
        offset = _align(offset)
        buffers.append(source[offset : offset + size])
        offset += size
    return data, buffers, raw


def _align(offset: int) -> int:
    return (offset + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
