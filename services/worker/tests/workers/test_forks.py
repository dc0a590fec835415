"""The template and what is forked from it, as real processes in a folder of their own."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from shoal_core.protocol.ids import ProcessId
from shoal_core.runtime.worker.process import WorkerConfig
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import until
from shoal_worker.inputs import ProcessEnded
from shoal_worker.workers.forks import Forks, forks
from shoal_worker.workers.templates import TEMPLATE

STUB = str(Path(__file__).with_name("stub_template.py"))


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_and_await(pid: int) -> None:
    """Kill a child, and return when it is dead but not reaped; the loop has no turn in between."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def pages(folder: Path) -> list[Path]:
    return list(folder.glob("begun-*"))


class Nursery:
    """A template at work, and what it told."""

    forks: Forks

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended: list[ProcessEnded] = []
        self.alive_when_told: list[ProcessId] = []
        self.pids: dict[ProcessId, int] = {}
        self.pipes: dict[tuple[ProcessId, str], int] = {}
        self._last = 0

    def take_end(self, ended: ProcessEnded) -> None:
        self.ended.append(ended)
        if is_alive(self.pids.get(ended.process_id, 1 << 30)):
            self.alive_when_told.append(ended.process_id)

    def take_output(self, process: ProcessId, pid: int, stream: str, descriptor: int) -> None:
        self.pids[process] = pid
        self.pipes[process, stream] = descriptor

    def start(self, what: str, credentials: dict[str, str] | None = None) -> ProcessId:
        self._last += 1
        process = process_id(self._last)
        config = WorkerConfig(
            process_id=process,
            node_id=node_id(1),
            cluster="test",
            address=what,
            credentials=credentials or {},
            shared_memory_path=str(self.folder),
            begun_page=str(self.folder / f"begun-{process}"),
            environments_path=str(self.folder),
        )
        self.forks.start(config)
        return process

    async def born(self, process: ProcessId) -> int:
        await until(lambda: process in self.pids)
        return self.pids[process]

    async def end_of(self, process: ProcessId) -> ProcessEnded:
        await until(lambda: any(ended.process_id == process for ended in self.ended))
        (ended,) = [ended for ended in self.ended if ended.process_id == process]
        return ended

    def read(self, process: ProcessId, stream: str) -> str:
        """Return all that a process printed; it must have ended."""
        with open(self.pipes.pop((process, stream)), "rb") as pipe:
            return pipe.read().decode()

    def close(self) -> None:
        for descriptor in self.pipes.values():
            os.close(descriptor)


@asynccontextmanager
async def nursery(folder: Path, command: tuple[str, ...] | None = None) -> AsyncIterator[Nursery]:
    one = Nursery(folder)
    try:
        async with forks(one.take_end, one.take_output, command or (sys.executable, STUB, str(folder))) as one.forks:
            yield one
    finally:
        one.close()


@contextlib.contextmanager
def descriptor_limit(soft: int) -> Iterator[None]:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


@contextlib.contextmanager
def descriptors_taken(up_to: int) -> Iterator[None]:
    """Have all descriptors below ``up_to`` in use, as far as the limit allows."""
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while not taken or taken[-1] < up_to:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)


