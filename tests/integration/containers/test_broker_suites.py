"""The suites of the bus, the key-value buckets and the durable tier, against the broker that compose names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.containers.container_broker import image
from tests.integration.containers.stack import ROOT, docker

SUITES = (
    "sdk/core/tests/bus/test_bus.py",
    "sdk/core/tests/bus/test_key_value.py",
    "services/objectstore/tests/test_durable_objects.py",
)


@pytest.mark.timeout(300)
def test_the_suites_pass_against_the_broker_of_compose() -> None:
    plugin = ("-p", "tests.integration.containers.container_broker", "-o", "timeout=150")
    # One implementation on one event loop, as in production: `make test` has all of them on the embedded broker.
    chosen = ("-k", "fast and (uvloop or durable)")
    command = [sys.executable, "-m", "pytest", "-q", *plugin, *chosen, *SUITES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        docker(
            "ps", "--quiet", "--all", "--filter", f"ancestor={image()}", "--filter", "label=org.testcontainers"
        ).split()
        == []
    )
