"""One compose project for all tests of a module: built and started from the committed files, gone at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import shoal
from shoal.security import SecurityFolder
from shoal_core.bus.broker import free_port
from shoal_core.protocol.subjects import Role
from tests.integration.containers.stack import ROOT, Stack, docker


@pytest.fixture(scope="session")
def image() -> None:
    """Build the image from the committed Dockerfile."""
    docker("build", "--quiet", "--file", "deploy/Dockerfile", "--tag", "shoal:latest", str(ROOT), seconds=300)


@pytest.fixture(scope="module")
def stack(image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = SecurityFolder.create(tmp_path_factory.mktemp("compose") / "security", "default")
    stack = Stack("shoal-test", folder.path, free_port())
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


@pytest.fixture
def joined(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """Join the cluster as a driver of this machine: one port, and one credential file."""
    monkeypatch.setenv("SHOAL_ADDRESS", f"nats://127.0.0.1:{stack.port}")
    monkeypatch.setenv("SHOAL_CREDENTIALS", str(stack.security / f"{Role.PROCESS}.json"))
    with shoal.init():
        yield stack
