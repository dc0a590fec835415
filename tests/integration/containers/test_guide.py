"""docs/compose.md, command by command, with everything that compose.yaml names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from shoal_core.bus.broker import free_port
from tests.guides import ROOT, blocks
from tests.integration.containers.stack import docker
from tests.integration.waiting import until

pytestmark = pytest.mark.timeout(300)
PROJECT = "shoal-test-guide"


@pytest.fixture
def environment(tmp_path: Path, image: None) -> Iterator[dict[str, str]]:
    """What keeps this cluster apart from others on this machine; it is removed at the end."""
    ports = {name: str(free_port()) for name in ("SHOAL_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT", "OTLP_PORT")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    security = {"SHOAL_SECURITY": str(tmp_path / "security"), "OTEL_EXPORTER_OTLP_ENDPOINT": "", "PATH": path}
    environment = os.environ | ports | security | {"COMPOSE_PROJECT_NAME": PROJECT, "COLUMNS": "200"}
    yield environment
    docker("compose", "-f", "deploy/compose.yaml", "down", "--volumes", "--timeout", "3", environment=environment)


def test_the_guide_to_compose(environment: dict[str, str]) -> None:
    *commands, last = blocks("compose.md", "sh")
    script = "\n".join(commands).replace("deploy/security", environment["SHOAL_SECURITY"])
    script = script.replace("127.0.0.1:4222", f"127.0.0.1:{environment['SHOAL_PORT']}")
    assert "2 of 2 nodes alive" in bash(script, environment)
    until(lambda: up(environment["PROMETHEUS_PORT"]) == 8, "Prometheus scrapes two of each service", 120)
    bash(last, environment)


def up(port: str) -> float:
    """Return how many of the cluster's services Prometheus reaches."""
    query = quote('sum(up{job=~"gcs|scheduler|objectstore|worker"})')
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?query={query}", timeout=5) as answer:
            (found,) = json.load(answer)["data"]["result"] or [{"value": [0, "0"]}]
    except OSError:
        return 0
    return float(found["value"][1])


def bash(script: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_image_with_packages_of_ones_own(image: None, tmp_path: Path) -> None:
    (dockerfile,) = blocks("compose.md", "dockerfile")
    (tmp_path / "Dockerfile").write_text(dockerfile)
    docker("build", "--quiet", "--tag", "shoal-test-mine", str(tmp_path), seconds=200)
    assert docker("run", "--rm", "shoal-test-mine", "numpy.f2py", "-v").strip()
    docker("image", "rm", "shoal-test-mine")
