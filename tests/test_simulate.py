"""The simulator of many schedulers among many nodes, at a size that takes a moment."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import typer
from typer.testing import CliRunner

from bench import simulate

SMALL = [
    "--nodes",
    "6",
    "--tasks",
    "240",
    "--actors",
    "12",
    "--groups",
    "6",
    "--jobs",
    "3",
    "--arrival-seconds",
    "2",
    "--seed",
    "3",
]


def test_all_work_is_done_with_any_number_of_schedulers_and_the_run_is_told_and_drawn(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(simulate.main)
    plot = tmp_path / "runs.svg"
    arguments = [*SMALL, "--schedulers", "1", "--schedulers", "3", "--format", "json", "--plot", str(plot)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    reports = json.loads(outcome.stdout)
    assert [report["schedulers"] for report in reports] == [1, 3]
    for report in reports:
        assert report["leases"] >= 12
        assert report["decisions"] >= report["leases"]
        assert 0 < report["utilisation"] <= 1
        assert report["group_wait_max"] > 0
        assert report["wait_p50"] <= report["wait_p99"] <= report["wait_max"]
    assert "seed 3" in outcome.stderr
    drawn = ET.parse(plot).getroot()
    assert len([each for each in drawn.iter() if each.tag.endswith("polyline")]) == 8


def test_a_run_is_the_same_for_the_same_seed() -> None:
    scale = simulate.Scale(nodes=3, tasks=60, actors=3, groups=2, jobs=2, arrival_seconds=1.0)
    first, second = (simulate.simulate(scale, 2, seed=5) for _ in range(2))
    assert (first.decisions, first.waits, first.samples) == (second.decisions, second.waits, second.samples)
