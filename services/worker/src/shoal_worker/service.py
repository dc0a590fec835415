"""The node as a service: its core on a bus, the template beside it, and the parts that touch the machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from shoal_core import __version__
from shoal_core.bus import Bus, Credentials, connect
from shoal_core.bus.bulk import BulkAddress
from shoal_core.bus.peers import Peers
from shoal_core.bus.requests import ask
from shoal_core.machine import boot_id, check_gpus, machine_id, visible_gpus
from shoal_core.protocol.actors import ActorChanged
from shoal_core.protocol.effects import Connected
from shoal_core.protocol.groups import GroupChanged
from shoal_core.protocol.ids import ActorId, NodeId, ProcessId, new_node_id
from shoal_core.protocol.labels import check_labels, system_labels
from shoal_core.protocol.logs import ListLogs, ReadLog
from shoal_core.protocol.messages import JobFinished, NodeDescription, NodeDied, ProcessDied, RetireNode
from shoal_core.protocol.places import located
from shoal_core.protocol.resources import UNIT
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.verbs import NODE_NODE, NODE_PROCESS, NODE_PUBLIC, NODE_SCHEDULER
from shoal_core.runtime.worker.process import WorkerConfig
from shoal_core.service import Engine, Route
from shoal_core.service.main import Service
from shoal_core.service.settings import ServiceSettings
from shoal_core.transfer.mover import Cancel, Mover, Offer, Pull, Withdraw
from shoal_core.transfer.pulling import CANCELLED, Ended
from shoal_core.transfer.records import CHUNK_BYTES
from shoal_worker import accelerators, machine
from shoal_worker.accelerators import NoAccelerators
from shoal_worker.gpus import Gpus
from shoal_worker.inputs import (
    CancelPull,
    DriverEnded,
    FetchLogs,
    KillProcess,
    KillSoon,
    Leave,
    LogsFetched,
    OfferSegment,
    ProcessEnded,
    Pulled,
    PullSegment,
    RemoveEnvironments,
    RouteOutput,
    StartProcess,
    Suspected,
    UnwatchDriver,
    WatchDriver,
    WithdrawSegment,
)
from shoal_worker.meter import metered
from shoal_worker.metrics import count
from shoal_worker.node import NodeCore
from shoal_worker.objects.durable import DurableTier, durable_tier
from shoal_worker.objects.files import MOST_SHARED_BYTES
from shoal_worker.objects.storage import Storage
from shoal_worker.workers.forks import Forks, forks
from shoal_worker.workers.log_files import Limits, LogFiles
from shoal_worker.workers.logs import Logs
from shoal_worker.workers.memory_meter import watched
from shoal_worker.workers.output import Outputs
from shoal_worker.workers.templates import prepare

MOST_PRESTARTED = 4
WARM_BYTES = 2 * 1024**3
REQUEST_SECONDS = 10.0
LEAVE_SECONDS = 2.0
LAST_WORD_SECONDS = 0.1
"""So long a process has to tell what it has run, when its job or its owner has ended."""


class WorkerSettings(ServiceSettings):
    """What a node is told beside what every service is."""

    num_cpus: float | None = Field(default=None, ge=0, description="CPUs to offer; all of them by default.")
    num_gpus: float | None = Field(default=None, ge=0, description="GPUs to offer; all that NVML finds by default.")
    memory: int | None = Field(default=None, ge=0, description="Bytes of memory to offer; all of it by default.")
    resources: dict[str, float] = Field(default={}, description="Resources of your own, as JSON.")
    labels: dict[str, str] = Field(default={}, description="Labels of the node, as JSON.")
    labels_file: str | None = Field(default=None, description="A file: JSON with more labels; --labels go before it.")
    node_name: str = Field(default="", description="What users see as NodeName; the hostname by default.")
    node_address: str | None = Field(default=None, description="The address users see; found out by default.")
    object_store_memory: int | None = Field(default=None, gt=0, description="Bytes of shared memory for objects.")
    object_store_folder: str | None = Field(default=None, description="Where objects lie; shared memory by default.")
    memory_threshold: float = Field(
        default=0.95, gt=0, le=1, description="Share of memory from which on tasks are ended; 1: never."
    )
    is_head: bool = Field(default=False, description="Drivers of this machine attach to this node first.")
    process_credentials: str | None = Field(default=None, description="The file for worker processes; ours by default.")
    prestart: int | None = Field(default=None, ge=0, description="Worker processes kept ready; one a CPU, at most 4.")
    rotation_max_bytes: int = Field(
        default=16 * 2**20, ge=1024, description="Bytes after which the log of a worker process goes on in a new file."
    )
    rotation_backup_count: int = Field(default=3, ge=0, description="Older files of such a log that are kept.")
    log_bytes: int = Field(default=2**30, ge=0, description="Bytes of all logs of worker processes together.")

    @field_validator("num_gpus")
    @classmethod
    def _check_gpus(cls, wanted: float | None) -> float | None:
        check_gpus(wanted)
        return wanted

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        check_labels(labels)
        return labels

    @field_validator("labels_file")
    @classmethod
    def _check_labels_file(cls, path: str | None) -> str | None:
        if path is not None:
            try:
                _read_labels(path)
            except (OSError, TypeError) as error:
                raise ValueError(str(error)) from None
        return path

    def log_limits(self) -> Limits:
        """Return how much is kept of what worker processes print."""
        return Limits(self.rotation_max_bytes, self.rotation_backup_count, self.log_bytes)

    def all_labels(self) -> dict[str, str]:
        """Return the labels that were given, those of the file too."""
        told = _read_labels(self.labels_file) if self.labels_file is not None else {}
        return {**told, **self.labels}


def _read_labels(path: str) -> dict[str, str]:
    told: dict[str, str] = json.loads(Path(path).read_text())
    check_labels(told)
    return told


class LeaveError(Exception):
    """The node was declared dead and must end; whoever runs it starts a new incarnation."""


class Hands:
    """What the core's commands do to this machine."""

    def __init__(
        self,
        bus: Bus,
        settings: WorkerSettings,
        node: NodeId,
        folder: Path,
        outputs: Outputs,
        durable: DurableTier,
        gpu_variable: str,
        environments: Path,
    ) -> None:
        self.engine: Engine
        self.forks: Forks
        subjects = Subjects(settings.cluster)
        self.storage = Storage(bus, subjects, folder, durable, lambda message: self.engine.inject(message))
        self.leaving = False
        self._settings = settings
        self._node = node
        self._folder = folder
        self._outputs = outputs
        self._gpu_variable = gpu_variable
        self._environments = environments
        self._drivers: dict[ProcessId, int] = {}
        self._loop = asyncio.get_running_loop()
        where = BulkAddress(settings.address, node, settings.proof(), settings.tls())
        self.mover = Mover(where, Subjects(settings.cluster), Role.NODE, node, self.pull_ended)

    def perform(self, command: Any) -> Awaitable[None] | None:
        """Carry out one command of the core; what takes time is returned, to be awaited beside the core."""
        match command:
            case StartProcess(process):
                self.forks.start(self._config(process))
            case KillProcess(process):
                self.forks.kill(process)
            case KillSoon(process):
                self._loop.call_later(LAST_WORD_SECONDS, self.forks.kill, process)
            case RouteOutput(process, job, actor):
                self._outputs.route(process, job, actor)
            case FetchLogs(token, request):
                return self._fetch_logs(token, request)
            case RemoveEnvironments(job):
                return asyncio.to_thread(shutil.rmtree, self._environments / job, ignore_errors=True)
            case OfferSegment(name, place, size_bytes, chunk_bytes):
                file, offset = located(place)
                self.mover.order(Offer(name, self._folder / file, size_bytes, chunk_bytes, offset))
            case WithdrawSegment(name):
                self.mover.order(Withdraw(name, "its home withdrew it"))
            case PullSegment(name, source, stream, size_bytes, chunk_bytes):
                self.mover.order(Pull(name, source, stream, size_bytes, chunk_bytes, self._folder / name))
            case CancelPull(name):
                self.mover.order(Cancel(name))
            case WatchDriver(driver, pid):
                self._watch(driver, pid)
            case UnwatchDriver(driver):
                self._unwatch(driver)
            case Leave(reason):
                if not self.leaving:  # else it is this node that has said so
                    raise LeaveError(reason)
            case _:
                return self.storage.perform(command)
        return None

    def process_ended(self, ended: ProcessEnded) -> None:
        """Tell the core that a worker process is gone."""
        self._outputs.forget(ended.process_id)
        self.engine.inject(ended)

    def pull_ended(self, ended: Ended) -> None:
        """Tell the core that a pull is over (the mover's thread)."""
        if ended.code != CANCELLED:
            self._loop.call_soon_threadsafe(self.engine.inject, Pulled(ended.name, ended.code, ended.text))

    async def _fetch_logs(self, token: int, request: ListLogs | ReadLog) -> None:
        self.engine.inject(LogsFetched(token, await self._outputs.logs.answer(request)))

    def close(self) -> None:
        """Stop watching, and end all transfers."""
        self.mover.close()
        for driver in list(self._drivers):
            self._unwatch(driver)

    def _config(self, process: ProcessId) -> WorkerConfig:
        settings = self._settings
        path = settings.process_credentials or settings.credentials
        proof = Credentials.from_file(path).to_json() if path else {"token": settings.token} if settings.token else {}
        tls = {"ca_file": settings.ca_file} if settings.ca_file else {}
        return WorkerConfig(
            process_id=process,
            node_id=self._node,
            cluster=settings.cluster,
            address=settings.address,
            credentials=proof,
            shared_memory_path=str(self._folder),
            begun_page=str(self._folder / f"begun-{process}"),
            environments_path=str(self._environments),
            tls=tls,
            gpu_variable=self._gpu_variable,
        )

    def _watch(self, driver: ProcessId, pid: int) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._loop.call_soon(self.engine.inject, DriverEnded(driver))
            return
        self._drivers[driver] = descriptor
        self._loop.add_reader(descriptor, self._driver_ended, driver)

    def _driver_ended(self, driver: ProcessId) -> None:
        self._unwatch(driver)
        self.engine.inject(DriverEnded(driver))

    def _unwatch(self, driver: ProcessId) -> None:
        descriptor = self._drivers.pop(driver, None)
        if descriptor is not None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)


