"""The benchmark's own arithmetic and tables."""

from __future__ import annotations

import inspect
import json
import math
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import shoal
from bench import __main__ as bench
from bench.measuring import Effort, rate, seconds
from bench.memory import MARK, PeakMemory, marked_processes, pss_by_process
from bench.program import CLUSTER_PROGRAMS, DASK_PROGRAMS, PROGRAMS
from bench.rows import ROWS, Row, System, find_rows


def test_every_row_has_a_program_on_each_of_its_systems() -> None:
    assert {row.name for row in ROWS} == {"init", *PROGRAMS, *CLUSTER_PROGRAMS}
    with_dask = {row.name for row in ROWS if "dask" in row.systems}
    assert with_dask == {"init", *DASK_PROGRAMS}


def test_ratio_is_how_many_times_better() -> None:
    assert Row("r", "r", "1/s").ratio(shoal=30, ray=10) == 3
    assert Row("s", "s", "s", higher_is_better=False).ratio(shoal=0.5, ray=2) == 4


@pytest.mark.parametrize(
    ("row", "shoal", "ray", "passes"),
    [
        (Row("a", "a", "1/s", times_ray=3), 30.0, 10.0, True),
        (Row("a", "a", "1/s", times_ray=3), 29.0, 10.0, False),
        (Row("a", "a", "1/s", times_ray=3), 30.0, None, None),
        (Row("b", "b", "s", higher_is_better=False, limit=1.0), 0.9, None, True),
        (Row("b", "b", "s", higher_is_better=False, limit=1.0), 1.1, 20.0, False),
        (Row("c", "c", "s"), 1.1, 20.0, None),
        (Row("d", "d", "MB/s", limit=400.0), 401.0, 1000.0, True),
        (Row("d", "d", "MB/s", limit=400.0), 399.0, 1.0, False),
    ],
)
def test_bars(row: Row, shoal: float, ray: float | None, passes: bool | None) -> None:
    assert row.passes(shoal, ray) is passes


TINY: dict[str, object] = {
    "calls": 3,
    "clients": 2,
    "count": 5,
    "items": 50_000,
    "occupied_seconds": 0.01,
    "puts": 2,
    "size_bytes": 300_000,
    "streams": 3,
    "tasks": 5,
}
"""What the sizes of programs are here, by the names of their parameters."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    mark = pytest.MonkeyPatch()
    mark.setenv(MARK, "the programs of the benchmark, tiny")
    try:
        with shoal.init(num_cpus=2, log_to_driver=False):
            yield
    finally:
        mark.undo()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", [row.name for row in ROWS if row.name in PROGRAMS])
def test_every_program_runs_on_shoal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.program.wait_until_at_rest", lambda limit_seconds=0.0: None)
    program = PROGRAMS[name]
    sizes = {parameter: TINY[parameter] for parameter in [*inspect.signature(program).parameters][2:]}
    measured = program(shoal, Effort(repetitions=1, seconds=0.01), **sizes)
    assert measured.samples
    assert all(math.isfinite(value) for value in [*measured.samples, *measured.details.values()])


def test_seconds_leaves_out_the_first_call() -> None:
    calls: list[None] = []
    measured = seconds(Effort(repetitions=3, seconds=0.0), lambda: calls.append(None))
    assert (len(measured.samples), len(calls)) == (3, 4)


def test_an_unknown_row_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'tusks'.*tasks_sync"):
        find_rows(["tusks"])


def test_rate_counts_units() -> None:
    calls: list[None] = []
    measured = rate(Effort(repetitions=2, seconds=0.01), lambda: calls.append(None), units=10)
    assert len(measured.samples) == 2
    assert all(sample > 0 for sample in measured.samples)
    assert calls


def outcome(samples: list[float], error: str = "") -> bench.Outcome:
    return bench.Outcome(samples, {"import_seconds": 0.1}, error)


def test_the_comparison_is_printed_as_a_table_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[System, bench.Outcome] = {
        "shoal": outcome([20.0, 30.0, 40.0]),
        "ray": outcome([10.0]),
        "dask": outcome([], "it broke [badly]"),
    }
    monkeypatch.setattr(bench, "run_once", lambda row, system, repetitions, seconds: results[system])
    monkeypatch.setenv("COLUMNS", "160")
    app = typer.Typer()
    app.command()(bench.main)

    shown = CliRunner().invoke(app, ["tasks_sync"])
    assert shown.exit_code == 1  # something failed
    assert "3.0 x" in shown.output
    assert "it broke [badly]" in shown.output

    results["dask"] = outcome([5.0])
    parsed = json.loads(CliRunner().invoke(app, ["tasks_sync", "--format", "json"]).stdout)
    assert parsed["rows"][0]["ratio_to_ray"] == 3.0
    assert parsed["rows"][0]["passes"] is True
    assert parsed["machine"]["cpus"] == os.cpu_count()


def test_a_row_is_printed_before_the_next_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_once(row: Row, system: System, repetitions: int, seconds: float) -> bench.Outcome:
        if row.name == "put_small":
            raise KeyboardInterrupt
        return outcome([1234.0])

    monkeypatch.setattr(bench, "run_once", run_once)
    monkeypatch.setenv("COLUMNS", "160")
    app = typer.Typer()
    app.command()(bench.main)
    assert "1,234" in CliRunner().invoke(app, ["tasks_sync", "put_small"]).output


def test_a_program_that_fails_is_told_with_the_end_of_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.PYTHONS, "shoal", Path(sys.executable))
    told = bench.run_once(Row("no_such_row", "", ""), "shoal", 1, 0.01)
    assert told.samples == []
    assert "no_such_row" in told.error


def test_memory_of_marked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "no process has this mark")
    assert marked_processes("no process has this mark") == []
    own, others = pss_by_process()
    assert own > 1_000_000
    assert others == {}
    below = [sys.executable, "-c", "import subprocess, sys; subprocess.run(['sleep', '60'], env={}); sys.exit()"]
    with subprocess.Popen(below, env={MARK: "mine"}) as process:
        try:
            while len(found := marked_processes("mine")) < 2:
                assert process.poll() is None
            assert process.pid in found, "who hides his environment is found by who started him"
        finally:
            for pid in marked_processes("mine")[::-1]:
                os.kill(pid, signal.SIGKILL)


def test_peak_memory_sees_growth() -> None:
    size = 20_000_000
    with mmap.mmap(-1, size) as fresh, PeakMemory() as memory:  # the heap might give pages that were there before
        fresh.write(b"x" * size)
    assert memory.growth_bytes >= size * 0.9
