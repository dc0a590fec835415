"""What a machine offers: processors, memory, GPUs, and a folder in shared memory."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shoal_core.machine import cpu_count, store_name
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.resources import CPU, GPU, MEMORY, OBJECT_STORE_MEMORY, Resources, to_resources
from shoal_core.service.settings import SettingsError
from shoal_worker.workers.memory_meter import read_memory

logger = logging.getLogger("shoal.worker")

STORE_SHARE = 0.3
LEAST_BYTES = 256 * 1024 * 1024
"""Docker gives a container 64 MB of shared memory, unless it is told otherwise."""
LOOPBACK = "127.0.0.1"
HEAD = "node:__internal_head__"
SHARED_MEMORY = Path("/dev/shm")


def memory_bytes() -> int:
    """Return the machine's memory, or the limit of this container where that is less."""
    return read_memory().total_bytes


def address_towards(host: str, port: int) -> str:
    """Return the address by which this machine speaks with another; that of the loopback where there is no way."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(where)  # sends nothing: the kernel chooses the way
                return str(probe.getsockname()[0])
    return LOOPBACK


def store_base(wanted_bytes: int | None, folder: str | None = None) -> Path:
    """Return where a node's folder of segments goes: where it was told, else in shared memory, else among temp files.

    Shared memory is not used where it cannot be written, or has less room than is wanted: what was asked for, or at
    least ``LEAST_BYTES``. That is said in the log, with what to do. ``SettingsError`` for a folder that cannot be used.
    """
    if folder is not None:
        if not os.access(folder, os.W_OK | os.X_OK) or not os.path.isdir(folder):
            raise SettingsError(f"--object-store-folder: {folder} is not a folder that this user may write to")
        return Path(folder).absolute()
    wanted = min(LEAST_BYTES, int(memory_bytes() * STORE_SHARE)) if wanted_bytes is None else wanted_bytes
    if not os.access(SHARED_MEMORY, os.W_OK):
        problem = f"{SHARED_MEMORY} cannot be written"
    elif (free := shutil.disk_usage(SHARED_MEMORY).free) < wanted:
        problem = f"{SHARED_MEMORY} has {free:,} bytes free, and {wanted:,} are wanted"
    else:
        return SHARED_MEMORY
    files = Path(tempfile.gettempdir())
    logger.warning(
        "%s: objects are kept in files in %s, which is slower. Give the node more shared memory (docker run "
        "--shm-size=8g; in Kubernetes an emptyDir of medium Memory at %s), ask for a smaller object_store_memory, or "
        "name another folder in memory with --object-store-folder",
        problem,
        files,
        SHARED_MEMORY,
    )
    return files


@contextmanager
def store_folder(node: NodeId, base: Path) -> Iterator[Path]:
    """Make the folder of a node's segments, with the probe file in it; leaving removes it with all that is in it."""
    with _own_folder(base, store_name(os.getpid(), node)) as folder:
        (folder / "probe").touch()
        yield folder


@contextmanager
def environments_folder(node: NodeId) -> Iterator[Path]:
    """Make the folder in which a node's worker processes unpack runtime environments; leaving removes it."""
    with _own_folder(Path(tempfile.gettempdir()), store_name(os.getpid(), f"{node}-environments")) as folder:
        yield folder


@contextmanager
def logs_folder(node: NodeId) -> Iterator[Path]:
    """Make the folder in which a node keeps what its worker processes print; leaving removes it."""
    with _own_folder(Path(tempfile.gettempdir()), store_name(os.getpid(), f"{node}-logs")) as folder:
        yield folder


@contextmanager
def _own_folder(base: Path, name: str) -> Iterator[Path]:
    """Make a folder of a node, and remove it in the end; and what other nodes left in ``base``.

    It belongs to whoever holds the lock on the file ``lock`` in it, which
    the kernel drops when its holder dies. Pids would not tell: two containers may share the memory and not the pids.
    """
    sweep(base)
    folder = base / name
    folder.mkdir(mode=0o700)
    try:
        with open(folder / "lock.new", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(lock.name, folder / "lock")  # only now is it seen, and it is locked already
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(base: Path) -> None:
    """Remove what nodes left behind that were killed."""
    for folder in base.glob("shoal-*-*"):
        # A folder without its lock is not a node's or is being made now; another user's is none of our business.
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid():
                with open(folder / "lock", "r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)


def store_bytes(folder: Path, wanted: int | None) -> int:
    """Return how large the object store may be: as asked, else a share of memory, never more than the folder holds."""
    free = shutil.disk_usage(folder).free
    return min(free, wanted if wanted is not None else int(memory_bytes() * STORE_SHARE))


def offered(cpus: float | None, gpus: float, memory: int | None, store: int, named: Mapping[str, float]) -> Resources:
    """Return the resources a node has to give out; ``named`` are those that the machine does not have by nature."""
    return to_resources(
        {
            CPU: cpu_count() if cpus is None else cpus,
            GPU: gpus,
            MEMORY: memory_bytes() if memory is None else memory,
            OBJECT_STORE_MEMORY: store,
            **named,
        }
    )


def implicit(address: str, accelerator_types: Iterable[str], *, is_head: bool) -> dict[str, float]:
    """Return the resources by whose names a node, the head, or a kind of accelerator can be asked for: one of each."""
    kinds = [f"accelerator_type:{kind}" for kind in accelerator_types]
    return dict.fromkeys([f"node:{address}", *([HEAD] if is_head else []), *kinds], 1.0)
