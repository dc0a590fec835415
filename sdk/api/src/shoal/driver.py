"""A driver: the process that opens a job, and for whom worker processes run.

It looks for a node on its own machine, whose shared memory it then uses and which watches its pid, gives a sign of life
every second, prints what its workers print, and ends its job when it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.environments import Packed, pack
from shoal.job_config import job_config_of
from shoal.jobs.submitted import Submitted
from shoal.logging_config import log_settings_of
from shoal.output import WorkerOutput
from shoal.repeats import RepeatRules, repeat_rules_of
from shoal_core import __version__
from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.requests import ask
from shoal_core.machine import machine_id
from shoal_core.protocol.errors import BusError, RequestRefusedError
from shoal_core.protocol.ids import NO_NODE, ProcessId, new_process_id
from shoal_core.protocol.messages import (
    NO_TERMS,
    AttachDriver,
    DriverAlive,
    FinishJob,
    JobConfig,
    JobFinished,
    JobRecord,
    JobState,
    JobTerms,
    ListNodes,
    LogLines,
    LogSettings,
    NodeList,
    NodeState,
    RegisterJob,
)
from shoal_core.protocol.records import Failed
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode, encode
from shoal_core.runtime.environments import merged, shown
from shoal_core.runtime.reports.logs import set_up_logging
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.session import Address, Session, check_cluster

ALIVE_SECONDS = 1.0
REQUEST_SECONDS = 10.0
LEAVE_SECONDS = 2.0

logger = logging.getLogger("shoal")


@dataclass(frozen=True)
class DriverOptions:
    """What a driver says of its job."""

    namespace: str = ""
    environment: Packed = field(default_factory=lambda: Packed({}))
    metadata: dict[str, str] = field(default_factory=dict)
    log_to_driver: bool = True
    logging: LogSettings | None = None
    terms: JobTerms = NO_TERMS
    repeats: RepeatRules | None = None

    @classmethod
    def of(
        cls,
        namespace: str | None,
        runtime_env: Mapping[str, Any] | None,
        job_config: Any,
        log_to_driver: bool,
        logging_level: int | str,
        logging_config: Any = None,
        terms: JobTerms = NO_TERMS,
        part_of: Submitted | None = None,
    ) -> DriverOptions:
        """Check the parameters of ``init`` that describe the job, which may be ``part_of`` a submitted one."""
        if namespace is not None and not isinstance(namespace, str):
            raise TypeError(f"namespace must be a str, got {type(namespace).__name__}.")
        if namespace == "":
            raise ValueError("namespace must not be empty; leave it out for an anonymous one.")
        config = job_config_of(job_config)
        logger.setLevel(logging_level.upper() if isinstance(logging_level, str) else logging_level)
        environment, metadata = pack(config.runtime_env if runtime_env is None else runtime_env), config.metadata
        if part_of is not None:
            environment = Packed(merged(part_of.environment, environment.fields), environment.exports)
            metadata = part_of.metadata | metadata
        return cls(
            namespace=namespace or config.ray_namespace or os.urandom(8).hex(),
            environment=environment,
            metadata=dict(metadata),
            log_to_driver=log_to_driver,
            logging=log_settings_of(logging_config),
            terms=terms,
            repeats=repeat_rules_of(os.environ),
        )


def driver_session(where: Address, options: DriverOptions) -> Session:
    """Return the session, not yet entered, of this process as a driver of the cluster at ``where``."""

    @contextlib.asynccontextmanager
    async def identify(bus: Bus, subjects: Subjects) -> AsyncIterator[tuple[ProcessId, Path | None]]:
        await check_cluster(bus, subjects, where.address)
        yield await _find_node(bus, subjects)

    @contextlib.asynccontextmanager
    async def part(runtime: Runtime) -> AsyncIterator[None]:
        runtime.namespace = options.namespace
        if options.logging is not None:
            set_up_logging(options.logging)
        job = await _open_job(runtime, options)
        async with asyncio.TaskGroup() as tasks:
            alive = tasks.create_task(_stay_alive(runtime))
            with _listening(runtime, options):
                yield
            alive.cancel()
        with contextlib.suppress(BusError, RequestRefusedError):
            await ask(
                runtime.bus,
                runtime.subjects.gcs("finish_job"),
                FinishJob(job_id=job.job_id, state=JobState.SUCCEEDED, message="the driver shut down"),
                timeout_seconds=LEAVE_SECONDS,
            )

    return Session(where, identify, part)


async def _find_node(bus: Bus, subjects: Subjects) -> tuple[ProcessId, Path | None]:
    """Choose this process's id: that of a node whose shared memory it can open, else one without a node."""
    nodes = await ask(bus, subjects.gcs("list_nodes"), ListNodes(), timeout_seconds=REQUEST_SECONDS)
    assert isinstance(nodes, NodeList)
    here = machine_id()
    candidates = sorted(nodes.nodes, key=lambda node: not node.description.is_head)
    for record in candidates:
        description = record.description
        folder = Path(description.shared_memory_path)
        if record.state is NodeState.ALIVE and description.machine_id == here and os.access(folder / "probe", os.R_OK):
            return new_process_id(description.node_id), folder
    return new_process_id(NO_NODE), None


