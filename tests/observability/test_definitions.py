"""Dashboards, rules and documentation agree with the metrics that there are in code; no Prometheus is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from observability.dashboards import BOARDS, FOLDER, queries
from observability.metrics_page import PAGE
from observability.metrics_page import render as render_page
from observability.panels import Board, render
from shoal_core.protocol.measures import Kind
from shoal_core.protocol.metrics import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "observability" / "prometheus"


def groups(name: str) -> list[dict[str, Any]]:
    """Return the rules of a file."""
    read = yaml.safe_load((PROMETHEUS / "rules" / name).read_text())
    return [rule for group in read["groups"] for rule in group["rules"]]


RECORDED = {rule["record"]: rule["expr"] for rule in groups("recording.yml")}
ALERTS = {rule["alert"]: rule for rule in groups("alerts.yml")}
EXPRESSIONS = [*queries(), *RECORDED.items(), *((name, rule["expr"]) for name, rule in ALERTS.items())]


def base_name(name: str) -> str:
    """Return the metric that a series belongs to."""
    for suffix in ("_bucket", "_count", "_sum"):
        metric = CATALOGUE.get(name.removesuffix(suffix))
        if name.endswith(suffix) and metric is not None and metric.kind is Kind.HISTOGRAM:
            return metric.name
    return name


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_whatever_is_queried_is_counted_or_recorded(where: str, expression: str) -> None:
    for name in re.findall(r"\bshoal_[a-z_]+", expression):
        assert base_name(name) in CATALOGUE, f"{where} asks for {name}"
    for name in re.findall(r"\bshoal:[a-z_:0-9]+", expression):
        assert name in RECORDED, f"{where} asks for {name}"


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_a_label_that_is_matched_is_one_of_the_metrics(where: str, expression: str) -> None:
    for name, matchers in re.findall(r"\b(shoal_[a-z_]+)\{([^}]*)\}", expression):
        matched = set(re.findall(r"([a-z_]+)\s*[=!]", matchers))
        assert matched <= {*CATALOGUE[base_name(name)].labels, "le", "job", "instance"}, f"{where}: {name}"


def test_a_histograms_bucket_that_is_asked_for_is_there() -> None:
    for where, expression in EXPRESSIONS:
        for name, bound in re.findall(r'\b(shoal_[a-z_]+)_bucket\{le="([^"]+)"\}', expression):
            assert float(bound) in CATALOGUE[name].bounds, where


@pytest.mark.parametrize("metric", CATALOGUE)
def test_a_metric_is_on_a_dashboard_or_in_a_rule(metric: str) -> None:
    assert any(metric in map(base_name, re.findall(r"shoal_[a-z_]+", text)) for _, text in EXPRESSIONS), metric


def test_what_is_recorded_is_used() -> None:
    used = {name for _, text in EXPRESSIONS for name in re.findall(r"\bshoal:[a-z_:0-9]+", text)}
    assert set(RECORDED) == used


@pytest.mark.parametrize("board", BOARDS, ids=[board.uid for board in BOARDS])
def test_dashboards_are_what_the_code_builds(board: Board) -> None:
    assert (FOLDER / f"{board.uid}.json").read_text() == render(board), "run: python -m observability.dashboards"


def test_there_are_no_other_dashboards_and_each_panel_has_its_place() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {board.uid for board in BOARDS}
    for board in BOARDS:
        panels = json.loads((FOLDER / f"{board.uid}.json").read_text())["panels"]
        placed = [panel["gridPos"] for panel in panels if panel["type"] != "row"]
        assert len(placed) == sum(len(section.panels) for section in board.sections)
        assert all(place["x"] + place["w"] <= 24 for place in placed)
        assert all(panel["description"] for panel in panels if panel["type"] != "row")


def test_every_metric_is_documented() -> None:
    page = PAGE.read_text()
    assert page == render_page(page), "run: python -m observability.metrics_page"


def test_every_alert_has_a_test_and_a_line_in_the_runbook() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules" / "tests" / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for one in tests for case in one["alert_rule_test"] if case["exp_alerts"]}
    quiet = {case["alertname"] for one in tests for case in one["alert_rule_test"] if not case["exp_alerts"]}
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert headings == list(ALERTS)
    assert fired == quiet == set(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_all_ways_to_find_services_use_the_same_rules_and_jobs() -> None:
    read = {
        name: yaml.safe_load((PROMETHEUS / f"{name}.yml").read_text())
        for name in ("prometheus", "laptop", "kubernetes")
    }
    assert len({json.dumps(one["rule_files"]) for one in read.values()}) == 1
    for name in ("prometheus", "laptop"):
        assert [job["job_name"] for job in read[name]["scrape_configs"]] == [
            "gcs",
            "scheduler",
            "objectstore",
            "worker",
        ]


def test_what_the_collectors_pipelines_name_is_configured() -> None:
    collector = yaml.safe_load((ROOT / "observability" / "otel-collector" / "config.yaml").read_text())
    for pipeline in collector["service"]["pipelines"].values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) <= set(collector[part])
    tempo = yaml.safe_load((ROOT / "observability" / "tempo" / "tempo.yaml").read_text())
    listens = tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    assert collector["exporters"]["otlp/tempo"]["endpoint"] == f"tempo:{listens}"
    sources = yaml.safe_load((ROOT / "observability/grafana/provisioning/datasources/datasources.yaml").read_text())[
        "datasources"
    ]
    assert f"http://tempo:{tempo['server']['http_listen_port']}" in [source["url"] for source in sources]
