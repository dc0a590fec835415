"""What a machine offers, and the folder of a node's segments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shoal_core.protocol.resources import UNIT
from shoal_core.service.settings import SettingsError
from shoal_core.testing.builders import node_id
from shoal_worker import machine

NODE = node_id(1)
HOLD = """
import sys, time
from pathlib import Path
from shoal_worker.machine import store_folder
with store_folder(sys.argv[1], Path(sys.argv[2])) as folder:
    (folder / "o1").write_bytes(b"an object")
    print(folder, flush=True)
    time.sleep(3600)
"""


def test_the_folder_has_a_probe_and_is_for_this_user_only(tmp_path: Path) -> None:
    with machine.store_folder(NODE, tmp_path) as folder:
        assert folder.parent == tmp_path
        assert (folder / "probe").is_file()
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "o1").touch()
    assert list(tmp_path.iterdir()) == []


def test_environments_are_unpacked_beside_what_others_left_and_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with machine.environments_folder(NODE) as folder, machine.store_folder(NODE, tmp_path) as store:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder != store
        (folder / "00000001").mkdir()
        machine.sweep(tmp_path)
        assert (folder / "00000001").is_dir(), "what somebody holds stays"
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    (folder / "lock").touch()  # of a node that was killed
    machine.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_lies_in_shared_memory_where_there_is_enough_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(files))
    free = shutil.disk_usage(tmp_path).free
    assert machine.store_base(4096) == tmp_path
    assert caplog.records == []
    assert machine.store_base(1 << 60) == files
    assert "--shm-size" in caplog.text
    assert f"{1 << 60:,} are wanted" in caplog.text
    monkeypatch.setattr(machine, "LEAST_BYTES", free * 2)
    monkeypatch.setattr(machine, "memory_bytes", lambda: free * 4)
    assert machine.store_base(None) == files
    caplog.clear()
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert machine.store_base(None) == files
    assert "cannot be written" in caplog.text


def test_the_folder_may_be_chosen(tmp_path: Path) -> None:
    assert machine.store_base(None, str(tmp_path)) == tmp_path
    with pytest.raises(SettingsError, match="--object-store-folder"):
        machine.store_base(None, str(tmp_path / "none"))


def test_the_folder_of_a_node_that_was_killed_is_swept_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, NODE, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().decode().strip())
        try:
            machine.sweep(tmp_path)
            assert (folder / "o1").read_bytes() == b"an object"
        finally:
            holder.kill()
    assert folder.is_dir(), "who is killed cannot tidy up"
    with machine.store_folder(node_id(2), tmp_path):
        assert not folder.exists()


def test_a_living_node_keeps_its_folder_from_those_who_cannot_see_its_pid(tmp_path: Path) -> None:
    with machine.store_folder(NODE, tmp_path) as folder:
        elsewhere = tmp_path / f"shoal-{1 << 30}-{NODE}"  # as a container that shares the memory sees it
        folder.rename(elsewhere)
        machine.sweep(tmp_path)
        assert (elsewhere / "probe").is_file()
        shutil.rmtree(elsewhere)


def test_folders_that_are_no_nodes_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shoal-1-being-made").mkdir()
    (tmp_path / "shoal-x-y").mkdir()
    (tmp_path / "shoal-a-file").touch()
    machine.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_store_is_never_larger_than_what_its_folder_holds(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert machine.store_bytes(tmp_path, 1000) == 1000
    assert machine.store_bytes(tmp_path, 1 << 60) <= free + (1 << 30)
    assert 0 < machine.store_bytes(tmp_path, None) <= machine.memory_bytes()


def test_a_node_offers_what_it_was_told_and_else_what_there_is() -> None:
    offered = machine.offered(1.5, 2, 1000, 500, {"custom": 3, "none": 0})
    assert offered == {
        "CPU": 15_000,
        "GPU": 20_000,
        "memory": 1000 * UNIT,
        "object_store_memory": 500 * UNIT,
        "custom": 30_000,
    }
    offered = machine.offered(None, 0, None, 0, {})
    assert offered == {
        "CPU": len(os.sched_getaffinity(0)) * UNIT,
        "memory": machine.memory_bytes() * UNIT,
    }


def test_a_node_can_be_asked_for_by_the_names_of_what_it_is() -> None:
    assert machine.implicit("10.0.0.1", [], is_head=False) == {"node:10.0.0.1": 1.0}
    assert machine.implicit("10.0.0.1", ["A100", "H100"], is_head=True) == {
        "node:10.0.0.1": 1.0,
        "node:__internal_head__": 1.0,
        "accelerator_type:A100": 1.0,
        "accelerator_type:H100": 1.0,
    }


def test_the_address_is_that_of_the_way_to_the_broker() -> None:
    assert machine.address_towards("127.0.0.1", 4222) == "127.0.0.1"
    assert machine.address_towards("no-such-host.invalid", 4222) == "127.0.0.1"
