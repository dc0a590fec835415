"""A cluster of several nodes on one machine, for tests and for trying things.

Each node is a node service in a process of its own, with its own worker processes and its own shared memory. The head
is a host process with the broker and the control services. All of them end with this process, however it ends.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.cluster import HostInfo, HostOptions, is_running, start_host, stop_host
from shoal.session import Context, init, shutdown
from shoal_core.bus import Bus, connect
from shoal_core.bus.credentials import Credentials
from shoal_core.bus.requests import ask
from shoal_core.machine import environment_for_copies, remove_stores
from shoal_core.protocol.errors import BusError
from shoal_core.protocol.ids import new_node_id, new_service_id
from shoal_core.protocol.messages import ListNodes, NodeList, NodeState
from shoal_core.protocol.resources import Resources, add, fits
from shoal_core.protocol.scheduling import GetResources, ResourceView
from shoal_core.protocol.subjects import Role, Subjects

START_SECONDS = 30.0
STOP_SECONDS = 10.0
REQUEST_SECONDS = 5.0
PAUSE_SECONDS = 0.02
LOG_BYTES = 2_000

_IGNORED = frozenset({"_system_config", "dashboard_host", "dashboard_port", "include_dashboard"})
"""Parameters of Ray's nodes that are accepted and mean nothing here."""
_FOLDER = "plasma_directory"
"""Ray's name for the folder in which a node's objects lie."""


@dataclass(frozen=True)
class ClusterNode:
    """One node; ``node_id`` is what ``get_runtime_context().get_node_id()`` returns there."""

    node_id: str
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    plasma_directory: str | None = field(default=None, repr=False)

    @property
    def unique_id(self) -> str:
        """The same as ``node_id``."""
        return self.node_id


