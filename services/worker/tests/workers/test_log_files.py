"""The files of what worker processes print: what is kept, what goes, and what is read of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import ActorId, JobId
from shoal_core.protocol.logs import MOST_LOGS, ListLogs, LogDescription, LogPiece, NodeLogs, ReadLog
from shoal_core.testing.builders import process_id
from shoal_worker.workers import log_files
from shoal_worker.workers.log_files import Limits, LogFiles, Stream, cut

WORKER = process_id(1)
JOB = JobId("00000001")
ACTOR = ActorId("a" * 32)
OUT = f"worker-{WORKER}-{JOB}-42.out"


def begun(folder: Path, part_bytes: int = 100, older_parts: int = 2, total_bytes: int = 10_000) -> LogFiles:
    """Return the files of a node, with one process of a job."""
    files = LogFiles(folder, Limits(part_bytes, older_parts, total_bytes))
    files.route(WORKER, 42, JOB, None)
    return files


def out(number: int = 1) -> Stream:
    return Stream(process_id(number), 42, "stdout")


def listed(files: LogFiles, pattern: str = "*", actor: str = "") -> list[LogDescription]:
    answer = files.answer(ListLogs(pattern=pattern, actor=actor))
    assert isinstance(answer, NodeLogs)
    return answer.logs


def piece(files: LogFiles, position: int, name: str = OUT, most_bytes: int = 1000) -> LogPiece:
    answer = files.answer(ReadLog(name=name, position=position, most_bytes=most_bytes))
    assert isinstance(answer, LogPiece)
    return answer


def whole(files: LogFiles, name: str = OUT, most_bytes: int = 1000) -> bytes:
    """Return all that is kept of a log, read piece by piece."""
    data, position = b"", 0
    while (read := piece(files, position, name, most_bytes)).data:
        assert read.position == max(position, read.first), "no byte is left out"
        data += read.data
        position = read.position + len(read.data)
    assert position == read.end or not data
    return data


def test_a_log_is_there_before_anything_is_printed_and_after_the_process_has_ended(tmp_path: Path) -> None:
    files = begun(tmp_path)
    assert [(log.name, log.size_bytes, log.has_ended) for log in listed(files)] == [
        (OUT, 0, False),
        (OUT.replace(".out", ".err"), 0, False),
    ]
    assert piece(files, 0) == LogPiece(position=0, first=0, end=0, has_ended=False, data=b"")
    files.append(out(), b"last words\n")
    files.end(WORKER)
    assert piece(files, 5) == LogPiece(position=5, first=0, end=11, has_ended=True, data=b"words\n")
    assert (tmp_path / OUT).read_bytes() == b"last words\n"


def test_a_full_part_is_renamed_and_the_oldest_goes(tmp_path: Path) -> None:
    files = begun(tmp_path, part_bytes=10, older_parts=2)
    for number in range(5):
        files.append(out(), b"line %d..\n" % number)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        OUT: b"line 4..\n",
        f"{OUT}.1": b"line 3..\n",
        f"{OUT}.2": b"line 2..\n",
    }
    assert whole(files) == b"line 2..\nline 3..\nline 4..\n"
    assert piece(files, 0).position == piece(files, 0).first == 18
    assert piece(files, 20, most_bytes=3).data == b"ne "


def test_without_older_parts_a_full_one_goes(tmp_path: Path) -> None:
    files = begun(tmp_path, part_bytes=10, older_parts=0)
    for number in range(3):
        files.append(out(), b"line %d..\n" % number)
    assert [path.name for path in tmp_path.iterdir()] == [OUT]
    assert whole(files) == b"line 2..\n"


def test_a_line_is_cut_only_where_it_is_longer_than_a_part() -> None:
    assert cut(b"ab\ncd\n", 6, is_empty=False) == 6
    assert cut(b"ab\ncd\n", 5, is_empty=False) == 3
    assert cut(b"ab\ncd\n", 2, is_empty=False) == 0
    assert cut(b"ab\ncd\n", 2, is_empty=True) == 2


@given(
    st.lists(st.binary(min_size=1, max_size=60).map(lambda line: line.replace(b"\n", b".") + b"\n"), max_size=30),
    st.integers(1, 50),
    st.integers(0, 3),
    st.integers(1, 40),
)
def test_what_is_kept_is_the_end_of_what_was_printed(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], part_bytes: int, older_parts: int, most_bytes: int
) -> None:
    files = begun(tmp_path_factory.mktemp("logs"), part_bytes, older_parts)
    for line in lines:
        files.append(out(), line)
    text = b"".join(lines)
    kept = whole(files, most_bytes=most_bytes)
    assert text.endswith(kept)
    assert len(kept) <= part_bytes * (older_parts + 1)
    assert kept or not text
    assert piece(files, 0).end == len(text)
    assert piece(files, 0).first == len(text) - len(kept)


def test_a_process_is_found_by_its_actor_and_by_patterns(tmp_path: Path) -> None:
    files = begun(tmp_path)
    files.append(out(), b"printed before\n")
    files.route(process_id(2), 43, JOB, None)
    files.route(WORKER, 42, JOB, ACTOR)
    assert [(log.name, log.actor_begin) for log in listed(files, actor=ACTOR, pattern="*.out")] == [(OUT, 15)]
    assert {log.process_id for log in listed(files, "*-43.*")} == {process_id(2)}
    assert listed(files, "*", "b" * 32) == []


def test_what_was_printed_before_the_job_is_known_is_called_by_it_then(tmp_path: Path) -> None:
    files = LogFiles(tmp_path, Limits(10, 2, 1000))
    for number in range(2):
        files.append(out(), b"line %d..\n" % number)
    assert [log.name for log in listed(files)] == [f"worker-{WORKER}-ffffffff-42.out"]
    files.route(WORKER, 42, JOB, None)
    assert whole(files) == b"line 0..\nline 1..\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [OUT, f"{OUT}.1"]


def test_what_goes_first_is_of_processes_that_have_ended(tmp_path: Path) -> None:
    files = LogFiles(tmp_path, Limits(100, 2, 250))
    for number in (1, 2, 3):
        files.append(out(number), b"x" * 79 + b"\n")
    for number in (2, 1):
        files.end(process_id(number))
    files.append(out(3), b"x" * 79 + b"\n")
    assert [log.process_id for log in listed(files)] == [process_id(2), process_id(3)]
    files.append(out(3), b"y" * 99 + b"\n")
    assert [(log.process_id, log.size_bytes) for log in listed(files)] == [(process_id(3), 180)]
    files.append(out(4), b"x" * 89 + b"\n")
    assert [(log.process_id, log.size_bytes) for log in listed(files)] == [(process_id(3), 100), (process_id(4), 90)]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 190


def test_so_many_logs_are_kept(tmp_path: Path) -> None:
    files = LogFiles(tmp_path, Limits(100, 2, 10_000))
    for number in range(MOST_LOGS):
        files.route(process_id(number), 42, JOB, None)
        files.end(process_id(number))
    assert [log.process_id for log in listed(files)][:: MOST_LOGS - 1] == [
        process_id(MOST_LOGS // 2),
        process_id(MOST_LOGS - 1),
    ]


def test_only_logs_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "lock").touch()
    files = begun(folder)
    for name in ("../secret", str(tmp_path / "secret"), "lock", ""):
        with pytest.raises(NotFoundError, match="keeps no log called"):
            files.answer(ReadLog(name=name, position=0))


def test_a_part_that_somebody_has_removed_is_an_error_and_the_others_are_read(tmp_path: Path) -> None:
    files = begun(tmp_path, part_bytes=10)
    for number in range(2):
        files.append(out(), b"line %d..\n" % number)
    (tmp_path / f"{OUT}.1").unlink()
    with pytest.raises(NotFoundError, match="cannot be read any more"):
        piece(files, 0)
    assert piece(files, 9).data == b"line 1..\n"


def test_a_disk_that_takes_nothing_is_told_of_once_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    files = begun(folder)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            files.append(out(), b"lost\n")
    assert [record.message for record in caplog.records if "cannot be kept" in record.message] == [
        caplog.records[0].message
    ]
    folder.mkdir()
    files.append(out(), b"kept\n")
    assert whole(files) == b"kept\n"


def test_it_is_known_from_where_to_where_an_attempt_has_printed(tmp_path: Path) -> None:
    files = begun(tmp_path)
    files.append(out(), b"nobody's\n")
    files.append(out(), b"one\ntwo\none\n", [(0, "a.0"), (4, "b.0"), (8, "a.0")])
    files.append(out(), b"more\n")
    files.append(out(2), b"another process\n", [(0, "c.0")])
    (log,) = spans_of(files, "a.0")
    assert (log.name, log.spans) == (OUT, [(9, 13), (17, 26)])
    assert spans_of(files, "b.0")[0].spans == [(13, 17)]
    assert spans_of(files, "c.0")[0].process_id == process_id(2)
    assert spans_of(files, "d.0") == []
    assert listed(files)[0].spans == []


def test_of_the_oldest_attempts_it_is_forgotten_where_they_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "MOST_BEGUN", 2)
    files = begun(tmp_path)
    for number in range(1, 4):
        files.append(out(number), b"line\n", [(0, f"{number}.0")])
    assert [len(spans_of(files, f"{number}.0")) for number in range(1, 4)] == [0, 1, 1]


def spans_of(files: LogFiles, attempt: str) -> list[LogDescription]:
    answer = files.answer(ListLogs(attempt=attempt))
    assert isinstance(answer, NodeLogs)
    return answer.logs
