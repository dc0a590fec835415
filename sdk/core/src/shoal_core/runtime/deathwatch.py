"""Telling a process of every process and node of the cluster that dies: what it hears, and what it asks.

A node tells of the deaths of its processes, the control store of nodes that die and of jobs that end: with its job a
driver is gone for everybody else, also one that shut down in good order and lives on. Events are hints. Where one may
have been missed (``deaths``), where a peer is silent, and after a reconnect the process asks the authorities: a node
about its processes, the control store about nodes, and about the jobs of drivers that have no node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator

from shoal_core.bus.interface import Message
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import BusError, NotFoundError
from shoal_core.protocol.ids import NO_NODE, NodeId, PeerId, ProcessId, node_of
from shoal_core.protocol.messages import (
    GetNode,
    GetProcesses,
    JobFinished,
    JobList,
    JobState,
    ListJobs,
    NodeDied,
    NodeRecord,
    NodeState,
    ProcessDied,
    ProcessList,
)
from shoal_core.protocol.subjects import Role
from shoal_core.protocol.wire import decode
from shoal_core.runtime.deaths import Deaths
from shoal_core.runtime.runtime import Runtime

ASK_SECONDS = 5.0


@contextlib.contextmanager
def watching_deaths(runtime: Runtime) -> Iterator[None]:
    """Tell the runtime of every process and node of the cluster that dies, until left."""
    watch = DeathWatch(runtime)
    try:
        yield
    finally:
        watch.close()


class DeathWatch:
    """What one process does to hear of the deaths of others (I/O thread only)."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._reactor = runtime.reactor
        self._deaths = Deaths()
        self._asking: dict[NodeId, asyncio.Task[None]] = {}
        bus, subjects = runtime.bus, runtime.subjects
        self._subscriptions = [
            bus.subscribe(subjects.event(Role.NODE, "*", "process_died"), self._process_died),
            bus.subscribe(subjects.event(Role.GCS, "*", "node_died"), self._node_died),
            bus.subscribe(subjects.event(Role.GCS, "*", "job_finished"), self._job_finished),
        ]
        self._reactor.peers.on_silence(self._silent)
        self._reactor.nodes.suspect = self._inquire
        self._unlisten = bus.on_connection(self._connection)

    def close(self) -> None:
        """Hear and ask nothing any more."""
        self._unlisten()
        for subscription in self._subscriptions:
            subscription.unsubscribe()
        for task in list(self._asking.values()):
            task.cancel()

    # ------------------------------------------------------------------------------- what is heard

    def _process_died(self, message: Message) -> None:
        event = decode(ProcessDied, message.data)
        self._reactor.process_died(event.process_id)
        if self._deaths.heard(event.process_id, event.sequence):
            self._inquire(node_of(event.process_id))

    def _node_died(self, message: Message) -> None:
        event = decode(NodeDied, message.data)
        self._deaths.forget(event.node_id)
        self._reactor.node_died(event.node_id, event.reason)

    def _job_finished(self, message: Message) -> None:
        if driver := decode(JobFinished, message.data).driver:
            self._reactor.process_died(driver)

    def _silent(self, peer: PeerId, seconds: float) -> None:
        self._inquire(NodeId(peer[:16]))

    def _connection(self, connected: bool) -> None:
        if connected:
            for node in {self._runtime.node, *(NodeId(peer[:16]) for peer in self._reactor.peers.known())}:
                self._inquire(node)
            self._reactor.reread()

    # ------------------------------------------------------------------------------- what is asked

    def _inquire(self, node: NodeId) -> None:
        """Ask about a node and its processes, unless that is being asked."""
        if node in self._asking:
            return
        # Whoever was known before a list was made, and is not in it, is dead.
        known = [ProcessId(peer) for peer in self._reactor.peers.known() if len(peer) > len(node)]
        asking = self._ask_jobs(known) if node == NO_NODE else self._ask_node(node, known)
        task = asyncio.get_running_loop().create_task(_unless_cut_off(asking))
        self._asking[node] = task
        task.add_done_callback(lambda _: self._asking.pop(node, None))

    async def _ask_node(self, node: NodeId, known: list[ProcessId]) -> None:
        bus, subjects = self._runtime.bus, self._runtime.subjects
        try:
            record = await ask(bus, subjects.gcs("get_node"), GetNode(node_id=node), timeout_seconds=ASK_SECONDS)
            assert isinstance(record, NodeRecord)
            if record.state is NodeState.DEAD:
                self._reactor.node_died(node, record.death_reason)
                return
            subject = subjects.node_from_process(node, "processes")
            answer = await ask(bus, subject, GetProcesses(), timeout_seconds=ASK_SECONDS)
            assert isinstance(answer, ProcessList)
        except NotFoundError:
            self._reactor.node_died(node, "the control store does not know it")
        else:
            for process in self._deaths.compare(node, answer.sequence, answer.processes, known):
                self._reactor.process_died(process)

    async def _ask_jobs(self, known: list[ProcessId]) -> None:
        """Ask about drivers without a node: such a one is dead when its job has ended.

        A replica may not have heard yet of a job that runs: who is not in its list may live.
        """
        bus, subjects = self._runtime.bus, self._runtime.subjects
        jobs = await ask(bus, subjects.gcs("list_jobs"), ListJobs(), timeout_seconds=ASK_SECONDS)
        assert isinstance(jobs, JobList)
        ended = {job.driver for job in jobs.jobs if job.state is not JobState.RUNNING}
        for process in ended.intersection(known):
            self._reactor.process_died(process)


async def _unless_cut_off(asking: Coroutine[None, None, None]) -> None:
    """Ask; where the broker does not carry it, the next suspicion asks again."""
    with contextlib.suppress(BusError):
        await asking