class Cluster:
    """Several nodes on this machine; ``connect()`` makes this process its driver.

    ``head_node_args`` are parameters of ``add_node`` for the head. Without ``initialize_head`` the first ``add_node``
    starts the head. ``shutdown_at_exit`` ends the cluster in good order when this process does; it ends in any case.
    """

    def __init__(
        self,
        initialize_head: bool = False,
        connect: bool = False,
        head_node_args: dict[str, Any] | None = None,
        shutdown_at_exit: bool = True,
    ) -> None:
        self.head_node: ClusterNode | None = None
        self.worker_nodes: list[ClusterNode] = []
        self._host: HostInfo | None = None
        self._starting_head = threading.Lock()
        if not initialize_head and (connect or head_node_args):
            raise ValueError("connect and head_node_args need initialize_head=True.")
        if shutdown_at_exit:
            atexit.register(self.shutdown)
        if initialize_head:
            self.add_node(**(head_node_args or {}))
            if connect:
                self.connect()

    @property
    def address(self) -> str:
        """The address of the cluster's broker."""
        return self._running().address

    @property
    def gcs_address(self) -> str:
        """The same as ``address``."""
        return self.address

    def add_node(self, wait: bool = True, **options: Any) -> ClusterNode:
        """Start a node, the head first; with ``wait``, return when the cluster places work there. For any thread.

        ``options``: ``num_cpus``, ``num_gpus``, ``memory`` and ``object_store_memory`` (bytes), ``resources``,
        ``labels``, ``node_name`` (what ``nodes()`` shows as ``NodeName``), ``plasma_directory`` (the folder in which
        the node's objects lie, in shared memory by default; nodes whose objects lie in the same folder share the memory
        of large ones, as if they were one); those not given are what the machine has.
        Raises ``TypeError`` and ``ValueError`` for a wrong one, ``RuntimeError`` with the end of its log where the
        node does not join.
        """
        described = _describe(options)
        with self._starting_head:
            if self._host is None:
                self._host = start_host(described, lasting=False)
                (head,) = self._alive()
                self.head_node = ClusterNode(head)
                return self.head_node
        node = self._start_node(described)
        if wait:
            self._wait_until_joined(node)
        self.worker_nodes.append(node)
        return node

    def remove_node(self, node: ClusterNode, allow_graceful: bool = True) -> None:
        """End a node: in good order, or, with ``allow_graceful=False``, killed at once."""
        if node.process is None:
            raise ValueError("The head cannot be removed; shutdown() ends the cluster.")
        if node not in self.worker_nodes:
            raise ValueError(f"The node {node.node_id} is not of this cluster, or was removed already.")
        self.worker_nodes.remove(node)
        _end(node, in_good_order=allow_graceful)

    def wait_for_nodes(self, timeout: float = START_SECONDS) -> None:
        """Return when the cluster has exactly the nodes that were added and not removed; ``TimeoutError``."""
        wanted = {node.node_id for node in self.list_all_nodes()}
        if not self._wait(lambda alive: alive == wanted, timeout):
            raise TimeoutError(
                f"After {timeout:g} s the cluster sees the nodes {sorted(self._alive())} instead of {sorted(wanted)}."
            )

    def list_all_nodes(self) -> list[ClusterNode]:
        """Return the nodes, the head first."""
        return [*([self.head_node] if self.head_node else []), *self.worker_nodes]

    def connect(self, namespace: str | None = None) -> Context:
        """Make this process a driver of the cluster."""
        return init(self._running().address, namespace=namespace)

    def remaining_processes_alive(self) -> bool:
        """Tell whether the head and all nodes that were not removed live."""
        if self._host is not None and not is_running(self._host):
            return False
        return all(node.process is None or node.process.poll() is None for node in self.worker_nodes)

    def shutdown(self) -> None:
        """Leave the cluster and end all its nodes; does nothing where it has ended already."""
        atexit.unregister(self.shutdown)
        if self._host is None:
            return
        shutdown()
        nodes, self.worker_nodes = self.worker_nodes, []
        for node in nodes:
            if node.process is not None:
                node.process.terminate()
        for node in nodes:
            _end(node, in_good_order=True)
        stop_host(self._host)
        self._host = self.head_node = None

    def _running(self) -> HostInfo:
        if self._host is None:
            raise RuntimeError("The cluster has no head; call add_node() first.")
        return self._host

    # ------------------------------------------------------------------------- what the cluster sees

    def _alive(self) -> set[str]:
        """Return the ids of the nodes that the control store holds for alive."""

        async def once() -> set[str]:
            async with self._observer() as bus:
                return set(await self._list_alive(bus))

        return asyncio.run(once())

    def _wait(
        self, condition: Callable[[set[str]], bool], timeout: float, is_hopeless: Callable[[], bool] = lambda: False
    ) -> bool:
        """Ask for the nodes that are used until they are as wanted; False after ``timeout`` or without hope."""

        async def until() -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout), self._observer() as bus:
                    while not is_hopeless():
                        with contextlib.suppress(BusError):
                            if condition(await self._list_usable(bus)):
                                return True
                        await asyncio.sleep(PAUSE_SECONDS)
            return False

        return asyncio.run(until())

    @contextlib.asynccontextmanager
    async def _observer(self) -> AsyncIterator[Bus]:
        host = self._running()
        async with connect(
            host.address,
            role=Role.OBSERVER,
            identity=new_service_id(),
            cluster=host.cluster,
            credentials=Credentials.from_file(Path(host.session_dir) / f"{Role.OBSERVER}.json"),
        ) as bus:
            yield bus

    async def _list_alive(self, bus: Bus) -> dict[str, Resources]:
        """Return what each node has that is alive."""
        subjects = Subjects(self._running().cluster)
        nodes = await ask(bus, subjects.gcs("list_nodes"), ListNodes(), timeout_seconds=REQUEST_SECONDS)
        assert isinstance(nodes, NodeList)
        described = [record.description for record in nodes.nodes if record.state is NodeState.ALIVE]
        return {about.node_id: about.total for about in described}

    async def _list_usable(self, bus: Bus) -> set[str]:
        """Return the nodes that are alive; none, as long as the scheduler does not see all that they have."""
        alive = await self._list_alive(bus)
        subject = Subjects(self._running().cluster).scheduler("resources")
        seen = await ask(bus, subject, GetResources(), timeout_seconds=REQUEST_SECONDS)
        assert isinstance(seen, ResourceView)
        together: Resources = functools.reduce(add, alive.values(), {})
        return set(alive) if fits(together, seen.total) else set()

    # ------------------------------------------------------------------------- processes

    def _start_node(self, options: HostOptions) -> ClusterNode:
        host, node_id = self._running(), new_node_id()
        folder = Path(host.session_dir)
        command = [sys.executable, "-m", "shoal.host", "node", "--identity", node_id]
        command += ["--address", host.address, "--cluster", host.cluster]
        command += ["--credentials", str(folder / f"{Role.NODE}.json")]
        command += ["--process-credentials", str(folder / f"{Role.PROCESS}.json")]
        for name, value in asdict(options).items():
            if value not in (None, {}):
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                command += [f"--{name.replace('_', '-')}", text]
        # A node takes what is not said here from SHOAL_… variables, which may be meant for this process.
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        environment = environment_for_copies(ours)
        with open(self._log(node_id), "wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return ClusterNode(node_id, process, options.object_store_folder)

    def _wait_until_joined(self, node: ClusterNode) -> None:
        process = node.process
        assert process is not None
        try:
            joined = self._wait(lambda alive: node.node_id in alive, START_SECONDS, lambda: process.poll() is not None)
        except BaseException:
            _end(node, in_good_order=False)
            raise
        if not joined:
            status = process.poll()
            _end(node, in_good_order=False)
            how = f"within {START_SECONDS:g} s" if status is None else f"and ended with status {status}"
            log_end = self._log(node.node_id).read_text(errors="replace")[-LOG_BYTES:]
            raise RuntimeError(f"The node {node.node_id} did not join {how}. The end of its log:\n{log_end}")

    def _log(self, node_id: str) -> Path:
        return Path(self._running().session_dir) / f"node-{node_id}.log"


def _describe(options: dict[str, Any]) -> HostOptions:
    """Return what a node offers; an error names the parameter that is wrong."""
    valid = (set(HostOptions.__dataclass_fields__) | {_FOLDER}) - {"object_store_folder"}
    unknown = set(options) - valid - _IGNORED
    if unknown:
        raise ValueError(f"Unknown option(s) of a node: {sorted(unknown)}. Valid ones are {sorted(valid)}.")
    known = {name: value for name, value in options.items() if name in valid}
    folder = known.pop(_FOLDER, None)
    return HostOptions.of(**known, object_store_folder=folder)


def _end(node: ClusterNode, *, in_good_order: bool) -> None:
    """End a node's process, where it has one, and reap it; one that does not end in time is killed."""
    process = node.process
    if process is None:
        return
    if in_good_order:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    process.kill()
    process.wait()
    remove_stores(process.pid, node.plasma_directory)
    if process.stdin is not None:
        process.stdin.close()
