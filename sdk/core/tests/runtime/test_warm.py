"""Writable mappings that are kept: used again for the same file whatever its name, within bounds, and not for long."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shoal_core.runtime import warm
from shoal_core.runtime.warm import IDLE_SECONDS, LEAST_FILE_BYTES, WarmMappings

SIZE = 2 * LEAST_FILE_BYTES


def make(path: Path, size_bytes: int = SIZE) -> Path:
    path.write_bytes(bytes(size_bytes))
    return path


def write(mappings: WarmMappings, path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        with mappings.mapped(descriptor, len(data)) as target:
            assert len(target) == len(data)
            target[:] = data
    finally:
        os.close(descriptor)


def count_maps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    real = warm._map

    def counted(descriptor: int, file_bytes: int, size_bytes: int) -> object:
        made.append(size_bytes)
        return real(descriptor, file_bytes, size_bytes)

    monkeypatch.setattr(warm, "_map", counted)
    return made


def test_a_file_is_found_mapped_under_its_next_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, mappings = count_maps(monkeypatch), WarmMappings()
    path = make(tmp_path / "o1")
    write(mappings, path, b"a" * SIZE)
    path = path.rename(tmp_path / "o2")
    write(mappings, path, b"b" * (SIZE - 5))
    assert path.read_bytes() == b"b" * (SIZE - 5) + b"a" * 5
    assert len(made) == 1
    assert mappings.size_bytes == SIZE


def test_another_file_of_the_same_name_is_another_file(tmp_path: Path) -> None:
    mappings = WarmMappings()
    path = make(tmp_path / "o1")
    held = open(path, "rb")  # noqa: SIM115
    with held:
        write(mappings, path, b"a" * SIZE)
        path.unlink()
        write(mappings, make(path), b"b" * SIZE)
        assert (held.read(1), path.read_bytes()[:1]) == (b"a", b"b")


def test_small_files_are_not_kept(tmp_path: Path) -> None:
    mappings = WarmMappings()
    path = make(tmp_path / "o1", 4096)
    write(mappings, path, b"a" * 4000)
    assert path.read_bytes()[:4000] == b"a" * 4000
    assert mappings.size_bytes == 0


def test_no_more_is_kept_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "MOST_BYTES", 2 * SIZE)
    made, mappings = count_maps(monkeypatch), WarmMappings()
    paths = [make(tmp_path / f"o{number}") for number in range(3)]
    for path in paths:
        write(mappings, path, b"a" * SIZE)
    assert mappings.size_bytes == 2 * SIZE
    write(mappings, paths[2], b"b" * SIZE)
    assert len(made) == 3
    write(mappings, paths[0], b"b" * SIZE)
    assert len(made) == 4, "the one that was used longest ago was dropped"


def test_what_is_idle_is_dropped(tmp_path: Path) -> None:
    mappings = WarmMappings()
    write(mappings, make(tmp_path / "o1"), b"a" * SIZE)
    now = time.monotonic()
    assert mappings.drop_idle(now - IDLE_SECONDS / 2)
    assert not mappings.drop_idle(now + IDLE_SECONDS)
    assert mappings.size_bytes == 0


def test_a_write_that_fails_keeps_nothing(tmp_path: Path) -> None:
    mappings = WarmMappings()
    with pytest.raises(ValueError, match="different structures"):
        _write_wrongly(mappings, make(tmp_path / "o1"))
    assert mappings.size_bytes == 0


def _write_wrongly(mappings: WarmMappings, path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        with mappings.mapped(descriptor, SIZE) as target:
            target[:5] = b"a"
    finally:
        os.close(descriptor)


def test_a_kernel_that_cannot_populate_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "MADV_POPULATE_WRITE", 12345)  # EINVAL, as from a kernel that does not know it
    path = make(tmp_path / "o1")
    write(WarmMappings(), path, b"a" * SIZE)
    assert path.read_bytes() == b"a" * SIZE