def routes(subjects: Subjects, node: NodeId) -> list[Route]:
    """Return where the node is asked, and what it listens to."""
    asked = [Route(subjects.node_from_scheduler(node, verb), model) for verb, model in NODE_SCHEDULER.items()]
    asked += [Route(subjects.node(node, verb), model) for verb, model in NODE_PUBLIC.items()]
    asked += [Route(subjects.node_from_process(node, verb), model) for verb, model in NODE_PROCESS.items()]
    asked += [Route(subjects.node_from_node(node, verb), model) for verb, model in NODE_NODE.items()]
    events = [
        Route(subjects.event(Role.NODE, "*", "process_died"), ProcessDied, kind="event"),
        Route(subjects.event(Role.GCS, "*", "node_died"), NodeDied, kind="event"),
        Route(subjects.event(Role.GCS, "*", "job_finished"), JobFinished, kind="event"),
        Route(subjects.actor_changed("*", ActorId("*")), ActorChanged, kind="event"),
        Route(subjects.groups_changed("*", "*"), GroupChanged, kind="event"),
    ]
    return [*asked, *events]


def _describe(node: NodeId, settings: WorkerSettings, folder: Path, gpus: Gpus) -> NodeDescription:
    hostname = socket.gethostname()
    store = machine.store_bytes(folder, settings.object_store_memory)
    broker = urlsplit(settings.address.split(",")[0])
    address = settings.node_address or machine.address_towards(broker.hostname or machine.LOOPBACK, broker.port or 4222)
    named = {**machine.implicit(address, gpus.models, is_head=settings.is_head), **settings.resources}
    system = system_labels(node, hostname, gpus.models[0] if len(gpus.models) == 1 else "")
    return NodeDescription(
        node_id=node,
        hostname=hostname,
        address=address,
        machine_id=machine_id(),
        pid=os.getpid(),
        total=machine.offered(settings.num_cpus, gpus.amount, settings.memory, store, named),
        labels={**system, **settings.all_labels()},
        shared_memory_path=str(folder),
        object_store_bytes=store,
        version=__version__,
        python_version=platform.python_version(),
        started_at=time.time(),
        is_head=settings.is_head,
        name=settings.node_name,
    )


