"""Clusters of this machine: the embedded one that ``init()`` starts and ends, and the lasting one of ``shoal up``.

Both are one host process (``python -m shoal.host``) that keeps a private broker and runs the four services in one event
loop. An embedded host ends as soon as the pipe from its driver closes, however the driver ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.amounts import check_sendable
from shoal_core.bus.broker_directory import sweep as remove_brokers_of_the_dead
from shoal_core.machine import check_gpus, environment_for_copies, remove_stores
from shoal_core.protocol.errors import ClusterUnreachableError
from shoal_core.protocol.labels import check_labels
from shoal_core.protocol.resources import to_units

START_SECONDS = 30.0
STOP_SECONDS = 10.0
CLUSTER = "default"
SERVICES = ("worker", "gcs", "scheduler", "objectstore")
"""The services of a host, in the order of their ports for metrics: a program's own are on the one that it named."""
LAST_PORT = 65535
LEAST_LOG_LIMITS = {"rotation_max_bytes": 1024, "rotation_backup_count": 0, "log_bytes": 0}
SESSION_PREFIX = "shoal-"
HOST_FILE = "host.json"
"""In the folder of a cluster that ends with who has started it: what another process needs to join."""


@dataclass(frozen=True)
class HostOptions:
    """What the node of a new cluster offers; None means: what the machine has."""

    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    object_store_memory: int | None = None
    memory: int | None = None
    node_name: str | None = None
    object_store_folder: str | None = None

    @classmethod
    def of(
        cls,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        object_store_memory: int | None = None,
        memory: int | None = None,
        node_name: str | None = None,
        object_store_folder: str | None = None,
    ) -> HostOptions:
        """Check the parameters that describe a node; ``TypeError`` and ``ValueError`` name the wrong one."""
        _check_amount("num_cpus", num_cpus)
        _check_amount("num_gpus", num_gpus)
        check_gpus(num_gpus)
        _check_resources({} if resources is None else resources)
        check_labels({} if labels is None else labels)
        if node_name is not None and not isinstance(node_name, str):
            raise TypeError(f"node_name must be a str, got {type(node_name).__name__}.")
        return cls(
            num_cpus,
            num_gpus,
            dict(resources or {}),
            dict(labels or {}),
            _bytes("object_store_memory", object_store_memory),
            _bytes("memory", memory),
            node_name,
            _folder(object_store_folder),
        )


_PARAMETERS = {
    "CPU": "num_cpus",
    "GPU": "num_gpus",
    "memory": "memory",
    "object_store_memory": "object_store_memory",
}
"""The resources that have a parameter of their own."""


def _check_amount(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number that is not negative, got {value}.")
    try:
        to_units(value)
    except ValueError as error:
        raise ValueError(f"{name} is wrong: {error}.") from None


def _folder(folder: Any) -> str | None:
    """Return the whole path of the folder in which objects are to lie."""
    if folder is None:
        return None
    if not isinstance(folder, str):
        raise TypeError(f"The folder of the object store must be a str, got {type(folder).__name__}.")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"The folder of the object store must be one that this user may write to, got {folder!r}.")
    return os.path.abspath(folder)


def _bytes(name: str, value: Any) -> int | None:
    """Return a number of bytes, which may be given as a whole float such as 1e9."""
    _check_amount(name, value)
    if value is not None and (value != int(value) or value < 1):
        raise ValueError(f"{name} must be a whole number of bytes, at least 1, got {value}.")
    return None if value is None else int(value)


def _check_resources(resources: Any) -> None:
    if not isinstance(resources, Mapping):
        raise TypeError(f"resources must be a dict of names to amounts, got {type(resources).__name__}.")
    for name, amount in resources.items():
        if not isinstance(name, str):
            raise TypeError(f"resources must have names of type str, got {name!r}.")
        check_sendable("A name in resources", name)
        if name in _PARAMETERS:
            raise ValueError(f"Use {_PARAMETERS[name]} instead of {name!r} in resources.")
        if amount is None:
            raise TypeError(f"resources[{name!r}] must be a number, got None.")
        _check_amount(f"resources[{name!r}]", amount)


@dataclass(frozen=True)
class HostInfo:
    """A running host: where its broker is, which file lets one in, and where its objects lie if that was said."""

    address: str
    cluster: str
    credentials_path: str
    pid: int
    session_dir: str
    object_store_folder: str | None = None


_hosts: dict[int, subprocess.Popen[bytes]] = {}


def check_metrics_port(name: str, port: Any) -> int:
    """Return the first of the ports for metrics, 0 for none; ``TypeError`` and ``ValueError`` name the parameter."""
    if port is None:
        return 0
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"{name} must be an int, got {type(port).__name__}.")
    if not 1 <= port <= LAST_PORT - len(SERVICES) + 1:
        raise ValueError(
            f"{name} must be between 1 and {LAST_PORT - len(SERVICES) + 1}, since each of the {len(SERVICES)} services "
            f"shows its metrics on a port of its own, counted from there; got {port}."
        )
    return port


