"""What worker processes print: from pipes to the log's subject, in whole lines."""

from __future__ import annotations

import asyncio
import fcntl
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest

from shoal_core.bus.interface import Message
from shoal_core.protocol.ids import ActorId, JobId
from shoal_core.protocol.logs import ListLogs, LogPiece, NodeLogs, ReadLog
from shoal_core.protocol.messages import LogLines
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode
from shoal_core.runtime.worker.output import MARK
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import CLUSTER, bus_harness, until
from shoal_worker.workers.log_files import Limits, LogFiles
from shoal_worker.workers.logs import Logs
from shoal_worker.workers.output import MOST_LINE_BYTES, READ_BYTES, Outputs

NODE = node_id(1)
WORKER, OTHER = process_id(1), process_id(2)
JOB = JobId("00000001")


class Press:
    """Outputs at work, the pipes into them, and what a driver heard."""

    def __init__(self, outputs: Outputs, logs: Logs) -> None:
        self.outputs = outputs
        self.logs = logs
        self.heard: list[LogLines] = []
        self.writers: list[int] = []
        self.readers: list[int] = []

    def hear(self, message: Message) -> None:
        self.heard.append(decode(LogLines, message.data))

    def pipe(self, process: str = WORKER, stream: str = "stdout") -> int:
        reader, writer = os.pipe()
        self.readers.append(reader)
        self.writers.append(writer)
        self.outputs.add(type(WORKER)(process), 42, stream, reader)
        return writer

    def close(self, writer: int) -> None:
        self.writers.remove(writer)
        os.close(writer)

    async def kept(self, name: str) -> bytes:
        """Return what is kept under a name."""
        piece = await self.logs.answer(ReadLog(name=name, position=0))
        assert isinstance(piece, LogPiece), piece
        return piece.data

    @property
    def lines(self) -> list[str]:
        return [line for message in self.heard for line in message.lines]


@asynccontextmanager
async def press() -> AsyncIterator[Press]:
    subjects = Subjects(CLUSTER)
    async with AsyncExitStack() as stack:
        harness = await stack.enter_async_context(bus_harness("memory"))
        node = await harness.join(Role.NODE, NODE)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        logs = stack.enter_context(closing(Logs(LogFiles(Path(folder), Limits(10_000_000, 1, 100_000_000)))))
        one = Press(Outputs(node, subjects, NODE, logs), logs)
        driver = await harness.join(Role.PROCESS, process_id(9))
        driver.subscribe(subjects.log("*", JOB), one.hear)
        try:
            yield one
        finally:
            one.outputs.close()
            for writer in list(one.writers):
                one.close(writer)


