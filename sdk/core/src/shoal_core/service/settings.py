"""What a service is told when it starts: from flags, else from the environment (``SHOAL_…``), else the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shoal_core.bus.connection import servers_in
from shoal_core.bus.credentials import Credentials, TlsFiles

S = TypeVar("S", bound="ServiceSettings")


class SettingsError(Exception):
    """The settings are wrong; the text names each one, its flag and its variable."""


class ServiceSettings(BaseModel):
    """What every service is told. Flags are the names with dashes: ``--http-port``; variables: ``SHOAL_HTTP_PORT``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = Field(default="nats://127.0.0.1:4222", description="The broker: nats://host:port[,nats://…].")
    cluster: str = Field(default="default", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="The cluster's name.")
    credentials: str | None = Field(default=None, description="A file: JSON with user and password, or .creds.")
    token: str | None = Field(default=None, repr=False, description="A token for the broker.")
    ca_file: str | None = Field(default=None, description="PEM file of who signed the broker's certificate.")
    certificate_file: str | None = Field(default=None, description="PEM file of our certificate, if it wants one.")
    key_file: str | None = Field(default=None, description="PEM file of our certificate's key.")
    identity: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Drawn anew by default.")
    connect_seconds: float = Field(default=30.0, gt=0, description="How long to try to reach the broker at the start.")
    replicas: int = Field(default=1, ge=1, le=5, description="Copies of what JetStream keeps (1, 3 or 5).")
    http_host: str = Field(default="127.0.0.1", description="Where health and metrics are served.")
    http_port: int = Field(default=0, ge=0, le=65535, description="Port of health and metrics; 0: off.")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        servers_in(address)
        return address

    def proof(self) -> Credentials | None:
        """Return what proves us to the broker; ``SettingsError`` if the file cannot be read."""
        if self.credentials is not None:
            try:
                return Credentials.from_file(self.credentials)
            except (OSError, ValueError) as error:
                raise SettingsError(f"--credentials: {error}") from error
        return Credentials(token=self.token) if self.token is not None else None

    def tls(self) -> TlsFiles | None:
        """Return the files for TLS; None where none is named."""
        if self.ca_file is None and self.certificate_file is None:
            return None
        return TlsFiles(self.ca_file, self.certificate_file, self.key_file)


def read_settings(model: type[S], program: str, arguments: Sequence[str]) -> S:
    """Read settings from flags and the environment; raises ``SettingsError``. ``--help`` prints and exits."""
    from pydantic_settings import BaseSettings, SettingsConfigDict
    from pydantic_settings import SettingsError as SourceError

    configuration = SettingsConfigDict(
        env_prefix="SHOAL_",
        cli_prog_name=program,
        cli_kebab_case=True,
        cli_parse_args=list(arguments),
        cli_exit_on_error=False,
        extra="ignore",
    )
    sourced: Any = type(
        model.__name__, (model, BaseSettings), {"model_config": configuration, "__doc__": model.__doc__}
    )
    try:
        return model.model_validate(sourced().model_dump())
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(problem) for problem in error.errors())) from None
    except SourceError as error:
        raise SettingsError(str(error)) from None


def _explain(problem: Any) -> str:
    """Say what is wrong with which setting."""
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    flag, variable = f"--{name.replace('_', '-')}", f"SHOAL_{name.upper()}"
    if problem["type"] == "value_error":  # of a check of ours, which says what it was given, without its secrets
        return f"{flag} (or {variable}): {problem['ctx']['error']}"
    return f"{flag} (or {variable}): {problem['msg']}, got {problem['input']!r}"
