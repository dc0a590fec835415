"""Every query of every panel and alert returns data from a Prometheus that scrapes a cluster at work.

The cluster is an embedded one with a second node, whose GPUs a library of Python plays. Where there is no Prometheus
(Debian's package ``prometheus`` has it, with ``promtool``) these tests are skipped.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import shoal
from observability import live
from observability.dashboards import queries
from observability.picture import draw
from shoal.cluster import SERVICES
from shoal_core.bus.broker import free_port
from tests.integration.waiting import first_of_free_ports, until
from tests.observability.test_definitions import ALERTS, PROMETHEUS, RECORDED, ROOT
from tests.observability.workload import under_load

RULES = PROMETHEUS / "rules"
STORE_BYTES = 80_000_000
MOST_SECONDS = 60.0
STARTING = 503

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="NO PROMETHEUS HERE: no rule was tested and no query was run. Install Debian's package prometheus.",
)
pytestmark = needs_prometheus


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_well_formed_and_do_what_their_tests_say() -> None:
    promtool("check", "rules", RULES / "recording.yml", RULES / "alerts.yml")
    promtool("test", "rules", *sorted((RULES / "tests").glob("*_test.yml")))


@pytest.mark.parametrize("name", ["prometheus", "laptop", "kubernetes"])
def test_configurations_are_well_formed(name: str, tmp_path: Path) -> None:
    read = yaml.safe_load((PROMETHEUS / f"{name}.yml").read_text())
    for job in read["scrape_configs"]:
        if job.pop("kubernetes_sd_configs", None):  # Debian's Prometheus is built without it
            job["static_configs"] = [{"targets": ["127.0.0.1:1"]}]
    read["rule_files"] = [str(PROMETHEUS / path) for path in read["rule_files"]]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(read))
    promtool("check", "config", path)


# ------------------------------------------------------------------------------- a cluster that is watched


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the block runs."""
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def gpu_node(context: shoal.Context, port: int, log: Path) -> Iterator[None]:
    """Run a node with GPUs beside an embedded cluster."""
    session = Path(context["session_dir"])
    flags = {
        "address": context["address"],
        "credentials": session / "node.json",
        "process-credentials": session / "process.json",
        "http-port": port,
        "num-cpus": 2,
        "object-store-memory": STORE_BYTES,
    }
    command = [sys.executable, "-m", "tests.observability.gpu_node"]
    with running([*command, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))], log):
        until(lambda: len([n for n in shoal.nodes() if n["Alive"]]) == 2, "the node with GPUs has joined")
        yield


def configuration(ports: dict[str, list[int]]) -> dict[str, Any]:
    """Return that of one machine, with other ports, and much more eager."""
    read = yaml.safe_load((PROMETHEUS / "laptop.yml").read_text())
    read["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    read["rule_files"] = [str(PROMETHEUS / path) for path in read["rule_files"]]
    for job in read["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports[job["job_name"]]]}]
    return dict(read)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[str]:
    """Start a cluster, a Prometheus that scrapes it, and work; return the address of the Prometheus."""
    first, second, own = first_of_free_ports(len(SERVICES)), free_port(), free_port()
    ports = {service: [first + offset] for offset, service in enumerate(SERVICES)}
    ports["worker"].append(second)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration(ports)))
    flags = {
        "config.file": tmp_path / "prometheus.yml",
        "storage.tsdb.path": tmp_path / "data",
        "web.listen-address": f"127.0.0.1:{own}",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in flags.items())]
    described: dict[str, Any] = {"num_cpus": 2, "resources": {"head": 1}, "object_store_memory": STORE_BYTES}
    with (
        shoal.init("local", _metrics_export_port=first, log_to_driver=False, **described) as context,
        gpu_node(context, second, tmp_path / "node.log"),
        running(command, tmp_path / "prometheus.log") as prometheus,
        under_load(tmp_path),
    ):
        yield f"http://127.0.0.1:{own}"
        assert prometheus.poll() is None, (tmp_path / "prometheus.log").read_text()


def unanswered(address: str, wanted: dict[str, str]) -> dict[str, str]:
    """Return the queries that return nothing, or what is no number."""
    missing = {}
    for where, expression in wanted.items():
        try:
            if not live.has_data(live.query(address, expression)):
                missing[where] = expression
        except urllib.error.HTTPError as error:
            with error:
                if error.code != STARTING:
                    raise AssertionError(f"{where}: {expression}: {error.read().decode()}") from None
            missing[where] = expression
        except OSError:  # it does not listen yet
            missing[where] = expression
    return missing


@pytest.mark.timeout(150)
def test_every_query_of_every_panel_and_alert_returns_data(watched: str) -> None:
    """One test for all that needs a cluster that is watched, since starting one takes long."""
    wanted = {f"{where} #{index}": live.filled_in(text) for index, (where, text) in enumerate(queries())}
    wanted |= {name: name for name in RECORDED}
    for name, rule in ALERTS.items():
        wanted |= {f"{name} #{index}": part for index, part in enumerate(live.measured(rule["expr"]))}
    deadline = time.monotonic() + MOST_SECONDS
    while wanted := unanswered(watched, wanted):
        assert time.monotonic() < deadline, wanted
        time.sleep(0.5)
    until(lambda: all(rule["health"] == "ok" for rule in live.rules(watched)), "every rule is evaluated")
    until(lambda: live.has_data(live.query(watched, 'steps_total{kind="step"}')), "the workload's own counter is there")
    drawn = list(ElementTree.fromstring(draw(watched, seconds=60.0)).iter())
    assert any(element.text == "Tasks by outcome" for element in drawn)
    assert any(element.tag.endswith("polyline") for element in drawn)