async def turns() -> None:
    """Let the loop do all that is due now."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_lines_are_published_once_they_are_whole() -> None:
    async with press() as one:
        one.outputs.route(WORKER, JOB)
        writer = one.pipe()
        os.write(writer, b"one\ntw")
        await until(lambda: bool(one.heard))
        assert one.lines == ["one"]
        os.write(writer, b"o\n\nthree\n")
        await until(lambda: len(one.lines) > 1)
        assert one.lines == ["one", "two", "", "three"]
        assert {(m.node_id, m.job_id, m.process_id, m.pid, m.stream) for m in one.heard} == {
            (NODE, JOB, WORKER, 42, "stdout")
        }


async def test_the_rest_of_a_line_is_published_at_the_end_of_the_pipe() -> None:
    async with press() as one:
        one.outputs.route(WORKER, JOB)
        writer = one.pipe(stream="stderr")
        os.write(writer, b"whole\nnot whole")
        one.close(writer)
        await until(lambda: len(one.lines) == 2)
        assert one.lines == ["whole", "not whole"]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(one.readers[0])


async def test_a_line_that_is_too_long_is_cut_and_nothing_of_it_is_lost() -> None:
    async with press() as one:
        one.outputs.route(WORKER, JOB)
        writer = one.pipe()
        text = b"x" * (2 * MOST_LINE_BYTES + 10)
        os.set_blocking(writer, False)
        rest = memoryview(text + b"\nnext\n")
        while rest:
            try:
                rest = rest[os.write(writer, rest) :]
            except BlockingIOError:
                await asyncio.sleep(0)
        await until(lambda: bool(one.lines) and one.lines[-1] == "next")
        assert "".join(one.lines[:-1]).encode() == text
        assert len(one.lines) > 2


async def test_bytes_that_are_no_text_are_replaced() -> None:
    async with press() as one:
        one.outputs.route(WORKER, JOB)
        os.write(one.pipe(), "ä\u2028b\rc".encode() + b"\xff\n")
        await until(lambda: bool(one.heard))
        assert one.lines == ["ä\u2028b\rc\ufffd"]


async def test_all_that_a_dead_process_printed_is_published_even_where_its_children_hold_the_pipe() -> None:
    async with press() as one:
        one.outputs.route(WORKER, JOB)
        out, error = one.pipe(), one.pipe(stream="stderr")
        fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 4 * READ_BYTES)
        count = 3 * READ_BYTES // 100
        os.write(out, b"".join(b"%099d\n" % number for number in range(count)) + b"last words")
        os.write(error, b"an error")
        one.outputs.forget(WORKER)
        await turns()
        assert [line for m in one.heard if m.stream == "stdout" for line in m.lines] == [
            *(f"{number:099d}" for number in range(count)),
            "last words",
        ]
        assert [line for m in one.heard if m.stream == "stderr" for line in m.lines] == ["an error"]
        await one.logs.answer(ListLogs())  # else a file that is written now may have the number of a pipe
        for reader in one.readers:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(reader)


async def test_forgetting_a_process_leaves_the_pipes_of_others_alone() -> None:
    async with press() as one:
        one.outputs.route(OTHER, JOB)
        one.pipe()
        writer = one.pipe(OTHER)
        one.outputs.forget(WORKER)
        os.write(writer, b"still here\n")
        await until(lambda: bool(one.heard))
        assert one.lines == ["still here"]


async def test_what_a_process_of_no_job_prints_is_read_and_told_to_nobody() -> None:
    async with press() as one:
        writer = one.pipe()
        os.set_blocking(writer, False)
        written = 0
        while written < 4 * READ_BYTES:
            try:
                written += os.write(writer, b"before any job\n")
            except BlockingIOError:
                await asyncio.sleep(0)
        await turns()
        one.outputs.route(WORKER, JOB)
        os.write(writer, b"of a job\n")
        await until(lambda: bool(one.heard))
        assert one.lines[-1] == "of a job"
        assert len(one.lines) < 10, "the pipe was emptied all along"


async def test_what_is_published_is_kept_without_the_names_of_what_has_printed_it() -> None:
    async with press() as one:
        one.outputs.route(WORKER, JOB)
        out, error = one.pipe(), one.pipe(stream="stderr")
        os.write(out, f"{MARK}f\x1ea.0\none\n{MARK}g\x1eb.0\ntwo{MARK}h\x1ec.0\n\xff three\nnot wh".encode())
        os.write(error, b"\xff oh no\n")
        await until(lambda: len(one.lines) > 3)
        assert await one.kept(f"worker-{WORKER}-{JOB}-42.out") == "one\ntwo\n\xff three\n".encode()
        one.outputs.forget(WORKER)
        assert await one.kept(f"worker-{WORKER}-{JOB}-42.out") == "one\ntwo\n\xff three\nnot wh\n".encode()
        assert await one.kept(f"worker-{WORKER}-{JOB}-42.err") == b"\xff oh no\n", "bytes are kept as they are"


async def test_the_pipes_of_a_process_may_come_after_its_job() -> None:
    async with press() as one:
        one.outputs.route(WORKER, JOB, ActorId("a" * 32))
        os.write(one.pipe(), b"of the job\n")
        await until(lambda: bool(one.heard))
        assert await one.kept(f"worker-{WORKER}-{JOB}-42.out") == b"of the job\n"
        listed = await one.logs.answer(ListLogs(actor="a" * 32))
        assert isinstance(listed, NodeLogs)
        assert len(listed.logs) == 2


async def test_a_log_is_called_by_the_job_and_known_by_the_actor_that_its_process_was_given_to() -> None:
    async with press() as one:
        os.write(one.pipe(), b"before any job\n")
        await turns()
        one.outputs.route(WORKER, JOB)
        one.outputs.route(WORKER, JOB, ActorId("a" * 32))
        assert await one.kept(f"worker-{WORKER}-{JOB}-42.out") == b"before any job\n"
        assert await one.kept(f"worker-{WORKER}-{JOB}-42.err") == b""
        listed = await one.logs.answer(ListLogs(actor="a" * 32))
        assert isinstance(listed, NodeLogs)
        assert [(log.name[-3:], log.process_id, log.has_ended) for log in listed.logs] == [
            ("out", WORKER, False),
            ("err", WORKER, False),
        ]
