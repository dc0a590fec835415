"""This process's membership in a cluster: ``init``, ``shutdown``, and the runtime that everything else uses."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from shoal.cluster import HostInfo, HostOptions, check_metrics_port, read_current, running_at, start_host, stop_host
from shoal.driver import DriverOptions, driver_session
from shoal.environments import store_parts, take_parts
from shoal.jobs.submitted import submitted
from shoal.logging_config import LoggingConfig
from shoal.terms import terms_of
from shoal_core import __version__, telemetry
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.bus.tracing import ENABLED
from shoal_core.protocol.errors import ClusterUnreachableError, SystemError_
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.session import Address, Session

logger = logging.getLogger("shoal")

_IGNORED = frozenset(
    {
        "include_dashboard",
        "dashboard_host",
        "dashboard_port",
        "configure_logging",
        "logging_format",
        "storage",
        "_memory",
        "_node_ip_address",
        "_temp_dir",
        "_system_config",
    }
)
"""Parameters of Ray's ``init`` that are accepted and mean nothing here."""


class Context(Mapping[str, Any]):
    """What ``init`` returns: the cluster's addresses, as a mapping and as attributes; leaving it shuts down."""

    def __init__(self, address_info: dict[str, Any]) -> None:
        self.address_info = address_info
        self.dashboard_url = ""
        self.python_version = ".".join(map(str, sys.version_info[:3]))
        self.ray_version = __version__
        self.shoal_version = __version__
        self.ray_commit = ""

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exception: object) -> None:
        shutdown()

    def disconnect(self) -> None:
        """Shut down."""
        shutdown()

    def __repr__(self) -> str:
        return f"Context(address={self.address_info['address']!r}, node_id={self.address_info['node_id']!r})"


class _Membership:
    """The one membership of this process: the session, and the embedded cluster if it is ours."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.session: Session | None = None
        self.host: HostInfo | None = None
        self.context: Context | None = None
        self.pid = os.getpid()


_membership = _Membership()


def runtime() -> Runtime:
    """Return this process's runtime; the first use in a driver joins a cluster as ``init()`` would."""
    current = Runtime.current
    if current is None:
        with _membership.lock:
            if Runtime.current is None:
                init()
            current = Runtime.current
            assert current is not None
    return current


def is_initialized() -> bool:
    """Tell whether this process has joined a cluster."""
    return Runtime.current is not None


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
    object_store_memory: int | None = None,
    local_mode: bool = False,
    ignore_reinit_error: bool = False,
    job_config: Any = None,
    logging_level: int | str = logging.INFO,
    log_to_driver: bool = True,
    namespace: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    logging_config: LoggingConfig | None = None,
    priority: int = 0,
    weight: float = 1.0,
    quotas: Mapping[str, float] | None = None,
    _metrics_export_port: int | None = None,
    _plasma_directory: str | None = None,
    **others: Any,
) -> Context:
    """Join a cluster, or start one on this machine, and return its addresses.

    ``address``: None tries ``SHOAL_ADDRESS``, then the cluster that ``shoal up`` started, then starts one that ends
    with this process; "local" always starts one; "auto" must find one; "nats://host:port" joins that one. ``num_cpus``,
    ``num_gpus``, ``resources``, ``labels`` and ``object_store_memory`` (bytes) describe the node of a cluster that is
    started, and are an error when joining; so does ``_plasma_directory``, the folder in which its objects lie, which is
    in shared memory by default. ``namespace`` is where the job's actors are named. ``runtime_env`` is
    what worker processes are to have (see ``shoal.runtime_env``). ``job_config`` (a ``JobConfig``) says both in one
    object; what is said here comes first. ``logging_config`` is how all processes of the job write log lines. Programs
    with a higher ``priority`` go first, those of the same one share the cluster by ``weight``, and this one never holds
    more than its ``quotas``, such as ``{"CPU": 8}`` (docs/scheduling.md). A cluster that is started shows metrics of
    its four services on ``_metrics_export_port`` and the three ports behind it, on 127.0.0.1, or else none.

    Raises ``RuntimeError`` if this process has joined already (unless ``ignore_reinit_error``) or for an unknown
    parameter, ``ValueError`` or ``TypeError`` for a wrong one, ``RuntimeEnvSetupError`` for an environment that cannot
    be packed or stored, ``ClusterUnreachableError``, ``AuthenticationError``, ``JetStreamUnavailableError`` and
    ``VersionMismatchError`` (all ``ConnectionError``) when there is no joining.
    """
    unknown = [name for name in others if name not in _IGNORED]
    if unknown:
        raise RuntimeError(f"Unknown keyword argument(s) to init(): {', '.join(sorted(unknown))}.")
    if local_mode:
        raise ValueError("local_mode is not supported; start a cluster of this machine with init(num_cpus=1) instead.")
    with _membership.lock:
        if Runtime.current is not None:
            if ignore_reinit_error and _membership.context is not None:
                logger.info("init() was called again and is ignored.")
                return _membership.context
            raise RuntimeError(
                "This process has joined a cluster already. Perhaps init() was called twice by accident? Call "
                "shutdown() first, or pass ignore_reinit_error=True."
            )
        _membership.pid = os.getpid()
        options = HostOptions.of(
            num_cpus, num_gpus, resources, labels, object_store_memory, object_store_folder=_plasma_directory
        )
        metrics_port = check_metrics_port("_metrics_export_port", _metrics_export_port)
        terms = terms_of(priority, weight, quotas)
        part_of = submitted(address)
        driver = DriverOptions.of(
            namespace, runtime_env, job_config, log_to_driver, logging_level, logging_config, terms, part_of
        )
        with contextlib.ExitStack() as undo:
            where = _find(address, options, metrics_port, undo)
            session = undo.enter_context(driver_session(where, driver))
            store_parts(session.runtime, session.runtime.job, driver.environment.fields, driver.environment.exports)
            if part_of is not None:
                take_parts(session.runtime, part_of.job_id, driver.environment)
            undo.pop_all()
        _membership.session = session
        current = session.runtime
        if ENABLED:
            telemetry.set_up("driver", current.local, where.cluster, {"shoal.job.id": current.job})
        _membership.context = Context(
            {
                "address": where.address,
                "gcs_address": where.address,
                "node_id": current.node,
                "webui_url": "",
                "namespace": current.namespace,
                "session_dir": _membership.host.session_dir if _membership.host else "",
            }
        )
        return _membership.context


