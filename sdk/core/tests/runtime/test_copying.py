"""Copying: every byte arrives, by however many threads, and none writes on when the copy is over."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import pytest

from shoal_core.runtime import copying
from shoal_core.runtime.copying import copy


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SHARED_BYTES", 1000)
    monkeypatch.setattr(copying, "STEP_BYTES", 300)


def pattern(size: int) -> bytes:
    return bytes(np.arange(size, dtype=np.uint32).view(np.uint8)[:size])


@pytest.mark.parametrize("cpus", [1, 2, 3, 64])
@pytest.mark.parametrize("size", [0, 1, 1999, 2000, 2001, 8191])
def test_every_byte_arrives_and_no_other_is_touched(monkeypatch: pytest.MonkeyPatch, cpus: int, size: int) -> None:
    monkeypatch.setattr(copying, "cpu_count", lambda: cpus)
    target = bytearray(b"\xff" * (size + 10))
    copy(memoryview(target), memoryview(pattern(size)))
    assert target == pattern(size) + b"\xff" * 10


def test_arrays_of_any_shape_and_mapped_memory() -> None:
    array = np.asfortranarray(np.arange(6000, dtype=np.float64).reshape(20, 300))
    array.flags.writeable = False
    with mmap.mmap(-1, array.nbytes) as target:
        with memoryview(target) as view:
            copy(view, array.T.data)
        assert target[:] == array.T.tobytes()
        copy(memoryview(bytearray()), np.zeros((0, 3)).data)


def test_a_target_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(BufferError):
        copy(memoryview(pattern(5000)), memoryview(pattern(5000)))


def test_an_interruption_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "cpu_count", lambda: 4)
    wait, begun, may_go_on = threading.Thread.join, threading.Barrier(4), threading.Event()
    interruptions = iter([KeyboardInterrupt, KeyboardInterrupt])

    def move(to: int, of: int, start: int, stop: int) -> None:
        begun.wait()
        if threading.current_thread() is not threading.main_thread():
            may_go_on.wait()

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        for interruption in interruptions:
            raise interruption
        may_go_on.set()
        wait(thread, timeout)

    monkeypatch.setattr(copying, "_move", move)
    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        copy(memoryview(bytearray(8000)), memoryview(pattern(8000)))
    assert not [thread for thread in threading.enumerate() if thread.name == "shoal-copy"]
