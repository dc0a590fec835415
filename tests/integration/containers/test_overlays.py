"""The files that are laid over deploy/compose.yaml: TLS and development run, the one for GPUs is read."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import shoal
from shoal.security import SecurityFolder
from shoal_core.bus.broker import free_port
from shoal_core.protocol.subjects import Role
from tests.integration.containers.stack import Stack
from tests.integration.waiting import get

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def security(tmp_path_factory: pytest.TempPathFactory) -> SecurityFolder:
    return SecurityFolder.create(tmp_path_factory.mktemp("overlays") / "security", "default")


@pytest.fixture(scope="module")
def encrypted(image: None, security: SecurityFolder) -> Iterator[Stack]:
    stack = Stack("shoal-test-tls", security.path, free_port(), "tls", "dev")
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


def test_a_driver_joins_over_tls_and_services_run_the_checkout(
    encrypted: Stack, security: SecurityFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    @shoal.remote
    def where() -> str:
        import shoal_core

        return str(shoal_core.__file__)

    monkeypatch.setenv("SHOAL_ADDRESS", f"tls://127.0.0.1:{encrypted.port}")
    monkeypatch.setenv("SHOAL_CREDENTIALS", str(security.credentials(Role.PROCESS)))
    monkeypatch.setenv("SHOAL_CA_FILE", str(security.path / "ca.pem"))
    with shoal.init():
        assert get(where.remote()) == "/src/sdk/core/src/shoal_core/__init__.py"
    assert "TLS required" in encrypted.compose("logs", "nats")


def test_the_overlay_for_gpus_reserves_them_for_one_worker(security: SecurityFolder) -> None:
    stack = Stack("shoal-test-gpu", security.path, 4222, "gpu")
    worker = json.loads(stack.compose("config", "--format", "json"))["services"]["worker"]
    assert worker["deploy"]["replicas"] == 1
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
