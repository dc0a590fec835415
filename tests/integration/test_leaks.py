"""What is left after a cluster was used and ended: nothing."""

from __future__ import annotations

from pathlib import Path

import psutil

import shoal


@shoal.remote
def double(x: int) -> int:
    return 2 * x


def test_init_and_shutdown_leave_nothing_behind() -> None:
    def left() -> tuple[int, int, list[str]]:
        folders = [entry.name for entry in Path("/dev/shm").glob("shoal-*")]
        orphans = [name for name in folders if not psutil.pid_exists(int(name.split("-")[1]))]
        return len(psutil.Process().children(recursive=True)), psutil.Process().num_fds(), orphans

    def once() -> None:
        with shoal.init(num_cpus=1):
            assert shoal.get(double.remote(21)) == 42
            assert len(shoal.get(shoal.put(b"x" * 1_000_000))) == 1_000_000

    once()
    before = left()
    for _ in range(3):
        once()
    assert left() == before
