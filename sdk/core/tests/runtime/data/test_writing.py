"""Writing into segments: mappings are kept for the next value, and not for long."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shoal_core import mappings
from shoal_core.mappings import LEAST_KEPT_BYTES, MOST_KEPT
from shoal_core.protocol.errors import ObjectStoreFullError
from shoal_core.runtime.data import copying
from shoal_core.runtime.data.serialization import Codec, Serialized, read_segment
from shoal_core.runtime.data.writing import Writer

CAPACITY = 2 * LEAST_KEPT_BYTES


class Later:
    """Timers that a test lets run out."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []

    def __call__(self, seconds: float, callback: Callable[[], None]) -> None:
        self.due.append(callback)

    def run_out(self) -> None:
        due, self.due = self.due, []
        for callback in due:
            callback()


class Folder:
    """A node's folder, as far as a writer sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.later = Later()
        self.writer = Writer(path, self.later)

    def make(self, name: str, size: int = CAPACITY) -> None:
        with open(self.path / name, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def write(self, name: str, data: bytes) -> None:
        self.writer.write(name, value(data))
        assert read_segment(memoryview((self.path / name).read_bytes())) == data

    def mapped(self) -> set[str]:
        """Return the files of this folder that this process maps."""
        maps = [mapping.path for mapping in psutil.Process().memory_maps(grouped=False)]
        return {path.removeprefix(f"{self.path}/") for path in maps if path.startswith(str(self.path))}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def value(data: bytes) -> Serialized:
    return Codec(lambda _ref: None).dump(data)


def test_a_file_that_comes_again_under_another_name_is_not_mapped_again(folder: Folder) -> None:
    folder.make("o1")
    folder.write("o1", b"a" * LEAST_KEPT_BYTES)
    (mapping,) = folder.writer._kept._mappings.values()
    os.rename(folder.path / "o1", folder.path / "o2")
    folder.write("o2", b"b" * (LEAST_KEPT_BYTES + 10))
    assert list(folder.writer._kept._mappings.values()) == [mapping]


def test_what_is_kept_is_dropped_once_nothing_was_written_for_a_while(folder: Folder) -> None:
    descriptors = psutil.Process().num_fds()
    folder.make("o1")
    folder.write("o1", b"a")
    folder.make("o2")
    folder.write("o2", b"b")
    folder.later.run_out()
    assert folder.mapped() == {"o1", "o2"}, "something was written since"
    folder.later.run_out()
    assert folder.mapped() == set()
    assert not folder.later.due
    assert psutil.Process().num_fds() <= descriptors
    folder.write("o1", b"c")
    assert len(folder.later.due) == 1
    folder.writer.close()
    assert folder.mapped() == set()


def test_no_more_is_kept_than_is_allowed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(MOST_KEPT + 3):
        folder.make(f"o{number}")
        folder.write(f"o{number}", b"a")
    assert folder.mapped() == {f"o{number}" for number in range(3, MOST_KEPT + 3)}
    monkeypatch.setattr(mappings, "MOST_KEPT_BYTES", 2 * CAPACITY)
    folder.write("o3", b"b")
    assert folder.mapped() == {f"o{MOST_KEPT + 2}", "o3"}, "those that were written last"
    folder.make("large", 3 * CAPACITY)
    folder.write("large", b"c")
    folder.make("small", LEAST_KEPT_BYTES // 2)
    folder.write("small", b"d")
    assert folder.mapped() == {f"o{MOST_KEPT + 2}", "o3"}
    folder.writer.close()


def test_a_file_that_is_not_there_or_too_small_is_an_error_and_keeps_nothing(folder: Folder) -> None:
    with pytest.raises(ObjectStoreFullError, match="could not be mapped"):
        folder.writer.write("o1", value(b"a"))
    folder.make("o1", 4096)
    with pytest.raises(ObjectStoreFullError, match="could not be mapped"):
        folder.writer.write("o1", value(b"a" * LEAST_KEPT_BYTES))
    assert folder.mapped() == set()


def test_a_kernel_that_cannot_enter_pages_ahead_is_done_without(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "MADV_POPULATE_WRITE", 12345)  # EINVAL, as from a kernel that does not know it
    folder.make("o1")
    folder.write("o1", b"a" * LEAST_KEPT_BYTES)
    folder.writer.close()