def start_host(options: HostOptions, *, lasting: bool, metrics_port: int = 0) -> HostInfo:
    """Start a host process and return when its services are ready.

    The ``SERVICES`` show their metrics on ``metrics_port`` and the ports behind it (0: nowhere). A lasting one is
    written down, to be found by ``read_current``; another, which ends with this process, to be found by ``running_at``.
    Raises ``ClusterUnreachableError`` with the end of its log if it does not come up, and ``ValueError`` for an
    environment that makes no sense.
    """
    from_environment = {"memory_threshold": _memory_threshold(), **_log_limits()}
    session_dir = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX))
    orders = {
        "session_dir": str(session_dir),
        "cluster": CLUSTER,
        "lasting": lasting,
        "options": asdict(options) | from_environment,
        "metrics_port": metrics_port,
    }
    with open(session_dir / "host.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal.host", json.dumps(orders)],
            stdin=subprocess.DEVNULL if lasting else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment_for_copies(os.environ),
            start_new_session=True,
        )
    line = _first_line(process)
    try:
        ready = json.loads(line)
        info = HostInfo(
            pid=process.pid, session_dir=str(session_dir), object_store_folder=options.object_store_folder, **ready
        )
    except (ValueError, TypeError):
        ended = process.poll()
        process.kill()
        _reap(process)
        log_end = (session_dir / "host.log").read_text(errors="replace")[-2000:]
        shutil.rmtree(session_dir, ignore_errors=True)
        how = f"within {START_SECONDS:g} s" if ended is None else f"and ended with status {ended}"
        raise ClusterUnreachableError(
            f"The cluster of this machine did not start {how}. The end of its log:\n{log_end}"
        ) from None
    if lasting:
        _write(_current_path(), info)
    else:
        _hosts[info.pid] = process
        _write(session_dir / HOST_FILE, info)
    return info


def _memory_threshold() -> float | None:
    """Return from which share of used memory on tasks are ended, as far as the environment says."""
    text = os.environ.get("SHOAL_MEMORY_THRESHOLD")
    if not text:
        return None
    try:
        threshold = float(text)
    except ValueError:
        threshold = 0.0
    if not 0 < threshold <= 1:
        raise ValueError(f"SHOAL_MEMORY_THRESHOLD must be a share of memory, above 0 and at most 1, got {text!r}.")
    return threshold


def _log_limits() -> dict[str, int]:
    """Return how much is kept of what worker processes print, as far as the environment says."""
    limits = {}
    for name, least in LEAST_LOG_LIMITS.items():
        variable = f"SHOAL_{name.upper()}"
        if not (text := os.environ.get(variable)):
            continue
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"{variable} must be a whole number, at least {least:,}, got {text!r}.")
        limits[name] = int(text)
    return limits


def running_at(address: str) -> HostInfo | None:
    """Return the cluster at an address if a process of this user on this machine has started it, and it ends with that.

    Whoever is told the address gets in without more: the credential file is this user's.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{SESSION_PREFIX}*/{HOST_FILE}"):
        if _is_ours(path) and (info := _read_running(path)) is not None and info.address == address:
            return info
    return None


def _is_ours(path: Path) -> bool:
    """Tell whether a file may be read: others can put there what is never read to its end, or leads elsewhere."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


def stop_host(info: HostInfo) -> None:
    """End a host and everything that belongs to it; returns when it is gone.

    Also what a host left behind that was killed.
    """
    process = _hosts.pop(info.pid, None)
    with contextlib.suppress(ProcessLookupError):
        os.kill(info.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and _lives(info.pid, process):
        time.sleep(0.01)
    if _lives(info.pid, process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(info.pid, signal.SIGKILL)
    if process is not None:
        _reap(process)
    if _read(_current_path()) == info:
        _current_path().unlink(missing_ok=True)
    remove_stores(info.pid, info.object_store_folder)
    remove_brokers_of_the_dead()
    _remove(Path(info.session_dir))


def _remove(folder: Path) -> None:
    """Remove a folder, into which a broker whose host was killed may still write for a moment."""
    deadline = time.monotonic() + STOP_SECONDS
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
        shutil.rmtree(folder, ignore_errors=True)


def is_running(info: HostInfo) -> bool:
    """Tell whether a host lives."""
    return _lives(info.pid, _hosts.get(info.pid))


def read_current() -> HostInfo | None:
    """Return the lasting cluster of this user on this machine, if it runs."""
    return _read_running(_current_path())


def _read_running(path: Path) -> HostInfo | None:
    info = _read(path)
    return info if info is not None and _lives(info.pid, _hosts.get(info.pid)) and _is_host(info) else None


def _read(path: Path) -> HostInfo | None:
    """Return the cluster that was written down last in a file, whether it runs or not."""
    try:
        return HostInfo(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_host(info: HostInfo) -> bool:
    """Tell whether a process that lives is the host that was written down, and not a later one that got its pid."""
    try:
        return info.session_dir.encode() in Path(f"/proc/{info.pid}/cmdline").read_bytes()
    except OSError:
        return not Path("/proc/self").exists()


def _current_path() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"shoal-{os.getuid()}" / "current.json"


def _write(path: Path, info: HostInfo) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(info)))


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    """Return the line by which a host says that it is ready; empty if it ends or takes too long."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    return process.stdout.readline() if ready else b""


def _lives(pid: int, process: subprocess.Popen[bytes] | None) -> bool:
    if process is not None:
        return process.poll() is None
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return _answers(pid)
    return state != "Z"


def _answers(pid: int) -> bool:
    if Path("/proc/self/stat").exists():
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _reap(process: subprocess.Popen[Any]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()
