"""The supervisor of a submitted job: the actor that runs its program, keeps its log and records how it ended.

Nobody calls it. It learns from its job's record what to run, looks for a note that it is to stop, and ends the job,
and so itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal.jobs.entrypoint import Entrypoint
from shoal.jobs.log import Written
from shoal.jobs.submitted import SUBMISSION_ID, VARIABLE, Submitted
from shoal.session import runtime
from shoal_core.bus.interface import Message
from shoal_core.protocol.errors import BusError, ServiceError
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.messages import (
    FinishJob,
    GetJob,
    JobRecord,
    JobState,
    KvGet,
    KvPut,
    KvValue,
)
from shoal_core.runtime.environments import parts_of
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.worker.execution import THREADS

LOGS, STOPS = "shoal.submissions.log", "shoal.submissions.stop"
"""Where in the internal key-value store logs lie, under ``<job>/<slot>``, and the notes of what is to stop, by job."""
LOOK_SECONDS = 0.1
STORE_SECONDS = 0.3
NOTE_SECONDS = 5.0
"""How often it looks whether the program has ended, stores what was printed, and looks for a note that it missed."""
MOST_STORED = 16
"""So many pieces of the log are stored at a time: a program that prints without end is not to fill the broker."""
NOT_ITS = frozenset({THREADS, "SHOAL_TOKEN", "SHOAL_CREDENTIALS", "SHOAL_CA_FILE"})
"""Variables that a supervisor's process has for itself, or from its node."""
UNREACHED = (BusError, ServiceError)


class Supervisor:
    """Runs the program of its job from the moment it is made."""

    def __init__(self) -> None:
        self._runtime = runtime()
        job = self._runtime.ask_gcs("get_job", GetJob(job_id=self._runtime.job))
        assert isinstance(job, JobRecord)
        self._log = Written()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._runtime.call(self._listen(job.job_id))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which worker processes ignore, and programs inherit
        folder = Path(tempfile.mkdtemp(prefix="shoal-job-"))
        self._program = Entrypoint(job.entrypoint, _environment(self._runtime, job, folder), folder, self._printed)
        threading.Thread(target=self._supervise, name="shoal-supervisor", daemon=True).start()

    async def _listen(self, job: JobId) -> None:
        def hear(_message: Message) -> None:
            self._stop.set()

        self._runtime.bus.subscribe(self._runtime.subjects.job_stop("*", job), hear)

    def _printed(self, data: bytes) -> None:
        with self._lock:
            self._log.append(data)

    def _supervise(self) -> None:
        """See the program to its end, and record that; where this fails, the process ends, which is recorded too."""
        try:
            self._record(self._run())
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _run(self) -> FinishJob:
        """Return how the job has ended, when its program has ended or was stopped, and its log is stored."""
        store_at = note_at = 0.0
        while not self._program.has_ended() and not self._stop.is_set():
            if time.monotonic() >= store_at:
                self._store_log()
                store_at = time.monotonic() + STORE_SECONDS
            if time.monotonic() >= note_at:
                self._look_for_note()
                note_at = time.monotonic() + NOTE_SECONDS
            self._stop.wait(LOOK_SECONDS)
        was_stopped = not self._program.has_ended()
        status = self._program.end()
        while not self._store_log():
            time.sleep(STORE_SECONDS)
        state, message = verdict(status, was_stopped=was_stopped)
        return FinishJob(job_id=self._runtime.job, state=state, message=message, exit_code=status)

    def _record(self, end: FinishJob) -> None:
        while True:
            with contextlib.suppress(*UNREACHED):
                self._runtime.ask_gcs("finish_job", end)
                return
            time.sleep(STORE_SECONDS)

    def _store_log(self) -> bool:
        """Store what has changed of the log, some of it at a time; tell whether that was all."""
        for _ in range(MOST_STORED):
            with self._lock:
                piece = self._log.due()
            if piece is None:
                return True
            key = f"{self._runtime.job}/{piece.slot}"
            try:
                self._runtime.ask_gcs("kv_put", KvPut(namespace=LOGS, key=key, value=piece.encode()))
            except UNREACHED:
                with self._lock:
                    self._log.failed(piece)
                break
        return False

    def _look_for_note(self) -> None:
        with contextlib.suppress(*UNREACHED):
            note = self._runtime.ask_gcs("kv_get", KvGet(namespace=STOPS, key=self._runtime.job))
            if isinstance(note, KvValue) and note.value is not None:
                self._stop.set()


def verdict(status: int, *, was_stopped: bool) -> tuple[JobState, str]:
    """Return how a job has ended whose program ended with a status (negative: by this signal), and what to say."""
    if was_stopped:
        return JobState.STOPPED, "The job was stopped."
    if status == 0:
        return JobState.SUCCEEDED, "The job has finished successfully."
    if status < 0:
        return JobState.FAILED, f"The entrypoint was killed by signal {-status} ({signal.strsignal(-status)})."
    return JobState.FAILED, f"The entrypoint failed with exit code {status}."


def _environment(current: Runtime, job: JobRecord, folder: Path) -> dict[str, str]:
    """Return the environment of the program, and write what it names into a folder that only this user may enter."""
    mine = {"SHOAL_ADDRESS": current.address, "SHOAL_CLUSTER": current.subjects.cluster}
    if current.credentials is not None:
        mine["SHOAL_CREDENTIALS"] = str(folder / "credentials.json")
        current.credentials.to_file(mine["SHOAL_CREDENTIALS"])
    if current.tls is not None and current.tls.ca_file is not None:
        mine["SHOAL_CA_FILE"] = current.tls.ca_file
    metadata = {**job.config.metadata, SUBMISSION_ID: job.submission_id}
    mine[VARIABLE] = str(folder / "submission.json")
    Submitted(current.address, job.job_id, metadata, current.environment).to_file(folder / "submission.json")
    packages = set(parts_of(current.environment))
    unpacked = [path for path in sys.path if Path(path).name in packages]
    return variables(os.environ, mine, unpacked, current.environment.get("env_vars", {}))


def variables(
    process: Mapping[str, str], mine: Mapping[str, str], packages: Sequence[str], own: Mapping[str, str]
) -> dict[str, str]:
    """Return a program's variables: those of the supervisor's process, but what is said of that process alone.

    ``python`` is the node's interpreter, and finds ``packages``; ``own`` are the job's.
    """
    kept = {name: value for name, value in process.items() if name in own or name not in NOT_ITS}
    path = os.pathsep.join([*packages, *filter(None, [kept.get("PYTHONPATH")])])
    found = os.pathsep.join([str(Path(sys.executable).parent), *filter(None, [kept.get("PATH")])])
    return {"PYTHONUNBUFFERED": "1", **kept, **mine, "PATH": found, **({"PYTHONPATH": path} if path else {})}
