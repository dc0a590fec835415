"""What processes of one machine owe each other: to die with their makers, and to tidy up after the dead."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import pytest

from shoal_core.machine import (
    PAST_CACHES,
    PAST_CACHES_BYTES,
    TUNABLES,
    die_with_parent,
    environment_for_copies,
    remove_stores,
    store_name,
)


def a_store(base: Path, pid: int, node: str) -> Path:
    folder = base / store_name(pid, node)
    folder.mkdir()
    (folder / "segment").write_bytes(b"x" * 100)
    return folder


def test_what_a_dead_node_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = [a_store(tmp_path, 123, node) for node in ("a1", "b2")]
    (dead[0] / "lock").touch()
    others = [a_store(tmp_path, pid, "a1") for pid in (12, 1234)]
    (tmp_path / "shoal-123").mkdir()
    remove_stores(123, tmp_path)
    assert not any(folder.exists() for folder in dead)
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "shoal-123"])


def test_what_somebody_holds_under_the_same_pid_stays(tmp_path: Path) -> None:
    held = a_store(tmp_path, 123, "a1")
    with open(held / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_stores(123, tmp_path)
        assert (held / "segment").exists()
    remove_stores(123, tmp_path)
    assert not held.exists()


@pytest.mark.parametrize("binds_itself_in_time", [True, False])
def test_a_process_dies_with_the_one_that_made_it(binds_itself_in_time: bool) -> None:
    reader, writer = os.pipe()
    gate_reader, gate_writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        _make_a_child(writer, gate_reader, binds_itself_in_time)
    os.close(writer)
    assert int(os.read(reader, 100)) > 0
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.write(gate_writer, b"go")
    assert os.read(reader, 100) == b"", "the child has ended, and with it the last who could write"
    for descriptor in (reader, gate_reader, gate_writer):
        os.close(descriptor)


def _make_a_child(writer: int, gate: int, in_time: bool) -> None:
    """Fork; the child says its pid, and binds itself to this process: before this one dies, or only after."""
    try:
        parent = os.getpid()
        if os.fork() == 0:
            if in_time:
                die_with_parent(parent)
                os.write(writer, str(os.getpid()).encode())
            else:
                os.write(writer, str(os.getpid()).encode())
                os.read(gate, 2)
                die_with_parent(parent)
        while True:
            signal.pause()
    finally:
        os._exit(1)


def test_processes_that_copy_much_copy_past_the_caches_unless_told_otherwise() -> None:
    ours = f"{PAST_CACHES}={PAST_CACHES_BYTES}"
    assert environment_for_copies({"A": "1"}) == {"A": "1", TUNABLES: ours}
    assert environment_for_copies({TUNABLES: "glibc.malloc.check=1"}) == {TUNABLES: f"glibc.malloc.check=1:{ours}"}
    told = {TUNABLES: f"{PAST_CACHES}=0x4040"}
    assert environment_for_copies(told) == told
    assert environment_for_copies(environment_for_copies({})) == {TUNABLES: ours}
