"""The cluster of deploy/compose.yaml, as the committed files describe it, for the tests that run it and hurt it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.waiting import until

ROOT = Path(__file__).resolve().parents[3]
SERVICES = ("nats", "gcs", "scheduler", "objectstore", "worker")
"""What of the file can run here: images of the others cannot be had without a registry."""


def docker(*arguments: str, seconds: float = 120, environment: dict[str, str] | None = None) -> str:
    """Run docker to its end and return what it printed."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=seconds, env=environment, check=False
    )
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


class Stack:
    """One compose project."""

    def __init__(self, project: str, security: Path, port: int, *overlays: str) -> None:
        self.project = project
        self.security = security
        self.port = port
        files = ["compose.yaml", *(f"compose.{overlay}.yaml" for overlay in overlays)]
        self._flags = ["--project-name", project, *(part for file in files for part in ("-f", f"deploy/{file}"))]
        self._environment = os.environ | {
            "SHOAL_SECURITY": str(security),
            "SHOAL_PORT": str(port),
            "SHOAL_SHM_SIZE": "512mb",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "",
        }

    def compose(self, *arguments: str) -> str:
        """Run one command of compose on this project."""
        flags = [*self._flags, "--project-directory", str(ROOT / "deploy")]
        return docker("compose", *flags, *arguments, environment=self._environment)

    def up(self, *, workers: int = 2) -> None:
        """Make the cluster whole; returns when everything is ready."""
        self.compose("up", "--detach", "--wait", "--no-build", "--scale", f"worker={workers}", *SERVICES)

    def down(self) -> None:
        """End the cluster, and remove what it kept."""
        self.compose("down", "--volumes", "--timeout", "3", "--remove-orphans")

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's containers that run."""
        return self.compose("ps", "--quiet", "--status", "running", service).split()

    def inspect(self, container: str) -> Any:
        """Return what the engine knows of a container."""
        return json.loads(docker("inspect", container))[0]

    def logs(self) -> str:
        """Return the newest lines of all containers, for whoever reads why a test failed."""
        return self.compose("logs", "--no-color", "--tail", "30")

    @contextmanager
    def hurt(self, fault: str, container: str) -> Iterator[None]:
        """Kill, pause or cut off a container for as long as the block runs; then it is made whole again."""
        network = f"{self.project}_default"
        aliases = self.inspect(container)["NetworkSettings"]["Networks"][network]["Aliases"]
        named = [part for alias in aliases for part in ("--alias", alias)]
        begin, end = {
            "killed": (["kill", container], ["start", container]),
            "paused": (["pause", container], ["unpause", container]),
            "cut off": (
                ["network", "disconnect", network, container],
                ["network", "connect", *named, network, container],
            ),
        }[fault]
        docker(*begin)
        try:
            yield
        finally:
            docker(*end)
        until(lambda: self.inspect(container)["State"]["Health"]["Status"] == "healthy", "it is whole again")
