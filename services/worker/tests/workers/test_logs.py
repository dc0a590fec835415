"""The logs of a node as its event loop sees them: a thread writes, the loop goes on, and who asks is answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from shoal_core.protocol.effects import Reply, Request, Start
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.logs import ListLogs, LogPiece, NodeLogs, ReadLog
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, node_record, process_id
from shoal_core.testing.buses import until
from shoal_worker.inputs import FetchLogs, LogsFetched
from shoal_worker.node import NodeCore
from shoal_worker.workers import logs as logs_module
from shoal_worker.workers.log_files import Begun, Limits, LogFiles, Stream
from shoal_worker.workers.logs import LOST, Logs

WORKER = process_id(1)
OUT = Stream(WORKER, 42, "stdout")
JOB = JobId("00000001")
NAME = f"worker-{WORKER}-{JOB}-42.out"


class SlowDisk(LogFiles):
    """Files that are written only when they may be."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Limits(1_000_000, 1, 10_000_000))
        self.writes, self.may_write = threading.Event(), threading.Event()
        self.may_write.set()

    def append(self, stream: Stream, text: bytes, begun: Sequence[Begun] = ()) -> None:
        self.writes.set()
        assert self.may_write.wait(30)
        super().append(stream, text, begun)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    disk = SlowDisk(tmp_path)
    yield disk
    disk.may_write.set()


async def read(logs: Logs) -> bytes:
    piece = await logs.answer(ReadLog(name=NAME, position=0))
    assert isinstance(piece, LogPiece), piece
    return piece.data


async def spans(logs: Logs, attempt: str) -> list[tuple[int, int]]:
    listed = await logs.answer(ListLogs(attempt=attempt))
    assert isinstance(listed, NodeLogs)
    return [span for log in listed.logs for span in log.spans]


async def test_what_was_printed_before_is_read_however_little_time_has_passed(disk: SlowDisk) -> None:
    with closing(Logs(disk)) as logs:
        logs.route(WORKER, 42, JOB, None)
        for number in range(3):
            logs.append(OUT, b"line %d\n" % number)
            assert await read(logs) == b"".join(b"line %d\n" % before for before in range(number + 1))


async def test_it_is_written_after_a_moment_though_nobody_asks(
    disk: SlowDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "WRITE_SECONDS", 0.001)
    with closing(Logs(disk)) as logs:
        logs.route(WORKER, 42, JOB, None)
        logs.append(OUT, b"last words\n")
        await until(lambda: (tmp_path / NAME).exists() and (tmp_path / NAME).read_bytes() == b"last words\n")


async def test_what_is_left_is_written_at_the_end(disk: SlowDisk, tmp_path: Path) -> None:
    with closing(Logs(disk)) as logs:
        logs.append(OUT, b"last words\n")
        logs.route(WORKER, 42, JOB, None)
        logs.append(OUT, b"more\n")
    assert (tmp_path / NAME).read_bytes() == b"last words\nmore\n"


async def test_a_slow_disk_holds_up_nobody_and_what_it_cannot_take_is_missed(
    disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(logs_module, "MOST_GATHERED_BYTES", 20)
    with closing(Logs(disk)) as logs:
        logs.route(WORKER, 42, JOB, None)
        disk.may_write.clear()
        logs.append(OUT, b"on its way\n")
        await until(disk.writes.is_set)
        for number in range(100):
            logs.append(OUT, b"line %d\n" % number, [(0, str(number))])
            await asyncio.sleep(0)
        disk.may_write.set()
        assert await read(logs) == b"on its way\nline 0\nline 1\n" + LOST
        logs.append(OUT, b"after that\n")
        assert (await read(logs)).endswith(LOST + b"after that\n")
        assert await spans(logs, "1") == [(18, 25)]
        assert await spans(logs, "2") == [], "it is not known whose it is that follows what was lost"


async def test_a_log_that_is_not_kept_is_an_error_for_who_asks_alone(disk: SlowDisk) -> None:
    with closing(Logs(disk)) as logs:
        assert isinstance(await logs.answer(ReadLog(name="nope", position=0)), NotFoundError)
        assert await logs.answer(ListLogs()) == NodeLogs(logs=[])


def test_a_node_has_logs_fetched_and_answers_with_them() -> None:
    core = NodeCore(node_record(node_id(1)).description, Subjects("test"))
    request = ReadLog(name=NAME, position=0)
    assert Start(FetchLogs(7, request)) in core.handle(Request(request, 7), 1.0)
    for answer in (NodeLogs(logs=[]), NotFoundError("it is gone")):
        assert Reply(7, answer) in core.handle(LogsFetched(7, answer), 2.0)
