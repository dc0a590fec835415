"""What `shoal security` writes: a real broker runs on it, lets in who is meant, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli import app
from shoal.security import SecurityFolder
from shoal_core.bus import connect
from shoal_core.bus.broker import find_server, free_port
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.bus.interface import Bus
from shoal_core.protocol.errors import AuthenticationError, ConnectionFailedError
from shoal_core.protocol.subjects import Role
from tests.integration.waiting import until

run = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "security"
    answer = run.invoke(app, ["security", "init", str(path), "--cluster", "c", "--host", "broker.example.org"])
    assert answer.exit_code == 0, answer.output
    return path


@contextlib.contextmanager
def broker(folder: Path, tls: bool) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run nats-server with these files, as compose and Kubernetes do."""
    port = free_port()
    command = [find_server(), "--config", str(folder / "broker.conf"), "--addr", "127.0.0.1", "--port", str(port)]
    command += ["--store_dir", str(folder.parent / "store"), "--log", str(folder.parent / "broker.log")]
    if tls:
        command += ["--tls", "--tlscert", str(folder / "broker.pem"), "--tlskey", str(folder / "broker-key.pem")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield port, process
    finally:
        process.kill()
        process.wait()


def join(
    port: int, proof: Credentials, role: Role = Role.PROCESS, tls: TlsFiles | None = None, seconds: float = 10
) -> contextlib.AbstractAsyncContextManager[Bus]:
    scheme = "nats" if tls is None else "tls"
    address = f"{scheme}://127.0.0.1:{port}"
    return connect(address, role=role, identity=role, cluster="c", credentials=proof, tls=tls, timeout_seconds=seconds)


def test_who_is_refused_over_tls_leaves_no_connection(folder: Path) -> None:
    async def join_once(port: int) -> None:
        with pytest.raises(AuthenticationError):
            async with join(port, Credentials(user="gcs", password="guessed"), Role.GCS, tls):
                pass

    tls = TlsFiles(ca_file=str(folder / "ca.pem"))
    with broker(folder, tls=True) as (port, _):
        for _ in range(30):
            asyncio.run(join_once(port))
            gc.collect()  # what nobody has closed warns now, and warnings are errors


async def test_every_role_joins_with_its_file_over_tls(folder: Path) -> None:
    made = SecurityFolder.open(folder)
    tls = TlsFiles(ca_file=str(folder / "ca.pem"))
    with broker(folder, tls=True) as (port, _):
        for role in Role:
            async with join(port, Credentials.from_file(made.credentials(role)), role, tls) as bus:
                assert bus.connected
        with pytest.raises(AuthenticationError):
            async with join(port, Credentials(user="gcs", password="guessed"), Role.GCS, tls):
                pass
        with pytest.raises(ConnectionFailedError):  # an authority of someone else's signed nothing of ours
            async with join(port, Credentials.from_file(made.credentials(Role.GCS)), tls=TlsFiles(), seconds=0.5):
                pass


async def test_a_rotated_password_counts_when_the_broker_has_read_it(folder: Path) -> None:
    made = SecurityFolder.open(folder)
    old = {role: Credentials.from_file(made.credentials(role)) for role in (Role.GCS, Role.PROCESS)}
    certificate = (folder / "broker.pem").read_bytes()
    with broker(folder, tls=False) as (port, process):
        async with join(port, old[Role.PROCESS]) as bus:
            assert bus.connected
        assert run.invoke(app, ["security", "rotate", str(folder), "--role", "process"]).exit_code == 0
        assert Credentials.from_file(made.credentials(Role.GCS)) == old[Role.GCS]
        assert (folder / "broker.pem").read_bytes() != certificate
        process.send_signal(signal.SIGHUP)
        log = folder.parent / "broker.log"
        until(lambda: "Reloaded server configuration" in log.read_text(), "the broker has read its new configuration")
        with pytest.raises(AuthenticationError):
            async with join(port, old[Role.PROCESS]):
                pass
        for role, proof in (
            (Role.GCS, old[Role.GCS]),
            (Role.PROCESS, Credentials.from_file(made.credentials(Role.PROCESS))),
        ):
            async with join(port, proof, role) as bus:
                assert bus.connected


def test_only_the_owner_gets_to_the_files_and_at_the_authority(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("ca-key.pem", "kubernetes.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert {path.name for path in folder.iterdir()} == {
        *("broker.conf", "broker.pem", "broker-key.pem", "ca.pem", "ca-key.pem", "security.json", "kubernetes.json"),
        *(f"{role}.json" for role in Role),
    }


def test_the_certificate_names_the_brokers_hosts(folder: Path) -> None:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate((folder / "broker.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "nats", "*.nats-peers", "broker.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


def test_what_a_cluster_may_use_is_not_replaced(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    answer = run.invoke(app, ["security", "init", str(folder)])
    assert answer.exit_code == 2
    assert "shoal security rotate" in answer.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("flags", [["--cluster", "no spaces"], ["--host", "http://broker"], ["--host", "a,b"]])
def test_a_wrong_name_is_an_error_and_leaves_nothing(tmp_path: Path, flags: list[str]) -> None:
    assert run.invoke(app, ["security", "init", str(tmp_path / "s"), *flags]).exit_code == 2
    assert not (tmp_path / "s").exists()


def test_a_folder_of_something_else_is_not_rotated(tmp_path: Path) -> None:
    answer = run.invoke(app, ["security", "rotate", str(tmp_path)])
    assert answer.exit_code == 2
    assert "shoal security init" in answer.output
