"""What the object store's commands do to this machine's files and to the durable tier.

Small files are made and removed at once, since they are on the path of every object of theirs. Large ones take a while
(their pages are reserved and given back one by one), so that happens in a thread, beside the node's event loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal_core.bus import Bus
from shoal_core.bus.requests import ask
from shoal_core.machine import store_name
from shoal_core.protocol.errors import BusError, ShoalError
from shoal_core.protocol.places import is_part, located
from shoal_core.protocol.storage import DurableDelete, DurableGet, DurableManifest
from shoal_core.protocol.subjects import Subjects
from shoal_worker.objects.durable import PARTIAL, DurableTier
from shoal_worker.objects.files import (
    SLAB_BYTES,
    CreateFile,
    DropDurable,
    DurableFound,
    FileCreated,
    FileFilled,
    FileLinked,
    FileSpilled,
    FillFile,
    FindDurable,
    LinkFile,
    RemoveFile,
    ShelveFile,
    SpillFile,
    StoreCommand,
)

logger = logging.getLogger("shoal.worker")

LARGE_BYTES = 4 * 1024 * 1024
ROOM_SECONDS = 5.0
FIND_SECONDS = 10.0
PAUSE_SECONDS = 0.05
REFUSED_PAUSE_SECONDS = 1.0
REMOVED = ".gone"

PUNCH_HOLE = 3
"""Of Linux's ``fallocate``, which Python does not have: keep the size of the file, and take pages out of it."""
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


