"""What proves to a broker who we are, and to us who the broker is."""

from __future__ import annotations

import json
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WAYS = ({"user", "password"}, {"token"}, {"creds_file"})
"""Of each of these sets of fields one is enough."""


@dataclass(frozen=True)
class Credentials:
    """A user and password, a token, or a NATS ``.creds`` file; they never show in ``repr``."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    creds_file: str | None = None

    def to_json(self) -> dict[str, str]:
        """Return the fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Credentials:
        """Return the credentials that ``to_json`` described."""
        return cls(**fields)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Credentials:
        """Read credentials: a JSON object with this class's fields, or a NATS ``.creds`` file.

        Raises ``OSError``, and ``ValueError`` naming the file where it is neither.
        """
        text = Path(path).read_text()
        if "BEGIN NATS USER JWT" in text:
            return cls(creds_file=os.fspath(path))
        try:
            credentials = cls.from_json(json.loads(text))
        except (ValueError, TypeError) as error:
            raise _no_credentials(path) from error
        if not credentials.is_complete():
            raise _no_credentials(path)
        return credentials

    def is_complete(self) -> bool:
        """Tell whether everything is there that one of the ways to prove oneself needs."""
        given = self.to_json()
        if not all(isinstance(value, str) and value for value in given.values()):
            return False
        return any(way <= given.keys() for way in WAYS)

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the credentials as JSON to a file that only this user can read."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)
            json.dump(self.to_json(), file)


def _no_credentials(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"{os.fspath(path)} holds no credentials: expected a JSON object with "
        "user and password, or token, or a NATS .creds file"
    )


@dataclass(frozen=True)
class TlsFiles:
    """PEM files for TLS: who signed the broker's certificate, and our own certificate and key, if it wants one."""

    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None

    def context(self) -> ssl.SSLContext:
        """Return the settings of a connection that verifies the broker's certificate and name."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.certificate_file is not None:
            context.load_cert_chain(self.certificate_file, self.key_file)
        return context


def is_mistrust(error: BaseException) -> bool:
    """Tell whether a handshake failed since one side does not trust the other, and so fails until files are changed.

    The broker says so by an alert, which with TLS 1.3 comes with the first bytes that are read.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return True
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    return "_ALERT_" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason)


MISTRUST_ADVICE = (
    "Check SHOAL_CA_FILE or the ca_file given (who signed the broker's certificate), whether the host in the address "
    "is one that the certificate names, and whether a certificate has expired or was rotated"
)


def redacted(address: str) -> str:
    """Return an address without the user, password or token in it, fit for messages and logs."""
    return ",".join(_redacted_one(part.strip()) for part in address.split(","))


def _redacted_one(address: str) -> str:
    parts = urlsplit(address if "://" in address else f"nats://{address}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