async def test_a_worker_is_born_with_a_pipe_for_each_stream(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        process = one.start("print")
        ended = await one.end_of(process)
        assert ended.reason == f"worker process {one.pids[process]} exited with status 0"
        assert one.read(process, "stdout") == "to output\n"
        assert one.read(process, "stderr") == "to error\n"


async def test_a_worker_of_the_real_template_is_born_and_can_be_killed(tmp_path: Path) -> None:
    async with nursery(tmp_path, TEMPLATE) as one:
        process = one.start("nats://127.0.0.1:1")
        pid = await one.born(process)
        one.forks.kill(process)
        ended = await one.end_of(process)
        assert ended.reason == f"worker process {pid} was killed by signal 9 (SIGKILL)"
        assert not is_alive(pid)


async def test_the_reason_of_a_death_says_how_it_came(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        exits, fails = one.start("exit 3"), one.start("raise")
        assert (await one.end_of(exits)).reason.endswith("exited with status 3")
        assert (await one.end_of(fails)).reason.endswith("exited with status 1")
        assert "RuntimeError: this worker cannot go on" in one.read(fails, "stderr")


async def test_what_a_worker_had_begun_is_read_back_after_its_crash(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        begun, idle = one.start("begin 5 17"), one.start("exit 1")
        ended = await one.end_of(begun)
        assert (ended.begun_lease, ended.begun) == (5, 17)
        ended = await one.end_of(idle)
        assert (ended.begun_lease, ended.begun) == (0, 0)
        assert pages(tmp_path) == []


@contextlib.asynccontextmanager
async def started(one: Nursery, seconds: int) -> AsyncIterator[tuple[ProcessId, int, int, int]]:
    """Have a worker that ends after a while start three others: one, one that is deaf, and one of its own session."""
    process, told = one.start(f"start {seconds}"), one.folder / "started"
    await until(lambda: told.exists() and len(told.read_text().split()) == 3)
    sleeper, stubborn, apart = map(int, told.read_text().split())
    assert all(map(is_alive, (sleeper, stubborn, apart)))
    try:
        yield process, sleeper, stubborn, apart
    finally:
        os.kill(apart, signal.SIGKILL)


@pytest.mark.parametrize("killed", [True, False])
async def test_what_a_worker_has_started_ends_with_it(tmp_path: Path, killed: bool) -> None:
    async with nursery(tmp_path) as one, started(one, 3600 if killed else 0) as (process, sleeper, stubborn, apart):
        if killed:
            one.forks.kill(process)
        await one.end_of(process)
        await until(lambda: not is_alive(sleeper))
        await until(lambda: not is_alive(stubborn))
        assert is_alive(apart), "who wants to outlive it may"


async def test_what_workers_have_started_ends_with_the_node(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as entered:
        async with nursery(tmp_path) as one:
            _, sleeper, stubborn, apart = await entered.enter_async_context(started(one, 3600))
        assert not is_alive(sleeper)
        assert not is_alive(stubborn)
        assert is_alive(apart)


async def test_what_a_worker_has_left_ends_with_the_node(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as entered:
        async with nursery(tmp_path) as one:
            process, sleeper, stubborn, _ = await entered.enter_async_context(started(one, 0))
            await one.end_of(process)
            await until(lambda: not is_alive(sleeper))
            assert is_alive(stubborn), "it has a while to end"
        assert not is_alive(stubborn)


async def test_a_worker_that_is_killed_before_its_birth_dies_at_birth(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        process = one.start("sleep")
        one.forks.kill(process)
        assert process not in one.pids
        assert "SIGKILL" in (await one.end_of(process)).reason


async def test_all_workers_end_with_the_template_and_another_template_takes_over(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        first, second = one.start("sleep"), one.start("sleep")
        pids = [await one.born(first), await one.born(second)]
        (template,) = psutil.Process().children()
        template.kill()
        for process in (first, second):
            assert "template process ended" in (await one.end_of(process)).reason
        assert one.alive_when_told == [], "who is told to be dead is dead"
        assert not any(map(is_alive, pids))
        third = one.start("print")
        await one.end_of(third)
        assert one.read(third, "stdout") == "to output\n"
        assert len(one.ended) == 3


async def test_what_was_asked_of_a_template_that_is_dead_already_is_told_as_gone(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        await one.born(one.start("sleep"))
        (template,) = psutil.Process().children()
        kill_and_await(template.pid)
        process = one.start("sleep")
        assert "template process ended" in (await one.end_of(process)).reason
        assert pages(tmp_path) == []


async def test_a_template_that_never_comes_up_is_started_later_and_later(tmp_path: Path) -> None:
    program = tmp_path / "template.py"
    record = tmp_path / "starts"
    program.write_text(f"import time\nopen({str(record)!r}, 'a').write(str(time.monotonic()) + '\\n')\n")

    def starts() -> list[float]:
        return [float(line) for line in record.read_text().splitlines()] if record.exists() else []

    async with nursery(tmp_path, (sys.executable, str(program))) as one:
        process = one.start("sleep")
        assert "template process ended" in (await one.end_of(process)).reason
        await until(lambda: len(starts()) >= 4)
    gaps = [after - before for before, after in zip(starts(), starts()[1:], strict=False)]
    assert gaps[1] >= 0.1
    assert gaps[2] >= 0.2


async def test_closing_leaves_no_process_no_page_and_no_descriptor(tmp_path: Path) -> None:
    gc.collect()  # what tests before left for it, descriptors among it
    before = psutil.Process().num_fds()
    async with nursery(tmp_path) as one:
        pids = [await one.born(one.start("sleep")) for _ in range(3)]
        unborn = one.start("sleep")
        pids += [child.pid for child in psutil.Process().children()]
        assert all(map(is_alive, pids))
    assert not any(map(is_alive, pids))
    assert psutil.Process().children() == []
    assert pages(tmp_path) == []
    assert unborn not in [ended.process_id for ended in one.ended]
    assert psutil.Process().num_fds() == before


async def test_many_long_orders_in_one_turn_arrive_whole_and_in_order(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        processes = [one.start("exit 0", {"token": "x" * 30_000}) for _ in range(30)]
        for process in processes:
            await one.end_of(process)
        assert list(one.pids) == processes
        assert all(ended.reason.endswith("exited with status 0") for ended in one.ended)


async def test_a_worker_whose_page_cannot_be_made_is_told_as_gone(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        await one.born(one.start("sleep"))
        one.folder = tmp_path / "full"
        process = one.start("sleep")
        assert one.ended == [], "not while the node still acts on the decision that started it"
        assert "could not be made" in (await one.end_of(process)).reason
        assert process not in one.pids


async def test_a_fork_that_fails_costs_only_the_worker_that_was_asked_for(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        sleeper = await one.born(one.start("sleep"))
        (template,) = psutil.Process().children()
        descriptors = template.num_fds()  # perhaps with the four of a birth that it has just told of
        (tmp_path / "no-forks").touch()
        for process in [one.start("sleep") for _ in range(5)]:
            assert "no more processes" in (await one.end_of(process)).reason
        await until(lambda: template.num_fds() <= descriptors)
        (tmp_path / "no-forks").unlink()
        await one.born(one.start("sleep"))
        assert is_alive(sleeper)
        assert len(one.ended) == 5


async def test_a_worker_inherits_nothing_but_its_three_streams_however_many_files_its_node_has(tmp_path: Path) -> None:
    with descriptor_limit(4000), descriptors_taken(1100):
        async with nursery(tmp_path) as one:
            processes = [one.start("descriptors"), one.start("descriptors")]
            for process in processes:
                await one.end_of(process)
                assert one.read(process, "stdout") == "[0, 1, 2]\n"


async def test_a_worker_whose_output_is_broken_ends_and_does_not_become_a_template(tmp_path: Path) -> None:
    async with nursery(tmp_path) as one:
        process = one.start("break-output")
        assert (await one.end_of(process)).reason.endswith("exited with status 0")
        assert one.read(process, "stderr") == ""


async def test_a_node_without_descriptors_loses_output_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with nursery(tmp_path) as one:
        first = one.start("print")
        await one.end_of(first)
        second = one.start("exit 4")
        with descriptor_limit(100), descriptors_taken(200):
            assert (await one.end_of(second)).reason.endswith("exited with status 4")
        assert second not in one.pids
        assert "is lost" in caplog.text
        third = one.start("print")
        await one.end_of(third)
        assert one.read(third, "stdout") == "to output\n"