class Storage:
    """The folder of a node's segments, and its way to the durable tier. ``inject`` takes what comes of a command."""

    def __init__(
        self, bus: Bus, subjects: Subjects, folder: Path, durable: DurableTier, inject: Callable[[Any], None]
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._folder = folder
        self._durable = durable
        self._inject = inject
        # Unbounded: each entry is of something that is durable and has to go.
        self._dropped: deque[DropDurable] = deque()
        self._dropping = False
        self._keeps_pages = False

    def perform(self, command: StoreCommand) -> Awaitable[None] | None:
        """Carry out one command; what takes time is returned, to be awaited beside the core."""
        match command:
            case CreateFile():
                return self._create(command)
            case LinkFile():
                # Not in this turn: other commands may stand behind this one.
                asyncio.get_running_loop().call_soon(self._inject, self._link(command))
            case RemoveFile(name, part_bytes):
                return self._remove(name, part_bytes)
            case ShelveFile(name, shelf):
                os.rename(self._folder / name, self._folder / shelf)
            case FillFile():
                return self._fill(command)
            case SpillFile():
                return self._spill(command)
            case FindDurable():
                return self._find_durable(command)
            case DropDurable():
                self._dropped.append(command)
                if not self._dropping:
                    self._dropping = True
                    return self._drop_all()
        return None

    # ------------------------------------------------------------------------------- files

    def _create(self, command: CreateFile) -> Awaitable[None] | None:
        if command.part:
            self._inject(FileCreated(command.name) if command.reused else self._reserve(command))
            return None
        path = self._folder / (command.name + PARTIAL * command.filled)
        busy = ""
        if command.reused:
            try:
                if _take_over(self._folder / command.reused, path):
                    self._inject(FileCreated(command.name))
                    return None
            except OSError:
                busy = command.reused
        if command.capacity_bytes < LARGE_BYTES:
            self._inject(replace(self._make(path, command), busy=busy))
            return None
        return self._create_large(path, command, busy)

    async def _create_large(self, path: Path, command: CreateFile, busy: str) -> None:
        """Make a file in a thread; the pages of a file that was just removed may come back only in a moment."""
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            made = await asyncio.to_thread(self._make, path, command)
            if not made.no_space or time.monotonic() > deadline:
                break
            await asyncio.sleep(PAUSE_SECONDS)
        self._inject(replace(made, busy=busy))

    def _make(self, path: Path, command: CreateFile) -> FileCreated:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, command.capacity_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            path.unlink(missing_ok=True)
            return _no_room(command, error)
        return FileCreated(command.name)

    def _link(self, command: LinkFile) -> FileLinked:
        """Give a file that lies in the folder of a node of this user, beside ours, a name here."""
        try:
            homes = filter(_is_own_folder, self._folder.parent.glob(store_name("*", command.home)))
            if (home := next(homes, None)) is None:
                return FileLinked(command.name, f"the folder of node {command.home} does not lie beside this one")
            os.link(home / command.origin, self._folder / command.name)
        except OSError as error:
            logger.info("what lies on node %s is copied, since its files cannot be linked: %s", command.home, error)
            return FileLinked(command.name, str(error))
        return FileLinked(command.name)

    def _reserve(self, command: CreateFile) -> FileCreated:
        """Reserve the pages of a part of a file, which is made at its first use."""
        file, offset = located(command.part)
        try:
            descriptor = os.open(self._folder / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not os.fstat(descriptor).st_size:
                    os.truncate(descriptor, SLAB_BYTES)
                os.posix_fallocate(descriptor, offset, command.capacity_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            return _no_room(command, error)
        return FileCreated(command.name)

    def _punch(self, file: str, offset: int, size_bytes: int) -> None:
        """Give back the pages of a part; the file system of a folder that is not in memory may be unable to."""
        with suppress(FileNotFoundError):  # it could not be made
            descriptor = os.open(self._folder / file, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _fallocate(descriptor, PUNCH_HOLE, offset, size_bytes) and not self._keeps_pages:
                    self._keeps_pages = True
                    logger.warning("%s keeps the pages of freed objects: %s", file, os.strerror(ctypes.get_errno()))
            finally:
                os.close(descriptor)

    def _remove(self, name: str, part_bytes: int) -> Awaitable[None] | None:
        """Remove a file; one that is being filled loses its partial name first, so that it cannot get the other."""
        if is_part(name):
            self._punch(*located(name), part_bytes)
            return None
        (self._folder / (name + PARTIAL)).unlink(missing_ok=True)
        path = self._folder / name
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            return None
        if size_bytes < LARGE_BYTES:
            path.unlink(missing_ok=True)
            return None
        gone = path.with_name(name + REMOVED)
        os.rename(path, gone)  # its name may be used again at once
        return asyncio.to_thread(gone.unlink, missing_ok=True)

    # ------------------------------------------------------------------------------- the durable tier

    async def _fill(self, command: FillFile) -> None:
        try:
            await self._durable.fill(self._folder / command.name, command.object_id, command.size_bytes)
        except ShoalError as error:
            self._inject(FileFilled(command.name, error))
        else:
            self._inject(FileFilled(command.name))

    async def _spill(self, command: SpillFile) -> None:
        try:
            await self._durable.spill(self._folder, command)
        except ShoalError as error:
            logger.warning("segment %s could not be copied to the durable tier: %s", command.name, error)
            self._inject(FileSpilled(command.name, command.holder, error))
        else:
            self._inject(FileSpilled(command.name, command.holder))

    async def _find_durable(self, command: FindDurable) -> None:
        restoration = command.restoration
        request = DurableGet(object_id=restoration.request.object_id)
        subject, absent_seconds = self._subjects.objectstore("get"), restoration.request.absent_seconds
        try:
            manifest = await ask(self._bus, subject, request, FIND_SECONDS, absent_seconds=absent_seconds)
        except ShoalError as error:
            self._inject(DurableFound(restoration, 0, error))
        else:
            assert isinstance(manifest, DurableManifest)
            self._inject(DurableFound(restoration, manifest.size_bytes))

    async def _drop_all(self) -> None:
        """Let go of what is durable, one after the other, however long the durable tier is away."""
        try:
            while self._dropped:
                drop = self._dropped[0]
                delete = DurableDelete(object_id=drop.object_id, holder=drop.holder)
                try:
                    await ask(self._bus, self._subjects.objectstore("delete"), delete)
                except BusError:
                    await asyncio.sleep(REFUSED_PAUSE_SECONDS)
                    continue
                except ShoalError as error:
                    logger.warning("the durable copy of object %s goes only with its job: %s", drop.object_id, error)
                self._dropped.popleft()
        finally:
            self._dropping = False


def _is_own_folder(path: Path) -> bool:
    """Tell whether a folder is this user's: in shared memory everybody may make one, of whatever name."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _take_over(warm: Path, path: Path) -> bool:
    """Give a warm file a new name; ``OSError`` where somebody still uses it, False where there is none.

    A process may have locked it: one of this node that maps it and has not been heard, or one of another node (see
    ``shoal_core.runtime.data.segments``). Or another node may have linked it, which none can any more under a new name.
    """
    try:
        descriptor = os.open(warm, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(warm, path)
        if os.fstat(descriptor).st_nlink == 1:
            return True
        os.rename(path, warm)
    finally:
        os.close(descriptor)
    raise BlockingIOError


def _no_room(command: CreateFile, error: OSError) -> FileCreated:
    return FileCreated(
        command.name,
        f"{command.capacity_bytes:,} bytes of shared memory are not to be had: {error}",
        no_space=error.errno == errno.ENOSPC,
    )
