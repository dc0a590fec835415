"""Reading segments: what is read stays as long as anything refers to it, and then its pin ends."""

from __future__ import annotations

import fcntl
import gc
import mmap
from pathlib import Path

import numpy
import pytest

from shoal_core.protocol.places import part_of
from shoal_core.runtime.data.segments import Reader, view
from shoal_core.runtime.data.serialization import Codec, segment_bytes
from shoal_core.runtime.data.writing import Writer

PART_BYTES = 256 * 1024


class Later:
    """Timers that a test lets run out."""

    def __init__(self) -> None:
        self.due: list[object] = []

    def __call__(self, _seconds: float, callback: object) -> None:
        self.due.append(callback)

    def run_out(self) -> None:
        due, self.due = self.due, []
        for callback in due:
            callback()  # type: ignore[operator]


class Folder:
    """A node's folder, as its readers and writers see it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.later = Later()
        self.ended: list[tuple[str, int]] = []
        self.writer = Writer(path, self.later)
        self.reader = Reader(path, self.later, lambda segment, serial, _size: self.ended.append((segment, serial)))
        (path / "s1").write_bytes(bytes(4 * PART_BYTES))

    def write(self, index: int, value: object) -> tuple[str, int]:
        """Write a value; return where it lies, and how long it is."""
        place = part_of("s1", index * PART_BYTES)
        serialized = Codec(lambda _ref: None).dump(value)
        assert self.writer.write(place, serialized) == segment_bytes(serialized)
        return place, segment_bytes(serialized)

    def mapped(self) -> int:
        """Return how often this process maps the shared file."""
        return Path("/proc/self/maps").read_text().count(f"{self.path}/s1")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_what_was_written_into_parts_is_read_from_there_with_one_mapping(folder: Folder) -> None:
    arrays = [numpy.full(20_000, number) for number in range(4)]
    places = [folder.write(index, array) for index, array in enumerate(arrays)]
    read = [folder.reader.read(f"o{index}", *place, index)[0] for index, place in enumerate(places)]
    for array, other in zip(arrays, read, strict=True):
        assert (array == other).all()
        assert not other.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            other.flags.writeable = True
    assert folder.mapped() == 2, "to write, and to read"
    assert folder.ended == []


def test_a_pin_ends_with_the_last_buffer_however_it_was_made(folder: Folder) -> None:
    value, memory = folder.reader.read("o1", *folder.write(0, numpy.arange(20_000)), 7)
    part = memoryview(value)[10:20]
    del value, memory
    gc.collect()
    assert folder.ended == []
    assert part.tolist() == list(range(10, 20))
    del part
    assert folder.ended == [("o1", 7)]


def test_what_was_read_outlives_the_reader(folder: Folder) -> None:
    value = folder.reader.read("o1", *folder.write(0, numpy.arange(20_000)), 1)[0]
    folder.reader.close()
    folder.writer.close()
    folder.reader = Reader(folder.path, folder.later, lambda *_: None)
    gc.collect()
    assert int(value.sum()) == 19_999 * 10_000
    assert folder.mapped() == 1
    del value
    gc.collect()
    assert folder.mapped() == 0


def test_a_file_in_which_nothing_is_read_or_written_is_mapped_no_more_a_moment_later(folder: Folder) -> None:
    place = folder.write(0, numpy.arange(20_000))
    value = folder.reader.read("o1", *place, 1)[0]
    folder.later.run_out()
    assert folder.mapped() == 2, "they were in use since the last look"
    folder.later.run_out()
    assert folder.mapped() == 1, "what was read still is"
    assert int(value[-1]) == 19_999
    del value
    assert folder.mapped() == 0
    assert folder.later.due == []
    assert int(folder.reader.read("o1", *place, 2)[0][5]) == 5


def test_a_file_that_is_gone_is_an_error_and_nothing_else(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.reader.read("o1", part_of("s9", mmap.PAGESIZE), 100, 1)
    gc.collect()
    assert folder.ended == []


def is_locked(path: Path) -> bool:
    """Tell whether somebody else has locked a file."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_what_is_mapped_unasked_is_locked_until_its_last_buffer_is_gone(folder: Folder) -> None:
    path = folder.path / "o1"
    path.write_bytes(b"value")
    memory = folder.reader.map_unasked("o1", 5, 7)
    assert memory is not None
    part = view(memory)[1:3]
    path.rename(folder.path / "o2")
    del memory
    gc.collect()
    assert is_locked(folder.path / "o2")
    assert bytes(part) == b"al"
    del part
    assert not is_locked(folder.path / "o2")
    assert folder.ended == [("o1", 7)]


def test_what_is_pinned_is_locked_as_well_for_another_node_may_have_the_file_too(folder: Folder) -> None:
    place = folder.write(0, numpy.arange(20_000))
    (folder.path / "o1").write_bytes((folder.path / "s1").read_bytes())
    value = folder.reader.read("o1", "o1", place[1], 7)[0]
    assert is_locked(folder.path / "o1")
    assert int(value[-1]) == 19_999
    del value
    gc.collect()
    assert not is_locked(folder.path / "o1")
    assert folder.ended == [("o1", 7)]


def test_nothing_is_mapped_unasked_that_is_about_to_be_used_again(folder: Folder) -> None:
    path = folder.path / "o1"
    assert folder.reader.map_unasked("o1", 5, 7) is None, "it has another name already"
    path.write_bytes(b"value")
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert folder.reader.map_unasked("o1", 5, 7) is None
    assert folder.reader.map_unasked("o1", 5, 8) is not None
    assert folder.ended == [("o1", 8)]


def test_nothing_is_mapped_unasked_that_was_used_again_before_it_was_locked(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.path / "o1"
    path.write_bytes(b"value")

    def lock(_descriptor: int, _operation: int) -> None:
        path.rename(folder.path / "o2")

    monkeypatch.setattr(fcntl, "flock", lock)
    assert folder.reader.map_unasked("o1", 5, 7) is None
    (folder.path / "o2").rename(path)

    def lock_late(_descriptor: int, _operation: int) -> None:
        path.rename(folder.path / "o2")
        path.write_bytes(b"other")

    monkeypatch.setattr(fcntl, "flock", lock_late)
    assert folder.reader.map_unasked("o1", 5, 7) is None
    assert folder.ended == []
