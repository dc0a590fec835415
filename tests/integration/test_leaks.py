"""What is left after a cluster was used and ended: nothing."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import psutil
import pytest

import shoal
from tests.integration.stores import SHARED_MEMORY, stores


@shoal.remote
def double(x: int) -> int:
    return 2 * x


def test_init_and_shutdown_leave_nothing_behind() -> None:
    used: set[Path] = set()

    def left() -> tuple[int, int, list[Path]]:
        gc.collect()  # what tests before left for it, descriptors among it
        return (
            len(psutil.Process().children(recursive=True)),
            psutil.Process().num_fds(),
            [store for store in used if store.exists()],
        )

    def once() -> None:
        with shoal.init(num_cpus=1):
            used.update(stores())
            assert shoal.get(double.remote(21)) == 42
            assert len(shoal.get(shoal.put(b"x" * 1_000_000))) == 1_000_000

    once()
    before = left()
    for _ in range(3):
        once()
    assert left() == before
    assert len(used) == 4


@pytest.mark.parametrize("in_a_folder_of_ours", [False, True])
def test_a_host_that_was_killed_leaves_nothing_behind_either(tmp_path: Path, in_a_folder_of_ours: bool) -> None:
    folder = tmp_path if in_a_folder_of_ours else SHARED_MEMORY

    def brokers() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("shoal-broker-*"))

    with shoal.init(num_cpus=1, _plasma_directory=str(folder) if in_a_folder_of_ours else None) as context:
        broker_and_workers = psutil.Process().children(recursive=True)
        (host,) = [one for one in psutil.Process().children() if "shoal.host" in one.cmdline()]
        assert shoal.get(double.remote(21)) == 42
        shared = shoal.put(b"x" * 1_000_000)
        (store,) = folder.glob(f"shoal-{host.pid}-*")
        (mine,) = [one for one in brokers() if _is_of(one, broker_and_workers)]
        session = Path(context["session_dir"])
        assert session.is_dir()
        host.kill()
        host.wait()
        del shared
    assert not store.exists()
    assert not session.exists()
    assert not mine.exists()


def _is_of(folder: Path, processes: list[psutil.Process]) -> bool:
    """Tell whether one of the processes is the broker whose folder this is."""
    return any(str(folder / "broker.conf") in process.cmdline() for process in processes)