def _dial(settings: WorkerSettings, node: NodeId) -> AbstractAsyncContextManager[Bus]:
    """Return a second connection of the node, for bulk data."""
    return connect(
        settings.address,
        role=Role.NODE,
        identity=node,
        cluster=settings.cluster,
        credentials=settings.proof(),
        tls=settings.tls(),
    )


@asynccontextmanager
async def _forked(hands: Hands, outputs: Outputs) -> AsyncIterator[Hands]:
    """Give the hands a template to fork worker processes from."""
    async with forks(hands.process_ended, outputs.add) as hands.forks:
        yield hands


@asynccontextmanager
async def serve(bus: Bus, settings: WorkerSettings) -> AsyncIterator[Engine]:
    """Run one node; entering means that it grants leases, and leaving that nothing of it is left."""
    node = NodeId(bus.identity)
    subjects = Subjects(settings.cluster)
    base = machine.store_base(settings.object_store_memory, settings.object_store_folder)
    with (
        contextlib.closing(NoAccelerators() if settings.num_gpus == 0 else accelerators.find()) as found,
        machine.store_folder(node, base) as folder,
        machine.environments_folder(node) as environments,
        machine.logs_folder(node) as log_folder,
        contextlib.closing(Logs(LogFiles(log_folder, settings.log_limits()))) as logs,
    ):
        gpus = Gpus.of(found.devices, settings.num_gpus, visible_gpus())
        description = _describe(node, settings, folder, gpus)
        whole_cpus = description.total.get("CPU", 0) // UNIT
        prestart = settings.prestart if settings.prestart is not None else min(MOST_PRESTARTED, whole_cpus)
        core = NodeCore(
            description,
            subjects,
            gpu_names=gpus.names,
            prestart=prestart,
            warm_bytes=min(WARM_BYTES, description.object_store_bytes // 4),
            shared_bytes=MOST_SHARED_BYTES,
            chunk_bytes=min(CHUNK_BYTES, bus.max_payload),
            boot_id=boot_id(),
        )
        outputs = Outputs(bus, subjects, node, logs)
        async with (
            durable_tier(lambda: _dial(settings, node), subjects) as durable,
            _forked(
                Hands(bus, settings, node, folder, outputs, durable, found.variable, environments), outputs
            ) as hands,
        ):
            engine = hands.engine = Engine(
                core,
                bus,
                name="worker",
                routes=routes(subjects, node),
                perform_start=hands.perform,
                peers=lambda deliver: Peers(bus, subjects, Role.NODE, node, deliver),
                clock=time.monotonic,
            )
            count(engine.metrics, core, hands.mover)
            try:
                async with (
                    metered(found, core.leases.gpus, engine.metrics),
                    watched(settings.memory_threshold, lambda: hands.forks.pids, engine.inject),
                    engine,
                ):
                    assert engine.peers is not None
                    engine.peers.on_silence(lambda peer, _seconds: engine.inject(Suspected(peer)))
                    register = subjects.gcs_from_node("register_node")
                    await ask(bus, register, description, timeout_seconds=REQUEST_SECONDS)
                    engine.inject(Connected(True))
                    yield engine
                    hands.leaving = True
                    retire = RetireNode(node_id=node, reason="the node left in order")
                    with contextlib.suppress(Exception):
                        await ask(bus, subjects.gcs_from_node("retire_node"), retire, timeout_seconds=LEAVE_SECONDS)
            finally:
                hands.close()
                outputs.close()


SERVICE = Service("worker", Role.NODE, WorkerSettings, serve, new_node_id, prepare)
