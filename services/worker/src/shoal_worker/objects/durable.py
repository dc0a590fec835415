"""Moving objects between files and the durable tier: in a thread, on a connection of its own, several chunks at once.

The durable tier's service is asked where the chunks go, and when all are there it is told; the chunks themselves go
straight between this thread and the broker. So neither the node's event loop nor its connection wait for bulk data.

A lost connection, a broker that restarts or a service that is away cost a pause: everything is tried again for
``PATIENCE_SECONDS``. A chunk is written once, so that writing it twice does no harm; each is checked by its crc32.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from zlib_ng.zlib_ng import crc32

from shoal_core.bus import Bus
from shoal_core.bus.requests import ask
from shoal_core.bus.streams import ObjectStream, is_full
from shoal_core.protocol.errors import (
    BusError,
    JetStreamError,
    JetStreamUnavailableError,
    NotFoundError,
    ObjectLostError,
    ObjectStoreFullError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.messages import Message
from shoal_core.protocol.places import located
from shoal_core.protocol.storage import (
    CHUNK_BYTES,
    DurableDelete,
    DurableGet,
    DurableManifest,
    DurablePut,
    DurableSeal,
    DurableUpload,
)
from shoal_core.protocol.subjects import Subjects
from shoal_worker.objects.files import SpillFile

T = TypeVar("T")

CHUNKS_AT_ONCE = 8
OBJECTS_AT_ONCE = 2
PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 0.2
GIVE_UP_SECONDS = 2.0
PARTIAL = ".part"
"""What the name of a file ends with that is not filled yet."""

Dial = Callable[[], AbstractAsyncContextManager[Bus]]


def file_digests(path: Path, size_bytes: int, begin: int = 0) -> list[int]:
    """Return the crc32 of each chunk of a file, or of what begins there in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [
            crc32(os.pread(descriptor, min(CHUNK_BYTES, size_bytes - offset), begin + offset))
            for offset in range(0, max(1, size_bytes), CHUNK_BYTES)
        ]
    finally:
        os.close(descriptor)


