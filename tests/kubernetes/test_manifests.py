"""deploy/k8s, rendered by kubectl: right by the schemas, right by policy, and what the docs promise of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("local", "production", "gpu")
SERVICES = {"gcs", "scheduler", "objectstore", "worker"}

NOT_HERE = ("CKV_K8S_15", "CKV_K8S_43")
"""Images by digest, and pulled always: the image is built by who uses it, and has no digest before."""
WITHOUT_SCHEMA = {"ScaledObject"}
"""KEDA's own kind; kubernetes-validate knows what is built in."""


@cache
def rendered(overlay: str) -> str:
    command = ["kubectl", "kustomize", str(ROOT / "deploy/k8s/overlays" / overlay)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def objects(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(rendered(overlay)) if not kinds or one["kind"] in kinds]


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """Return the templates of pods by the names of what makes them."""
    made = objects(overlay, "Deployment", "StatefulSet")
    return {one["metadata"]["name"]: one["spec"]["template"] for one in made}


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LOG_LEVEL": "ERROR"})


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_schemas_hold(overlay: str, tmp_path: Path) -> None:
    known = [one for one in objects(overlay) if one["kind"] not in WITHOUT_SCHEMA]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(known))
    done = tool("kubernetes-validate", "--strict", "--quiet", str(tmp_path / "all.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN" not in done.stdout + done.stderr


def test_the_policies_hold(overlay: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(rendered(overlay))
    flags = ["--framework", "kubernetes", "--compact", "--quiet", "--skip-check", ",".join(NOT_HERE)]
    done = tool("checkov", "--file", str(tmp_path / "all.yaml"), *flags)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_pod_is_restricted(overlay: str) -> None:
    for name, template in pods(overlay).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"], name
            assert not context["allowPrivilegeEscalation"], name
            assert context["capabilities"] == {"drop": ["ALL"]}, name


def test_no_service_lives_or_dies_with_the_broker(overlay: str) -> None:
    for name, template in pods(overlay).items():
        (container,) = template["spec"]["containers"]
        if name != "nats":
            assert container["livenessProbe"]["httpGet"]["path"] == "/healthz", name
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz", name


def test_workers_drain_before_they_end(overlay: str) -> None:
    workers = {name: template["spec"] for name, template in pods(overlay).items() if name.startswith("worker")}
    assert len(workers) == (2 if overlay == "gpu" else 1)
    for name, spec in workers.items():
        (container,) = spec["containers"]
        *command, deadline = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["shoal", "drain", "--deadline"], name
        assert spec["terminationGracePeriodSeconds"] >= int(deadline) + 30, name
        (memory,) = [one for one in spec["volumes"] if one["name"] == "shared-memory"]
        assert memory["emptyDir"]["medium"] == "Memory"


def test_every_pod_is_in_one_disruption_budget(overlay: str) -> None:
    budgets = [one["spec"]["selector"]["matchLabels"] for one in objects(overlay, "PodDisruptionBudget")]
    for name, template in pods(overlay).items():
        labels = template["metadata"]["labels"].items()
        assert len([selector for selector in budgets if selector.items() <= labels]) == 1, name


def test_what_is_selected_is_there(overlay: str) -> None:
    templates = [template["metadata"]["labels"].items() for template in pods(overlay).values()]
    for one in objects(overlay, "Service"):
        assert any(one["spec"]["selector"].items() <= labels for labels in templates), one["metadata"]["name"]
    named = {(one["kind"], one["metadata"]["name"]) for one in objects(overlay)}
    for one in objects(overlay, "HorizontalPodAutoscaler", "ScaledObject"):
        assert ("Deployment", one["spec"]["scaleTargetRef"]["name"]) in named


def test_nothing_may_speak_that_is_not_allowed_to(overlay: str) -> None:
    (deny,) = [one for one in objects(overlay, "NetworkPolicy") if one["metadata"]["name"] == "deny-by-default"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for one in objects(overlay, "NetworkPolicy"):
        for rule in [*one["spec"].get("ingress", []), *one["spec"].get("egress", [])]:
            assert rule["ports"], "every allowance names its ports"
            assert rule.get("from", rule.get("to")), "and its peers"


def test_brokers_and_what_they_keep_are_replicated_alike() -> None:
    for overlay, count in (("local", 1), ("production", 3), ("gpu", 3)):
        (broker,) = objects(overlay, "StatefulSet")
        assert broker["spec"]["replicas"] == count
        (settings,) = [one for one in objects(overlay, "ConfigMap") if "SHOAL_REPLICAS" in one["data"]]
        assert settings["data"]["SHOAL_REPLICAS"] == str(count)


def test_a_metric_by_which_workers_are_scaled_is_one_of_the_catalogue() -> None:
    catalogue = (ROOT / "sdk/core/src/shoal_core/protocol/metrics.py").read_text()
    queries = [one["spec"]["triggers"][0]["metadata"]["query"] for one in objects("gpu", "ScaledObject")]
    assert len(queries) == 2
    for name in {name for query in queries for name in re.findall(r"shoal_(\w+)", query)}:
        assert f'"{name}"' in catalogue


def test_the_gpu_pool_asks_for_gpus_and_is_scaled_by_them() -> None:
    (container,) = pods("gpu")["worker-gpu"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    scaled = {one["metadata"]["name"]: one["spec"]["triggers"][0]["metadata"] for one in objects("gpu", "ScaledObject")}
    assert 'resource="GPU"' in scaled["worker-gpu"]["query"]
    assert 'resource="CPU"' in scaled["worker"]["query"]


def test_images_are_those_of_compose_and_of_this_version(overlay: str) -> None:
    (version,) = re.findall(r'__version__ = "(.+)"', (ROOT / "sdk/core/src/shoal_core/__init__.py").read_text())
    (broker,) = re.findall(r"image: (nats:\S+)", (ROOT / "deploy/compose.yaml").read_text())
    images = {template["spec"]["containers"][0]["image"] for template in pods(overlay).values()}
    assert images == {f"shoal:{version}", broker}
