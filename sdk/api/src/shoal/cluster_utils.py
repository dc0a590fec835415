"""A cluster of several nodes on one machine, for tests and for trying things.

Each node is a node service in a process of its own, with its own worker processes and its own shared memory. The head
is a host process with the broker and the control services.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.cluster import HostInfo, HostOptions, start_host, stop_host
from shoal.session import Context, init, shutdown
from shoal.status import Target, read_status
from shoal_core.bus.credentials import Credentials
from shoal_core.protocol.messages import NodeState

START_SECONDS = 30.0
_NODE_OPTIONS = ("num_cpus", "num_gpus", "memory", "resources", "labels", "object_store_memory")


@dataclass(frozen=True)
class ClusterNode:
    """One node; ``node_id`` is what ``get_runtime_context().get_node_id()`` returns there."""

    node_id: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def unique_id(self) -> str:
        """The same as ``node_id``."""
        return self.node_id


class Cluster:
    """Several nodes on this machine; ``connect()`` makes this process its driver."""

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
        if initialize_head:
            self.add_node(**(head_node_args or {}))
            if connect:
                self.connect()

    @property
    def address(self) -> str:
        """The address of the cluster's broker."""
        return self._running().address

    gcs_address = address

    def add_node(self, wait: bool = True, **options: Any) -> ClusterNode:
        """Start a node, the head first; with ``wait``, return when it is known to the cluster."""
        unknown = set(options) - set(_NODE_OPTIONS)
        if unknown:
            raise ValueError(f"Unknown option(s) of a node: {sorted(unknown)}. Valid ones are {list(_NODE_OPTIONS)}.")
        if self._host is None:
            options.pop("memory", None)
            self._host = start_host(HostOptions(**options), lasting=False)
            (node_id,) = self._alive()
            self.head_node = ClusterNode(node_id)
            return self.head_node
        known = self._alive()
        process = self._start_node(options)
        deadline = time.monotonic() + START_SECONDS
        while not (new := self._alive() - known):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"The node did not join; its log is {self._session_dir() / 'node.log'}.")
            time.sleep(0.02)
        node = ClusterNode(new.pop(), process)
        self.worker_nodes.append(node)
        return node

    def remove_node(self, node: ClusterNode, allow_graceful: bool = True) -> None:
        """End a node: in good order, or, with ``allow_graceful=False``, killed at once."""
        if node.process is None:
            raise ValueError("The head cannot be removed; shutdown() ends the cluster.")
        if allow_graceful:
            node.process.terminate()
        else:
            node.process.kill()
        node.process.wait()
        self.worker_nodes.remove(node)

    def wait_for_nodes(self, timeout: float = START_SECONDS) -> None:
        """Return when the cluster sees exactly the nodes that were added and not removed; ``TimeoutError``."""
        wanted = {node.node_id for node in self.list_all_nodes()}
        deadline = time.monotonic() + timeout
        while self._alive() != wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The cluster does not have the {len(wanted)} nodes it should after {timeout:g} s.")
            time.sleep(0.05)

    def list_all_nodes(self) -> list[ClusterNode]:
        """Return the nodes, the head first."""
        return [*([self.head_node] if self.head_node else []), *self.worker_nodes]

    def connect(self, namespace: str | None = None) -> Context:
        """Make this process a driver of the cluster."""
        os.environ["SHOAL_CREDENTIALS"] = self._running().credentials_path
        try:
            return init(self.address, namespace=namespace)
        finally:
            del os.environ["SHOAL_CREDENTIALS"]

    def remaining_processes_alive(self) -> bool:
        """Tell whether all nodes that were not removed live."""
        return all(node.process is None or node.process.poll() is None for node in self.worker_nodes)

    def shutdown(self) -> None:
        """Leave the cluster and end all its nodes."""
        shutdown()
        for node in list(self.worker_nodes):
            self.remove_node(node)
        if self._host is not None:
            stop_host(self._host)
            self._host = self.head_node = None

    def _running(self) -> HostInfo:
        if self._host is None:
            raise RuntimeError("The cluster has no head yet; call add_node() first.")
        return self._host

    def _session_dir(self) -> Path:
        return Path(self._running().session_dir)

    def _alive(self) -> set[str]:
        host = self._running()
        proof = Credentials.from_file(self._session_dir() / "observer.json")
        seen = asyncio.run(read_status(Target(host.address, host.cluster, proof)))
        return {node.record.description.node_id for node in seen.nodes if node.record.state is NodeState.ALIVE}

    def _start_node(self, options: dict[str, Any]) -> subprocess.Popen[bytes]:
        host, folder = self._running(), self._session_dir()
        command = [sys.executable, "-m", "shoal_worker", "--address", host.address, "--cluster", host.cluster]
        command += ["--credentials", str(folder / "node.json")]
        command += ["--process-credentials", str(folder / "process.json")]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
        with open(folder / "node.log", "ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
