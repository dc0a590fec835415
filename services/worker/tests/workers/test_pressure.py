"""What a node does before its memory runs out."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from shoal_core.protocol.ids import ProcessId
from shoal_core.testing.builders import process_id
from shoal_worker.workers.memory_meter import held_bytes, read_memory, watched
from shoal_worker.workers.pressure import Memory, MemoryShort, choose, why_killed

GIB = 2**30
ONE, TWO, THREE, ACTOR = (process_id(number) for number in range(1, 5))


def short(**held: float) -> MemoryShort:
    names = {"one": ONE, "two": TWO, "three": THREE, "actor": ACTOR}
    return MemoryShort(Memory(97 * GIB, 100 * GIB), 0.95, {names[name]: int(size * GIB) for name, size in held.items()})


def test_the_task_that_holds_most_goes() -> None:
    assert choose(short(one=3, two=30, three=5, actor=50), [ONE, TWO, THREE], [ACTOR]) == TWO


def test_an_actor_goes_only_where_no_task_holds_much() -> None:
    assert choose(short(one=1.9, actor=2), [ONE], [ACTOR]) == ACTOR
    assert choose(short(one=2, actor=50), [ONE], [ACTOR]) == ONE


@pytest.mark.parametrize("held", [{}, {"one": 1.9, "actor": 0.1}])
def test_nobody_goes_whose_end_would_not_help(held: dict[str, float]) -> None:
    assert choose(short(**held), [ONE, TWO], [ACTOR]) is None
    assert choose(short(**held), [], []) is None


def test_it_is_said_why_and_what_to_do() -> None:
    assert why_killed(short(one=30), ONE) == (
        "it was killed, since its node's memory ran out: 97.0 of 100.0 GiB were used, more than 95%, and this process "
        "held most, 30.0 GiB; have fewer of these run at once (memory=, num_cpus=), or each hold less"
    )


def machine(folder: Path, **cgroup: str) -> tuple[Path, Path]:
    """Write the files of a machine with 1000 KiB, of which 250 are free, and those of a container's memory on it."""
    (folder / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 250 kB\nHugePages_Total: 0\n")
    for name, text in cgroup.items():
        (folder / f"memory.{name}").write_text(text)
    return folder, folder


def test_what_could_be_had_at_once_is_not_used(tmp_path: Path) -> None:
    assert read_memory(*machine(tmp_path)) == Memory(750 * 1024, 1000 * 1024)


def test_a_container_with_less_memory_is_what_counts(tmp_path: Path) -> None:
    where = machine(tmp_path, max="500000\n", current="400000\n", stat="anon 1\ninactive_file 100000\n")
    assert read_memory(*where) == Memory(300_000, 500_000)


def test_a_container_of_the_first_version_of_cgroups_is_known_too(tmp_path: Path) -> None:
    where = machine(tmp_path)
    files = {
        "limit_in_bytes": "500000\n",
        "usage_in_bytes": "400000\n",
        "stat": "cache 1\ntotal_inactive_file 100000\n",
    }
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    assert read_memory(*where) == Memory(300_000, 500_000)


@pytest.mark.parametrize("limit", ["max\n", "5000000\n"])
def test_a_container_that_may_have_all_does_not(limit: str, tmp_path: Path) -> None:
    where = machine(tmp_path, max=limit, current="400000\n", stat="inactive_file 0\n")
    assert read_memory(*where) == Memory(750 * 1024, 1000 * 1024)


def test_what_this_machine_and_this_process_use_is_read() -> None:
    memory = read_memory()
    assert 0 < memory.used_bytes < memory.total_bytes
    assert 2**20 < held_bytes(os.getpid()) < memory.total_bytes
    assert held_bytes(2**22 + 1) == 0


@pytest.mark.parametrize("threshold", [1e-9, 1.0])
async def test_the_core_is_told_while_too_much_is_used(threshold: float) -> None:
    told: asyncio.Queue[MemoryShort] = asyncio.Queue()
    async with watched(threshold, lambda: {ProcessId("mine"): os.getpid()}, told.put_nowait):
        if threshold < 1:
            assert (await told.get()).held[ProcessId("mine")] > 2**20
        await asyncio.sleep(0)
    assert threshold < 1 or told.empty()