def shutdown(*, wait_for_processes: bool = True) -> None:
    """Leave the cluster, and end it if this process started it; does nothing if it has not joined.

    References of before are worthless afterwards; ``init`` may be called again.
    """
    if _membership.pid != os.getpid():
        return  # a child made by a fork: the cluster is its parent's
    with _membership.lock:
        session, _membership.session = _membership.session, None
        host, _membership.host = _membership.host, None
        _membership.context = None
        try:
            if session is not None:
                session.runtime.send_spans()
                session.__exit__(None, None, None)
        finally:
            if host is not None:
                stop_host(host)


def _find(address: str | None, options: HostOptions, metrics_port: int, undo: contextlib.ExitStack) -> Address:
    """Return where to join; starts a cluster if that is what was asked for."""
    where = find_cluster(address)
    if where is None:
        host = start_host(options, lasting=False, metrics_port=metrics_port)
        _membership.host = host
        undo.callback(_abandon, host)
        return Address(host.address, host.cluster, Credentials.from_file(host.credentials_path))
    if options != HostOptions():
        raise ValueError(
            "num_cpus, num_gpus, resources, labels, object_store_memory and _plasma_directory describe a cluster that "
            f"init() starts; they cannot be given when joining the running one at {where.address}."
        )
    return where


def find_cluster(address: str | None) -> Address | None:
    """Return the running cluster that an address means, as in ``init``; None where one would be started."""
    if address is None or address in ("", "auto"):
        address = os.environ.get("SHOAL_ADDRESS") or address or None
    if address is None or address == "auto":
        lasting = read_current()
        if lasting is not None:
            return _running(lasting)
        if address == "auto":
            raise ClusterUnreachableError(
                "init(address='auto') found no running cluster on this machine. Start one with `shoal up`, or set "
                "SHOAL_ADDRESS, or call init() without an address to start one that ends with this process."
            )
    if address is None or address == "local":
        return None
    if "://" not in address:
        address = f"nats://{address}"
    if (own := running_at(address)) is not None:
        return _running(own)
    return Address(address, os.environ.get("SHOAL_CLUSTER", "default"), _credentials(), _tls())


def _abandon(host: HostInfo) -> None:
    _membership.host = None
    stop_host(host)


def _running(host: HostInfo) -> Address:
    return Address(host.address, host.cluster, Credentials.from_file(host.credentials_path), _tls())


def _tls() -> TlsFiles | None:
    authority = os.environ.get("SHOAL_CA_FILE")
    return TlsFiles(ca_file=authority) if authority else None


def _credentials() -> Credentials | None:
    if path := os.environ.get("SHOAL_CREDENTIALS"):
        return Credentials.from_file(path)
    if token := os.environ.get("SHOAL_TOKEN"):
        return Credentials(token=token)
    return None


def _leave() -> None:
    """Leave at the end of the program. A daemon thread that still waits ends with it, and need not say so."""
    complain = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, SystemError_) else complain(args)
    shutdown()


atexit.register(_leave)
