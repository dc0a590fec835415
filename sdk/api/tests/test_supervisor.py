"""A supervisor with a real program and a control store of a dictionary, which may be away."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.jobs import supervisor
from shoal.jobs.log import Piece, whole
from shoal.jobs.supervisor import LOGS, STOPS, Supervisor
from shoal_core.bus import Credentials
from shoal_core.protocol.errors import InvalidRequestError, NoRespondersError
from shoal_core.protocol.ids import JobId, ProcessId
from shoal_core.protocol.messages import (
    Done,
    FinishJob,
    GetJob,
    JobConfig,
    JobRecord,
    JobState,
    KvAdded,
    KvGet,
    KvPut,
    KvValue,
    Message,
)
from shoal_core.protocol.subjects import Subjects
from tests.integration.waiting import until

JOB = JobId("00000001")


class Control:
    """What a supervisor sees of its process and of the control store: it asks for its job, keys, and the end."""

    def __init__(self) -> None:
        self.job = JOB
        self.address = "nats://x"
        self.subjects = Subjects("c")
        self.credentials = Credentials(token="secret")
        self.tls = None
        self.environment: dict[str, Any] = {}
        self.bus = self
        self.entrypoint = "true"
        self.keys: dict[tuple[str, str], bytes] = {}
        self.end: FinishJob | None = None
        self.error: Exception | None = None
        self.hear: Callable[[Any], None] | None = None

    def subscribe(self, subject: str, callback: Callable[[Any], None]) -> None:
        assert subject == self.subjects.job_stop("*", JOB)
        self.hear = callback

    def call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run(coroutine)

    def ask_gcs(self, verb: str, message: Message) -> Message:
        if isinstance(message, GetJob):
            return self.record()
        if self.error is not None:
            raise self.error
        match message:
            case KvPut():
                self.keys[message.namespace, message.key] = message.value
                return KvAdded(added=True)
            case KvGet():
                return KvValue(value=self.keys.get((message.namespace, message.key)))
            case FinishJob():
                self.end = message
                return Done()
        raise AssertionError(message)

    def record(self) -> JobRecord:
        return JobRecord(
            job_id=JOB,
            driver=ProcessId("supervisor"),
            submission_id="train",
            hostname="here",
            machine_id="m",
            pid=0,
            entrypoint=self.entrypoint,
            config=JobConfig(namespace="n"),
            state=JobState.RUNNING,
            started_at=0.0,
        )

    def begin(self, entrypoint: str) -> Supervisor:
        """Have a supervisor run this."""
        self.entrypoint = entrypoint
        return Supervisor()

    def ended(self) -> FinishJob:
        """Wait until the end of the job is recorded."""
        until(lambda: self.end is not None, "the end of the job")
        assert self.end is not None
        return self.end

    def log(self) -> bytes:
        """Return what is stored of the log."""
        return whole(Piece.decode(value) for (space, _), value in list(self.keys.items()) if space == LOGS)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Control]:
    control = Control()
    monkeypatch.setattr(supervisor, "runtime", lambda: control)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield control
    assert not list(tmp_path.glob("shoal-job-*")), "what the program was given is removed"


def test_it_stores_what_its_program_prints_and_records_how_it_ended(control: Control) -> None:
    control.begin('echo "$SHOAL_ADDRESS $SHOAL_CLUSTER"; cat "$SHOAL_CREDENTIALS"; exit 4')
    end = control.ended()
    assert (end.job_id, end.state, end.exit_code) == (JOB, JobState.FAILED, 4)
    assert control.log() == b'nats://x c\n{"token": "secret"}'


def test_it_stops_when_it_is_told_to(control: Control) -> None:
    control.begin("echo begun; exec sleep 1000")
    until(lambda: control.log() == b"begun\n", "the log")
    assert control.hear is not None
    control.hear(None)
    assert control.ended().state is JobState.STOPPED


def test_it_finds_the_note_of_a_stop_that_it_did_not_hear_of(control: Control) -> None:
    control.keys[STOPS, JOB] = b"stop"
    control.begin("exec sleep 1000")
    assert control.ended().state is JobState.STOPPED


def test_a_control_store_that_is_away_is_waited_for(control: Control, tmp_path: Path) -> None:
    control.error = NoRespondersError("nobody is there")
    control.begin(f"echo begun; until test -e {tmp_path}/go; do sleep 0.02; done; echo over")
    (tmp_path / "go").touch()
    until(lambda: not list(tmp_path.glob("shoal-job-*")), "the end of the program")
    assert control.log() == b""
    control.error = None
    assert control.ended().state is JobState.SUCCEEDED
    assert control.log() == b"begun\nover\n"


def test_where_it_fails_itself_its_process_ends(
    control: Control, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    control.error = InvalidRequestError("no such thing")
    failed = control.begin("exec sleep 1000")
    until(lambda: exits == [1], "the end of the process")
    assert "InvalidRequestError: no such thing" in capfd.readouterr().err
    failed._program.end()  # which the end of the process would have the guard do
