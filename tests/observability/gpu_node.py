"""A node with two GPUs, played by a library that is made of Python: ``python -m tests.observability.gpu_node …``."""

from __future__ import annotations

import sys

from services.worker.tests.nvml import Gpu, Library, installed
from shoal_core.service.main import run
from shoal_worker.service import SERVICE

if __name__ == "__main__":
    devices = [
        Gpu("GPU-a", busy_percent=70, used_bytes=20 << 30, millijoules=5_000_000),
        Gpu("GPU-b", busy_percent=10, used_bytes=2 << 30, millijoules=7_000_000),
    ]
    with installed(Library(devices)):
        status = run(SERVICE, sys.argv[1:])
    sys.exit(status)
