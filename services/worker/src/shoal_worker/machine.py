"""What a machine offers: processors, memory, GPUs, and a folder in shared memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.resources import CPU, GPU, MEMORY, OBJECT_STORE_MEMORY, Resources, to_resources

STORE_SHARE = 0.3
SHARED_MEMORY = Path("/dev/shm")


def cpu_count() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the machine's memory, or the limit of this container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def gpu_names() -> list[str]:
    """Return the indices of the NVIDIA GPUs, as ``CUDA_VISIBLE_DEVICES`` names them; none is fine."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return []
    try:
        return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def store_folder(node: NodeId) -> Path:
    """Make the folder of a node's segments, in shared memory where there is some, with the probe file in it."""
    base = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    sweep(base)
    folder = base / f"shoal-{os.getpid()}-{node}"
    folder.mkdir(mode=0o700)
    (folder / "probe").touch()
    return folder


def sweep(base: Path) -> None:
    """Remove what nodes of this machine left behind that were killed."""
    for folder in base.glob("shoal-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and folder.owner() == Path("/proc/self").owner():
            shutil.rmtree(folder, ignore_errors=True)


def store_bytes(folder: Path, wanted: int | None) -> int:
    """Return how large the object store may be: as asked, else a share of memory, never more than the folder holds."""
    free = shutil.disk_usage(folder).free
    return min(free, wanted if wanted is not None else int(memory_bytes() * STORE_SHARE))


def offered(cpus: float | None, gpus: float, memory: int | None, store: int, custom: dict[str, float]) -> Resources:
    """Return the resources a node has to give out."""
    return to_resources(
        {
            CPU: cpu_count() if cpus is None else cpus,
            GPU: gpus,
            MEMORY: memory_bytes() if memory is None else memory,
            OBJECT_STORE_MEMORY: store,
            **custom,
        }
    )
