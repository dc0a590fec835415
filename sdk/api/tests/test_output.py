"""How the driver shows what workers print."""

from __future__ import annotations

import io
import sys

import pytest

from shoal.output import WorkerOutput
from shoal.repeats import RepeatRules
from shoal_core.protocol.ids import JobId, NodeId, ProcessId
from shoal_core.protocol.messages import LogLines
from shoal_core.testing.buses import until


def lines(*texts: str, stream: str = "stdout", name: str = "train") -> LogLines:
    return LogLines(
        node_id=NodeId("0123456789abcdef"),
        job_id=JobId("00000001"),
        process_id=ProcessId("0123456789abcdef00000001"),
        pid=77,
        stream=stream,
        name=name,
        lines=list(texts),
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_line_says_who_printed_it_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    WorkerOutput().show(lines("one", "", "two (pid=1)"))
    assert capsys.readouterr() == (
        "(train pid=77 node=01234567) one\n(train pid=77 node=01234567) \n(train pid=77 node=01234567) two (pid=1)\n",
        "",
    )


def test_a_process_without_a_name_is_told_by_its_pid(capsys: pytest.CaptureFixture[str]) -> None:
    WorkerOutput().show(lines("one", name=""))
    assert capsys.readouterr().out == "(pid=77 node=01234567) one\n"


async def test_what_several_print_alike_is_counted_and_shown_though_nothing_else_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    output = WorkerOutput(RepeatRules(0.01))
    for process in ("1", "2", "3"):
        output.show(lines("ready").model_copy(update={"process_id": ProcessId(process)}))
    assert shown.getvalue() == "(train pid=77 node=01234567) ready\n"
    await until(lambda: "(train pid=77 node=01234567) ready [repeated 2x across cluster]" in shown.getvalue())


async def test_what_was_not_shown_yet_is_shown_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    output = WorkerOutput(RepeatRules())
    for process in ("1", "2"):
        output.show(lines("ready").model_copy(update={"process_id": ProcessId(process)}))
    output.close()
    assert capsys.readouterr().out == "(train pid=77 node=01234567) ready\n" * 2


def test_errors_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    WorkerOutput().show(lines("oh", stream="stderr"))
    assert capsys.readouterr() == ("", "(train pid=77 node=01234567) oh\n")


def test_only_the_prefix_is_coloured_and_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    WorkerOutput().show(lines("one"))
    assert terminal.getvalue() == "\033[36m(train pid=77 node=01234567)\033[0m one\n"