class DurableTier:
    """The thread and its connection, opened at the first use; made by ``durable_tier``. Used from one event loop."""

    def __init__(self, dial: Dial, subjects: Subjects) -> None:
        self._dial = dial
        self._subjects = subjects
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._ended: asyncio.Event
        self._dialling: asyncio.Lock
        self._turn: asyncio.Semaphore
        self._stack: AsyncExitStack
        self._bus: Bus | None = None

    async def spill(self, folder: Path, order: SpillFile) -> None:
        """Copy an object that lies in this folder to the durable tier; what cannot be copied leaves nothing there."""
        file, begin = located(order.place)
        await self._run(lambda bus: self._spill(bus, folder / file, begin, order))

    async def fill(self, path: Path, object_id: str, size_bytes: int) -> None:
        """Write a durable object into the partial file of ``path``, which then gets its name."""
        await self._run(lambda bus: self._fill(bus, path, object_id, size_bytes))

    def close(self) -> None:
        """End the thread; what is under way is given up."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()

    # ------------------------------------------------------------------------------- the thread

    async def _run(self, work: Callable[[Bus], Coroutine[Any, Any, T]]) -> T:
        """Do something in the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="durable", daemon=True)
            self._thread.start()
            self._ready.wait()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._do(work), self._loop))

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._dialling = asyncio.Lock()
        self._turn = asyncio.Semaphore(OBJECTS_AT_ONCE)
        async with AsyncExitStack() as self._stack:
            self._ready.set()
            await self._ended.wait()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _do(self, work: Callable[[Bus], Coroutine[Any, Any, T]]) -> T:
        async with self._turn:
            try:
                async with self._dialling:
                    if self._bus is None:
                        self._bus = await self._stack.enter_async_context(self._dial())
                return await work(self._bus)
            except* ShoalError as errors:
                raise _first(errors) from None
            except* OSError as errors:
                raise ServiceError(f"a file of the object store cannot be used: {_first(errors)}") from None

    def _stream(self, bus: Bus) -> ObjectStream:
        return ObjectStream(bus, self._subjects.object_stream(), self._subjects.object_prefix())

    async def _ask(self, bus: Bus, verb: str, message: Message) -> Message:
        return await ask(bus, self._subjects.objectstore(verb), message, timeout_seconds=PATIENCE_SECONDS)

    # ------------------------------------------------------------------------------- spilling

    async def _spill(self, bus: Bus, path: Path, begin: int, order: SpillFile) -> None:
        digests = await asyncio.to_thread(file_digests, path, order.size_bytes, begin)
        try:
            put = DurablePut(
                object_id=order.object_id,
                size_bytes=order.size_bytes,
                digests=digests,
                job_id=order.job,
                holder=order.holder,
                keep_seconds=order.keep_seconds,
            )
            opened = await self._ask(bus, "put", put)
            assert isinstance(opened, DurableUpload)
            if not opened.sealed:
                await self._upload(bus, path, begin, opened.place, order.size_bytes)
                await self._ask(bus, "seal", DurableSeal(object_id=order.object_id))
        except* ShoalError:
            with suppress(ShoalError):  # what is left all the same goes with its job
                delete = DurableDelete(object_id=order.object_id, holder=order.holder)
                subject = self._subjects.objectstore("delete")
                await ask(bus, subject, delete, timeout_seconds=GIVE_UP_SECONDS)
            raise

    async def _upload(self, bus: Bus, path: Path, begin: int, place: str, size_bytes: int) -> None:
        stream = self._stream(bus)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

        async def upload(index: int) -> None:
            offset = index * CHUNK_BYTES
            data = os.pread(descriptor, min(CHUNK_BYTES, size_bytes - offset), begin + offset)
            await _patiently(lambda: stream.put_chunk(place, index, data))

        try:
            await _each_chunk(size_bytes, upload)
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------------------------- filling

    async def _fill(self, bus: Bus, path: Path, object_id: str, size_bytes: int) -> None:
        partial = path.with_name(path.name + PARTIAL)
        try:
            manifest = await self._ask(bus, "get", DurableGet(object_id=object_id))
            assert isinstance(manifest, DurableManifest)
            if manifest.size_bytes != size_bytes:
                raise ObjectLostError(
                    f"durable object {object_id} has {manifest.size_bytes:,} bytes, not {size_bytes:,}"
                )
            await self._download(bus, partial, manifest)
            os.rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    async def _download(self, bus: Bus, partial: Path, manifest: DurableManifest) -> None:
        stream = self._stream(bus)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CLOEXEC)

        async def download(index: int) -> None:
            data = await _patiently(lambda: stream.get_chunk_directly(manifest.place, index))
            if data is None:
                raise NotFoundError(f"chunk {index} of durable object {manifest.object_id} is gone: it was deleted")
            offset = index * CHUNK_BYTES
            length = min(CHUNK_BYTES, manifest.size_bytes - offset)
            if len(data) != length or crc32(data) != manifest.digests[index]:
                raise ObjectLostError(f"chunk {index} of durable object {manifest.object_id} is not what was written")
            os.pwrite(descriptor, data, offset)

        try:
            await _each_chunk(manifest.size_bytes, download)
        finally:
            os.close(descriptor)


async def _each_chunk(size_bytes: int, move: Callable[[int], Awaitable[None]]) -> None:
    """Move all chunks of an object, several at once."""
    indices = iter(range(max(1, -(-size_bytes // CHUNK_BYTES))))

    async def move_some() -> None:
        for index in indices:
            await move(index)

    async with asyncio.TaskGroup() as group:
        for _ in range(CHUNKS_AT_ONCE):
            group.create_task(move_some())


async def _patiently(move: Callable[[], Awaitable[T]]) -> T:
    """Move one chunk, through lost connections."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await move()
        except JetStreamError as error:
            if is_full(error):
                raise ObjectStoreFullError(f"the durable tier is full: {error}") from error
            if error.code < 500 or time.monotonic() > deadline:
                raise
        except (BusError, JetStreamUnavailableError):
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(PAUSE_SECONDS)


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    """Return one error of a group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loops where there is uvloop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


@asynccontextmanager
async def durable_tier(dial: Dial, subjects: Subjects) -> AsyncIterator[DurableTier]:
    """Reach the durable tier; leaving ends the thread and its connection."""
    one = DurableTier(dial, subjects)
    try:
        yield one
    finally:
        await asyncio.to_thread(one.close)
