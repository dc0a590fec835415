"""What lets the parts of a cluster in, and nobody else: a folder of files made by ``shoal security init``.

==========================  ============================================================================
file                        what for
==========================  ============================================================================
``broker.conf``             what nats-server needs to know: a user for each role, permissions, JetStream
``<role>.json``             the credential of a role; drivers and worker processes need ``process.json``
``ca.pem``                  who signed the broker's certificate; everybody may have it
``ca-key.pem``              signs new certificates; only ``shoal security`` reads it
``broker.pem``              the broker's certificate, also for what several brokers say to each other
``broker-key.pem``          its key
``kubernetes.json``         all of this as Secrets, for ``kubectl apply``; only its owner can read it
``security.json``           the cluster's name and the broker's names, for the next ``rotate``
==========================  ============================================================================

The folder can be entered by its owner only. The files in it can be read by everyone who gets that far, except
``ca-key.pem`` and ``kubernetes.json``: containers are given single files, and run as another user than its owner.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal_core.bus.credentials import Credentials
from shoal_core.bus.server_configuration import lasting_configuration
from shoal_core.protocol.subjects import Role

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

USUAL_HOSTS = ("localhost", "127.0.0.1", "::1", "nats", "*.nats-peers")
"""How a broker is reached on its own machine, in compose and Kubernetes, and by other brokers in Kubernetes."""
AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365
CLUSTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


@dataclass(frozen=True)
class SecurityFolder:
    """The folder of one cluster's secrets."""

    path: Path

    @classmethod
    def create(cls, path: Path, cluster: str, hosts: Sequence[str] = ()) -> SecurityFolder:
        """Make everything new; ``hosts`` are the broker's names and addresses beside ``USUAL_HOSTS``.

        ``ValueError`` for a wrong name, and for a folder with files in it.
        """
        if CLUSTER_NAME.fullmatch(cluster) is None:
            raise ValueError(f"a cluster's name has up to 64 letters, digits, '-' and '_', got {cluster!r}")
        names = list(dict.fromkeys([*USUAL_HOSTS, *hosts]))
        for name in names:
            _check_host(name)
        if path.exists() and any(path.iterdir()):
            raise ValueError(
                f"{path} is not empty, and files that a running cluster may use are not replaced; name another folder, "
                f"or renew what is in this one: shoal security rotate {path}"
            )
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        folder = cls(path)
        _write(path / "security.json", json.dumps({"cluster": cluster, "hosts": names}, indent=2) + "\n")
        folder._renew_authority()
        folder._renew_certificate()
        folder._renew_passwords(Role)
        folder._write_secrets()
        return folder

    @classmethod
    def open(cls, path: Path) -> SecurityFolder:
        """Return a folder that ``create`` made; ``ValueError`` where there is none."""
        folder = cls(path)
        folder._read_names()
        return folder

    def credentials(self, role: Role) -> Path:
        """Return where the credential of a role lies."""
        return self.path / f"{role}.json"

    def rotate(self, roles: Iterable[Role]) -> None:
        """Draw new passwords for these roles, and make a new certificate; the broker has to read both files again."""
        self._renew_certificate()
        self._renew_passwords(roles)
        self._write_secrets()

    def _renew_passwords(self, roles: Iterable[Role]) -> None:
        for role in roles:
            proof = Credentials(user=role, password=secrets.token_urlsafe(24))
            _write(self.credentials(role), json.dumps(proof.to_json()) + "\n")
        known = {role: Credentials.from_file(self.credentials(role)) for role in Role}
        _write(self.path / "broker.conf", lasting_configuration(self._read_names()[0], known))

    def _renew_certificate(self) -> None:
        """Make the broker a new key and certificate, signed by the authority that is there, good for a year."""
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from cryptography.x509.oid import ExtendedKeyUsageOID

        hosts = self._read_names()[1]
        authority = x509.load_pem_x509_certificate((self.path / "ca.pem").read_bytes())
        authority_key: EllipticCurvePrivateKey = load_pem_private_key(  # type: ignore[assignment]
            (self.path / "ca-key.pem").read_bytes(), None
        )
        key = _new_key()
        # Brokers of one cluster are each other's clients, too.
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _certificate("shoal broker", authority.subject, key, CERTIFICATE_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )
        _write_pair(builder, authority_key, key, self.path / "broker.pem", self.path / "broker-key.pem", 0o644)

    def _write_secrets(self) -> None:
        """Write what each pod mounts as a Secret of its own."""
        files = {
            "shoal-broker": {name: name for name in ("broker.conf", "broker.pem", "broker-key.pem", "ca.pem")},
            "shoal-gcs": {"credentials.json": "gcs.json", "ca.pem": "ca.pem"},
            "shoal-scheduler": {"credentials.json": "scheduler.json", "ca.pem": "ca.pem"},
            "shoal-objectstore": {"credentials.json": "objectstore.json", "ca.pem": "ca.pem"},
            "shoal-worker": {"credentials.json": "node.json", "process.json": "process.json", "ca.pem": "ca.pem"},
        }
        pods = [
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": name},
                "stringData": {key: (self.path / source).read_text() for key, source in mounted.items()},
            }
            for name, mounted in files.items()
        ]
        listed = {"apiVersion": "v1", "kind": "List", "items": pods}
        _write(self.path / "kubernetes.json", json.dumps(listed, indent=2) + "\n", 0o600)

    def _renew_authority(self) -> None:
        from cryptography import x509

        key = _new_key()
        name = _name("shoal authority")
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = (
            _certificate("shoal authority", name, key, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        _write_pair(builder, key, key, self.path / "ca.pem", self.path / "ca-key.pem", 0o600)

    def _read_names(self) -> tuple[str, list[str]]:
        """Return the name of the cluster and those of the broker."""
        try:
            told = json.loads((self.path / "security.json").read_text())
            return str(told["cluster"]), [str(host) for host in told["hosts"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} was not made by `shoal security init`, or its security.json is damaged: {error}"
            ) from None


def _check_host(name: str) -> None:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if HOST_NAME.fullmatch(name) is None:
            raise ValueError(f"a broker's host is a DNS name, *.name or an IP address, got {name!r}") from None


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(common: str, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    """Return a certificate that is good from now on (a little before, for clocks that are behind)."""
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _write_pair(
    builder: x509.CertificateBuilder,
    signer: EllipticCurvePrivateKey,
    key: EllipticCurvePrivateKey,
    certificate_path: Path,
    key_path: Path,
    key_mode: int,
) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(key_path, private.decode(), key_mode)
    _write(certificate_path, builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM).decode())


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file in place: a container that was given this one file sees what is new in it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "w") as file:
        os.fchmod(descriptor, mode)
        file.write(text)
