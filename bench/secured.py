"""The rows about TLS and authentication: what they cost, beside the same cluster without either.

Both clusters are of parts that stand alone, as on a broker of one's own: the broker, each service, and each node is a
process. One broker has what ``shoal security init`` makes, the other lets everybody in. They stand side by side, and
fresh drivers go to one and the other in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.measuring import Effort, Measured
from bench.transfers import store_folders

CLUSTER = "bench"
HOST = "127.0.0.1"
START_SECONDS = 30.0
STOP_SECONDS = 10.0
PAUSE_SECONDS = 0.05
STORE_BYTES = {"transfer": 5 * 1024**3}
"""The shared memory of the nodes of a row that needs more than this:"""
USUAL_STORE_BYTES = 512 * 1024**2


@contextlib.contextmanager
def standing(folder: Path, protected: bool, store_bytes: int, stores: Sequence[str]) -> Iterator[dict[str, str]]:
    """Run a cluster of two nodes in a folder, the first for drivers; yield what a driver's environment says of it.

    The nodes' objects lie in ``stores``.
    """
    from shoal.security import SecurityFolder
    from shoal_core.bus.broker import find_server, free_port
    from shoal_core.protocol.subjects import Role

    port = free_port()
    address = f"{'tls' if protected else 'nats'}://{HOST}:{port}"
    target = ["--address", address, "--cluster", CLUSTER]
    command = [find_server(), "--addr", HOST, "--port", str(port), "--store_dir", str(folder / "store")]
    proof: dict[Role, list[str]] = {role: [] for role in Role}
    driver = {"SHOAL_ADDRESS": address, "SHOAL_CLUSTER": CLUSTER}
    node = ["--object-store-memory", str(store_bytes)]
    if protected:
        made = SecurityFolder.create(folder / "security", CLUSTER)
        command += ["--config", str(made.path / "broker.conf"), "--tls"]
        command += ["--tlscert", str(made.path / "broker.pem"), "--tlskey", str(made.path / "broker-key.pem")]
        target += ["--ca-file", str(made.path / "ca.pem")]
        proof = {role: ["--credentials", str(made.credentials(role))] for role in Role}
        node += ["--process-credentials", str(made.credentials(Role.PROCESS))]
        driver |= {"SHOAL_CREDENTIALS": str(made.credentials(Role.PROCESS)), "SHOAL_CA_FILE": str(made.path / "ca.pem")}
    else:
        command += ["--jetstream"]
    services = {"shoal_gcs": Role.GCS, "shoal_scheduler": Role.SCHEDULER, "shoal_objectstore": Role.OBJECTSTORE}
    commands = [
        command,
        *([sys.executable, "-m", module, *target, *proof[role]] for module, role in services.items()),
        *(
            [sys.executable, "-m", "shoal_worker", *target, *proof[Role.NODE], *node, *own]
            for own in (
                ["--object-store-folder", stores[0], "--num-cpus", "2", "--is-head", "true"],
                ["--object-store-folder", stores[1], "--num-cpus", "1", "--resources", json.dumps({"reader0": 1})],
            )
        ),
    ]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "log", "wb"))
        for one in commands:
            stack.enter_context(_process(one, log.fileno()))
        credentials = str(folder / "security" / f"{Role.OBSERVER}.json") if protected else None
        _wait_for_nodes(2, address, credentials, driver.get("SHOAL_CA_FILE"))
        yield driver


@contextlib.contextmanager
def _process(command: list[str], log: int) -> Iterator[None]:
    """Run a part of a cluster; it ends in good order, or is killed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.wait()


def _wait_for_nodes(count: int, address: str, credentials: str | None, ca_file: str | None) -> None:
    """Return when so many nodes have joined; ``TimeoutError``."""
    from shoal_core.bus import connect
    from shoal_core.bus.credentials import Credentials, TlsFiles
    from shoal_core.bus.requests import ask
    from shoal_core.protocol.errors import BusError
    from shoal_core.protocol.ids import new_service_id
    from shoal_core.protocol.messages import ListNodes, NodeList, NodeState
    from shoal_core.protocol.subjects import Role, Subjects

    async def joined() -> None:
        proof = None if credentials is None else Credentials.from_file(Path(credentials))
        tls = None if ca_file is None else TlsFiles(ca_file=ca_file)
        subject = Subjects(CLUSTER).gcs("list_nodes")
        async with (
            asyncio.timeout(START_SECONDS),
            connect(
                address,
                role=Role.OBSERVER,
                identity=new_service_id(),
                cluster=CLUSTER,
                credentials=proof,
                tls=tls,
                timeout_seconds=START_SECONDS,
            ) as bus,
        ):
            while True:
                with contextlib.suppress(BusError):
                    listed = await ask(bus, subject, ListNodes(), timeout_seconds=1.0)
                    assert isinstance(listed, NodeList)
                    if sum(node.state is NodeState.ALIVE for node in listed.nodes) == count:
                        return
                await asyncio.sleep(PAUSE_SECONDS)

    asyncio.run(joined())


def secured(row: str) -> Callable[[str, Effort], Measured]:
    """Return the program that tells how many times longer what a row does takes with TLS and authentication."""

    def program(system: str, effort: Effort) -> Measured:
        store_bytes = STORE_BYTES.get(row, USUAL_STORE_BYTES)
        with contextlib.ExitStack() as stack:
            clusters = []
            for protected in (False, True):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                stores = stack.enter_context(store_folders(2))
                clusters.append(stack.enter_context(standing(folder, protected, store_bytes, stores)))
            rates = [[_rate(row, system, effort, driver) for driver in clusters] for _ in range(effort.repetitions)]
        opened, closed = zip(*rates, strict=True)
        details = {"open": statistics.median(opened), "secured": statistics.median(closed)}
        return Measured([without / with_it for without, with_it in rates], details)

    program.__name__ = f"secured_{row}"
    program.__doc__ = f"How many times longer it takes with TLS and authentication: {row}."
    return program


def _rate(row: str, system: str, effort: Effort, driver: Mapping[str, str]) -> float:
    """Return what a fresh driver of a cluster measures."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    command = [sys.executable, "-m", "bench.program", row, "--system", system]
    command += ["--repetitions", "1", "--seconds", str(effort.seconds)]
    done = subprocess.run(command, env=own | dict(driver), stdout=subprocess.PIPE, check=True)
    [sample] = json.loads(done.stdout.splitlines()[-1])["samples"]
    return float(sample)


ROWS = ("tasks_sync", "tasks_async", "actor_sync", "put_small", "get_small", "transfer")
"""What is measured so; for each of them more is better."""
PROGRAMS = {program.__name__: program for program in map(secured, ROWS)}
