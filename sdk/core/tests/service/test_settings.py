"""Settings: flags over the environment over the defaults."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from shoal_core.service.settings import ServiceSettings, SettingsError, read_settings

Read = Callable[..., "Wider"]


class Wider(ServiceSettings):
    """What a service of its own is told besides."""

    cpus: float | None = Field(default=None, description="How many CPUs to offer.")
    labels: dict[str, str] = Field(default={}, description="Labels of the node.")
    is_head: bool = False


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)

    def read(*arguments: str, **environment: str) -> Wider:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return read_settings(Wider, "shoal-test", arguments)

    return read


def test_without_anything_there_are_the_defaults(read: Read) -> None:
    assert read() == Wider()
    assert type(read()) is Wider
    assert read().address == "nats://127.0.0.1:4222"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("address", "nats://a:1,nats://b:2", "nats://a:1,nats://b:2"),
        ("cluster", "prod-1", "prod-1"),
        ("http_port", "8080", 8080),
        ("connect_seconds", "2.5", 2.5),
        ("log_level", "debug", "debug"),
        ("replicas", "3", 3),
        ("token", "s3cret", "s3cret"),
        ("cpus", "1.5", 1.5),
        ("labels", '{"zone":"a"}', {"zone": "a"}),
    ],
)
def test_a_setting_comes_by_its_flag_and_by_its_variable(read: Read, name: str, text: str, value: Any) -> None:
    flag = f"--{name.replace('_', '-')}"
    assert getattr(read(flag, text), name) == value
    assert getattr(read(f"{flag}={text}"), name) == value
    assert getattr(read(**{f"SHOAL_{name.upper()}": text}), name) == value


def test_a_flag_wins_over_the_environment(read: Read) -> None:
    settings = read("--cluster", "flag", SHOAL_CLUSTER="variable", SHOAL_HTTP_PORT="8080")
    assert (settings.cluster, settings.http_port) == ("flag", 8080)


def test_variables_of_others_are_ignored(read: Read) -> None:
    assert read(SHOAL_TRACING="1", SHOAL_SOMETHING="else", CLUSTER="not ours") == Wider()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("http_port", "many", "valid integer"),
        ("http_port", "70000", "less than or equal to 65535"),
        ("cluster", "two words", "pattern"),
        ("log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("connect_seconds", "0", "greater than 0"),
        ("replicas", "6", "less than or equal to 5"),
        ("identity", "a.b", "pattern"),
    ],
)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_wrong_setting_is_named_by_flag_and_variable(read: Read, name: str, text: str, says: str, by: str) -> None:
    flag, variable = f"--{name.replace('_', '-')}", f"SHOAL_{name.upper()}"
    with pytest.raises(SettingsError) as error:
        read(flag, text) if by == "flag" else read(**{variable: text})
    assert f"{flag} (or {variable}): " in str(error.value)
    assert says in str(error.value)
    assert repr(text) in str(error.value)


def test_an_address_of_another_kind_is_refused_without_its_password(read: Read) -> None:
    with pytest.raises(SettingsError, match=r"--address \(or SHOAL_ADDRESS\): http://host is no address") as error:
        read("--address", "nats://one,http://user:secret@host")
    assert "secret" not in str(error.value)


def test_all_that_is_wrong_is_named_at_once(read: Read) -> None:
    with pytest.raises(SettingsError, match=r"--replicas .*; --http-port |--http-port .*; --replicas "):
        read("--http-port", "x", SHOAL_REPLICAS="0")


@pytest.mark.parametrize("arguments", [["--no-such-flag", "1"], ["--htp-port=1"], ["stray"]])
def test_an_unknown_argument_is_refused_by_name(read: Read, arguments: list[str]) -> None:
    with pytest.raises(SettingsError, match=arguments[0].partition("=")[0]):
        read(*arguments)


def test_help_names_every_flag_with_its_meaning_and_ends(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "shoal-test" in text
    for name, field in Wider.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        if field.description:
            assert field.description.split(":")[0] in text


def test_settings_do_not_change_and_hide_the_token(read: Read) -> None:
    settings = read("--token", "s3cret")
    assert "s3cret" not in repr(settings)
    with pytest.raises(ValidationError):
        settings.cluster = "other"


def test_the_proof_is_the_file_or_the_token_or_none(read: Read, tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    file.write_text(json.dumps({"user": "gcs", "password": "p"}))
    assert read().proof() is None
    by_token = read("--token", "t").proof()
    assert by_token is not None
    assert by_token.token == "t"
    by_file = read("--credentials", str(file), "--token", "t").proof()
    assert by_file is not None
    assert (by_file.user, by_file.password) == ("gcs", "p")


@pytest.mark.parametrize("text", [None, "not json", "[]"])
def test_a_credentials_file_that_cannot_be_read_is_named(read: Read, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "credentials.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError, match=r"--credentials: .*credentials\.json"):
        read("--credentials", str(file)).proof()


def test_tls_is_on_where_a_file_is_named(read: Read) -> None:
    assert read().tls() is None
    files = read("--ca-file", "ca.pem", "--certificate-file", "c.pem", "--key-file", "k.pem").tls()
    assert files is not None
    assert [files.ca_file, files.certificate_file, files.key_file] == ["ca.pem", "c.pem", "k.pem"]
