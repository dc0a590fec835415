"""What this machine is, to tell whether two processes share it, and what processes on it owe each other."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

CUDA_VISIBLE = "CUDA_VISIBLE_DEVICES"
HIDDEN = frozenset({"", "-1", "NoDevFiles"})
"""What the first entry of a variable that shows devices may be to show none at all."""
PR_SET_PDEATHSIG = 1
SHARED_MEMORY = Path("/dev/shm")
TUNABLES = "GLIBC_TUNABLES"
PAST_CACHES = "glibc.cpu.x86_non_temporal_threshold"
PAST_CACHES_BYTES = 8 * 1024 * 1024
"""From here on copies go past the caches, which spares memory the reading of what will be overwritten.

It is a quarter of the 32 MiB that a few cores mostly share; a quarter is what the C library takes since 2.38. Older
ones take far more in some virtual machines, such as 240 MiB (measured for 80 MB by two threads: 5.6 ms so, else 4.0).
"""


@functools.cache
def cpu_count() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment_for_copies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that copies much, as the C library reads it once, when the process starts.

    What the environment says about this already is left as it is.
    """
    tunables = environment.get(TUNABLES, "")
    if PAST_CACHES in tunables:
        return dict(environment)
    ours = f"{PAST_CACHES}={PAST_CACHES_BYTES}"
    return {**environment, TUNABLES: f"{tunables}:{ours}" if tunables else ours}


def boot_id() -> str:
    """Return a name that two processes have in common exactly if they share a kernel; "" where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def machine_id() -> str:
    """Return a name that two processes have in common exactly if they share a kernel and a pid namespace.

    Then they can watch each other's pids. Whether they share memory is another question: two containers may share
    ``/dev/shm`` and nothing else; try to open a file.
    """
    boot = boot_id()
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    if not boot:
        boot = str(uuid.getnode())
    return hashlib.blake2b(f"{boot} {namespace}".encode(), digest_size=8).hexdigest()


def store_name(pid: int | str, node: str) -> str:
    """Return the name of the folder of a node's segments; ``pid`` is the node service's, and "*" in a pattern any."""
    return f"shoal-{pid}-{node}"


def remove_stores(pid: int, base: str | Path | None = None) -> None:
    """Remove what a node service of this user left that had this pid and could not tidy up.

    That lies in shared memory, among temp files, or in ``base``. The service must have ended. Pids may mean others too
    where containers share the memory but not the pids, so that what somebody still holds by its file ``lock`` stays.
    """
    bases = {SHARED_MEMORY, Path(tempfile.gettempdir())} | (set() if base is None else {Path(base)})
    for folder in (folder for one in bases for folder in one.glob(store_name(pid, "*"))):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid() and not _is_held(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)


def _is_held(path: Path) -> bool:
    """Tell whether a process has locked a file; the kernel drops the lock when its holder dies."""
    try:
        with open(path, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@functools.cache
def death_with_parent() -> Callable[[], object]:
    """Return a function that has the kernel kill this process when the thread that made it ends (Linux).

    Elsewhere it does nothing. It may be called between fork and exec: it is one call into libc, which was loaded here.
    """
    if sys.platform != "linux":
        return _nothing
    import ctypes  # only who makes processes needs it

    libc = ctypes.CDLL(None, use_errno=True)
    return functools.partial(libc.prctl, PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end at once if that has happened already."""
    death_with_parent()()
    if os.getppid() != parent:
        os._exit(1)


def _nothing() -> None:
    """There is no such thing here."""


def device_entries(visible: str) -> list[str]:
    """Return the entries of a variable that shows a process devices, such as ``CUDA_VISIBLE_DEVICES``."""
    entries = [entry.strip() for entry in visible.split(",")]
    return [] if entries[0] in HIDDEN else [entry for entry in entries if entry]


def visible_gpus() -> list[str] | None:
    """Return the GPUs that this process is shown by name; None where nothing says which."""
    visible = os.environ.get(CUDA_VISIBLE)
    return None if visible is None else device_entries(visible)


def check_gpus(wanted: float | None) -> None:
    """Raise ``ValueError`` where a node is to offer part of a GPU, or more of them than its environment shows it."""
    if wanted is not None and wanted % 1:
        raise ValueError(f"num_gpus of a node must be a whole number, got {wanted:g}; tasks and actors may take parts")
    shown = visible_gpus()
    if wanted is not None and shown is not None and wanted > len(shown):
        raise ValueError(f"num_gpus is {wanted:g}, but {CUDA_VISIBLE} shows {len(shown)}: {os.environ[CUDA_VISIBLE]!r}")