async def _open_job(runtime: Runtime, options: DriverOptions) -> JobRecord:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    request = RegisterJob(
        driver=runtime.local,
        hostname=socket.gethostname(),
        machine_id=machine_id(),
        pid=os.getpid(),
        entrypoint=" ".join([Path(sys.executable).name, *sys.argv]),
        version=__version__,
        python_version=platform.python_version(),
        config=JobConfig(
            namespace=options.namespace,
            sys_path=_import_path(script),
            working_directory=os.getcwd(),
            runtime_env=shown(options.environment.fields),
            metadata=options.metadata,
            log_to_driver=options.log_to_driver,
            logging=options.logging,
            terms=options.terms,
        ),
    )
    subjects = runtime.subjects
    job = await ask(runtime.bus, subjects.gcs("register_job"), request, timeout_seconds=REQUEST_SECONDS)
    assert isinstance(job, JobRecord)
    runtime.reactor.job = job.job_id
    runtime.environment = options.environment.fields
    runtime.reactor.terms = options.terms
    if runtime.node != NO_NODE:
        attach = AttachDriver(driver=runtime.local, job_id=job.job_id, machine_id=request.machine_id, pid=request.pid)
        subject = subjects.node_from_process(runtime.node, "attach_driver")
        await ask(runtime.bus, subject, attach, timeout_seconds=REQUEST_SECONDS)
    return job


def _import_path(script: str | None) -> list[str]:
    """Return what workers add to their import path, so that modules of the driver are found by name."""
    folder = str(Path(script).resolve().parent) if script else os.getcwd()
    return [folder, *(str(Path(entry).resolve()) for entry in sys.path if entry and Path(entry).is_dir())]


async def _stay_alive(runtime: Runtime) -> None:
    subject = runtime.subjects.event(Role.PROCESS, runtime.local, "alive")
    message = encode(DriverAlive(job_id=runtime.job, driver=runtime.local))
    while True:
        runtime.bus.publish(subject, message)
        await asyncio.sleep(ALIVE_SECONDS)


@contextlib.contextmanager
def _listening(runtime: Runtime, options: DriverOptions) -> Iterator[None]:
    """Print what the job's workers print, and hear of the job's end."""
    output = WorkerOutput(options.repeats)

    def on_lines(message: Message) -> None:
        output.show(decode(LogLines, message.data))

    def on_finished(message: Message) -> None:
        finished = decode(JobFinished, message.data)
        if finished.job_id == runtime.job:
            text = (
                f"This driver's job {runtime.job} was ended by the cluster: {finished.message}. That is never undone; "
                "call shutdown() and init() to begin a new job."
            )
            runtime.close(Failed("declared_dead", text))

    subscriptions = [
        runtime.bus.subscribe(runtime.subjects.event(Role.GCS, "*", "job_finished"), on_finished),
    ]
    if options.log_to_driver:
        subscriptions.append(runtime.bus.subscribe(runtime.subjects.log("*", runtime.job), on_lines))
    try:
        yield
    finally:
        for subscription in subscriptions:
            subscription.unsubscribe()
        output.close()
