"""Messages with everything filled in, so that a test states only what it is about."""

from __future__ import annotations

from shoal_core.protocol.messages import JobConfig, NodeDescription, RegisterJob
from shoal_core.testing.builders import node_id, process_id


def description(number: int) -> NodeDescription:
    """Return what the ``number``-th node says of itself."""
    return NodeDescription(
        node_id=node_id(number),
        hostname=f"host-{number}",
        address="127.0.0.1",
        machine_id=f"machine-{number}",
        pid=number,
        total={"CPU": 40_000},
        shared_memory_path="/dev/shm/test",
        object_store_bytes=1,
        version="0.1.0",
        python_version="3.11",
        started_at=float(number),
    )


def job_request(driver: int, entrypoint: str = "program.py") -> RegisterJob:
    """Return how the ``driver``-th driver opens its job."""
    return RegisterJob(
        driver=process_id(driver),
        hostname="host",
        machine_id="machine",
        pid=driver,
        entrypoint=entrypoint,
        version="0.1.0",
        python_version="3.11",
        config=JobConfig(namespace="n"),
    )
