"""The memory of what is moved: files stay mapped for the next object, all else does not."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from shoal_core.mappings import LEAST_KEPT_BYTES
from shoal_core.transfer.mapped import KEPT_SECONDS, Mapper

SIZE = LEAST_KEPT_BYTES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "o1"
    path.write_bytes(bytes(SIZE + mmap.PAGESIZE))
    return path


def test_a_file_that_comes_again_under_another_name_is_not_mapped_again(file: Path) -> None:
    mapper = Mapper(writable=True)
    first = mapper.map(file, SIZE)
    assert not first.entered, "its pages are new to this process"
    first.enter(0, SIZE)
    first.view[:1] = b"a"
    mapper.keep(first, now=1.0)
    os.rename(file, file.with_name("o2"))
    second = mapper.map(file.with_name("o2"), SIZE + 1)
    assert second.mapping is first.mapping
    assert second.entered
    assert (len(second.view), second.view[0]) == (SIZE + 1, ord("a"))


def test_who_uses_a_file_at_the_same_time_maps_it_too(file: Path) -> None:
    mapper = Mapper(writable=False)
    first, second = mapper.map(file, SIZE), mapper.map(file, SIZE)
    assert second.mapping is not first.mapping
    mapper.keep(first, now=1.0)
    mapper.keep(second, now=2.0)
    assert mapper.map(file, SIZE).mapping is second.mapping
    assert mapper.map(file, SIZE).mapping is not first.mapping, "one mapping of a file is kept"


def test_what_was_not_used_for_a_while_is_dropped(file: Path) -> None:
    mapper = Mapper(writable=True)
    first = mapper.map(file, SIZE)
    mapper.keep(first, now=1.0)
    mapper.tick(now=1.0 + KEPT_SECONDS / 2)
    assert mapper.wake_at == 1.0 + KEPT_SECONDS
    mapper.tick(mapper.wake_at)
    assert mapper.wake_at == float("inf")
    assert mapper.map(file, SIZE).mapping is not first.mapping


def test_memory_of_this_process_and_parts_of_files_are_not_kept(file: Path) -> None:
    mapper = Mapper(writable=True)
    data = bytearray(SIZE)
    own = mapper.map(memoryview(data), SIZE)
    own.enter(0, SIZE)
    own.view[:1] = b"a"
    assert data[0] == ord("a")
    part = mapper.map(file, SIZE, mmap.PAGESIZE)
    part.view[:1] = b"b"
    assert file.read_bytes()[mmap.PAGESIZE] == ord("b")
    for one in (own, part):
        mapper.keep(one, now=1.0)
    assert mapper.wake_at == float("inf")
