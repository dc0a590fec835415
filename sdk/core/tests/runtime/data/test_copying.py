"""Copying: every byte arrives, by however many threads, and none writes on when the copy is over."""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import stringzilla

from shoal_core.runtime.data import copying
from shoal_core.runtime.data.copying import copy, populate


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SHARED_BYTES", 1000)
    monkeypatch.setattr(copying, "STEP_BYTES", 300)
    monkeypatch.setattr(copying, "PAGE_BYTES", 100)


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


def test_copies_go_past_the_caches_where_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = copying.STREAMS_WITH in stringzilla.__capabilities__
    assert (copying._streaming() is not ctypes.memmove) == streams
    monkeypatch.setattr(copying, "STREAMS_WITH", "another processor")
    assert copying._streaming() is ctypes.memmove


@pytest.mark.parametrize("offset", [0, 1, 64])
def test_large_parts_arrive_wherever_they_lie(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    monkeypatch.setattr(copying, "SHARED_BYTES", 1024 * 1024)
    monkeypatch.setattr(copying, "STEP_BYTES", 3 * 1024 * 1024)
    source = pattern(8 * 1024 * 1024 + 77)
    target = bytearray(offset + len(source) + 1)
    copy(memoryview(target)[offset:], memoryview(source))
    assert target == bytes(offset) + source + b"\0"


def test_a_target_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(BufferError):
        copy(memoryview(pattern(5000)), memoryview(pattern(5000)))


def test_an_interruption_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "cpu_count", lambda: 4)
    monkeypatch.setattr(copying, "STEP_BYTES", 2000)
    monkeypatch.setattr(copying, "PAGE_BYTES", 1)
    wait, begun, may_go_on = copying._Helper.wait, threading.Barrier(4), threading.Event()
    interruptions = iter([KeyboardInterrupt, KeyboardInterrupt])
    ended: list[int] = []

    def move(to: int, of: int, start: int, stop: int) -> None:
        begun.wait()
        if threading.current_thread() is not threading.main_thread():
            may_go_on.wait()
            ended.append(start)

    def wait_interrupted(helper: copying._Helper) -> None:
        for interruption in interruptions:
            raise interruption
        may_go_on.set()
        wait(helper)

    monkeypatch.setattr(copying, "_move", move)
    monkeypatch.setattr(copying._Helper, "wait", wait_interrupted)
    with pytest.raises(KeyboardInterrupt):
        copy(memoryview(bytearray(8000)), memoryview(pattern(8000)))
    assert len(ended) == 3


def test_what_has_not_begun_when_the_copy_is_interrupted_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "cpu_count", lambda: 3)
    late: list[Callable[[], None]] = []

    def interrupt(to: int, of: int, start: int, stop: int) -> None:
        assert not start, "only this thread's own part"
        raise KeyboardInterrupt

    monkeypatch.setattr(copying._Helper, "start", lambda helper: late.append(helper._run))
    monkeypatch.setattr(copying, "_move", interrupt)
    with pytest.raises(KeyboardInterrupt):
        copy(memoryview(bytearray(8000)), memoryview(pattern(8000)))
    assert len(late) == 2
    for begin in late:
        begin()


def test_nobody_waits_for_a_thread_that_begins_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "cpu_count", lambda: 3)
    late: list[Callable[[], None]] = []
    monkeypatch.setattr(copying._Helper, "start", lambda helper: late.append(helper._run))
    target = bytearray(8000)
    copy(memoryview(target), memoryview(pattern(8000)))
    assert target == pattern(8000)
    target[:] = bytes(8000)
    assert len(late) == 2
    for begin in late:
        begin()
    assert target == bytes(8000)


def resident_bytes(path: Path) -> int:
    """Return how much of a file this process has in its tables."""
    maps = psutil.Process().memory_maps(grouped=False)
    return sum(one.rss for one in maps if one.path == str(path))


@pytest.mark.parametrize("cpus", [1, 3])
def test_all_pages_of_a_mapping_are_entered_by_however_many_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpus: int
) -> None:
    monkeypatch.setattr(copying, "cpu_count", lambda: cpus)
    monkeypatch.setattr(copying, "POPULATED_BYTES", 3 * mmap.PAGESIZE)
    path = tmp_path / "file"
    path.write_bytes(bytes(40 * mmap.PAGESIZE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 40 * mmap.PAGESIZE) as mapping:
        with memoryview(mapping) as whole, whole[: 37 * mmap.PAGESIZE + 5] as target:
            populate(target)
        assert resident_bytes(path) >= 38 * mmap.PAGESIZE


def test_memory_that_is_not_to_be_had_is_an_error_and_ends_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "cpu_count", lambda: 3)
    calls: list[int] = []

    def refuse(address: int, length: int, advice: int) -> int:
        calls.append(length)
        ctypes.set_errno(errno.ENOMEM)
        return -1

    monkeypatch.setattr(copying, "_madvise", refuse)
    monkeypatch.setattr(copying, "POPULATED_BYTES", mmap.PAGESIZE)
    with (
        mmap.mmap(-1, 90 * mmap.PAGESIZE) as mapping,
        memoryview(mapping) as target,
        pytest.raises(OSError, match="memory"),
    ):
        populate(target)
    assert len(calls) <= 3, "one for each thread"
