"""How much memory the processes of one measurement hold, from Linux's ``/proc``.

Which processes belong to it is told by a variable of the environment that all of them inherit (``MARK``), so
that daemons are found too; and by who started them, since the title of a process may lie where its environment was.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType

MARK = "SHOAL_BENCH_MARK"
_SAMPLE_SECONDS = 0.05
_REST_BYTES = 1_000_000


def marked_processes(mark: str) -> list[int]:
    """Return the pids of all processes whose environment holds this mark, and of those that descend from them."""
    found: set[int] = set()
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        pid = int(folder.name)
        try:
            parents[pid] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes()
        except OSError:  # gone, or somebody else's
            continue
        if f"{MARK}={mark}".encode() in environment.split(b"\0"):
            found.add(pid)
    while children := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= children
    return sorted(found)


def pss_bytes(pid: int) -> int:
    """Return a process's proportional share of memory; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def pss_by_process() -> tuple[int, dict[int, int]]:
    """Return this process's share and those of all others of the measurement, in bytes."""
    own = os.getpid()
    others = {pid: pss_bytes(pid) for pid in marked_processes(os.environ[MARK]) if pid != own}
    return pss_bytes(own), {pid: size for pid, size in others.items() if size}


def wait_until_at_rest(limit_seconds: float = 20.0) -> None:
    """Wait until the memory of all processes has changed by less than a megabyte in two seconds."""
    deadline = time.monotonic() + limit_seconds
    last = -1
    while time.monotonic() < deadline:
        total = sum(pss_by_process()[1].values())
        if abs(total - last) < _REST_BYTES:
            return
        last = total
        time.sleep(2.0)


class PeakMemory:
    """Samples this process's resident memory within a ``with`` block; ``growth_bytes`` is the most it grew by."""

    def __init__(self) -> None:
        self._before = self._peak = 0
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    @property
    def growth_bytes(self) -> int:
        """How much more than at the block's beginning was held at most, in bytes."""
        return self._peak - self._before

    def __enter__(self) -> PeakMemory:
        self._before = self._peak = _resident_bytes()
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._sampler.join()
        self._peak = max(self._peak, _resident_bytes())

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
