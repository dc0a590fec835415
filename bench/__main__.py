"""``python -m bench [ROWS]``: run rows on the systems in turn and say how they compare."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from bench.memory import MARK, marked_processes
from bench.rows import ROWS, SYSTEMS, Row, System, find_rows

ROOT = Path(__file__).resolve().parent.parent
PYTHONS: dict[System, Path] = {
    "shoal": Path(sys.executable),
    "ray": ROOT / ".venv-bench" / "bin" / "python",
    "dask": ROOT / ".venv-bench" / "bin" / "python",
}
COLOURS = {True: "green", False: "red", None: "white"}


class Format(StrEnum):
    """How to print the comparison."""

    TABLE = "table"
    JSON = "json"


@dataclass
class Outcome:
    """What one system showed on one row, over all rounds."""

    samples: list[float] = field(default_factory=list)
    details: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def median(self) -> float | None:
        """The middle of the samples; ``None`` if there is none."""
        return statistics.median(self.samples) if self.samples else None


def run_once(row: Row, system: System, repetitions: int, seconds: float) -> Outcome:
    """Run a row once, in a process of its own; what it leaves behind is killed, by its mark."""
    mark = uuid.uuid4().hex
    command = [str(PYTHONS[system]), "-m", "bench.program", row.name, "--system", system]
    command += ["--repetitions", str(repetitions), "--seconds", str(seconds)]
    environment = os.environ | {MARK: mark, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=row.timeout_seconds, check=True
        )
        result = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Outcome(error=f"not done after {row.timeout_seconds:g} s")
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines() or [f"exit status {error.returncode}"]
        return Outcome(error="\n".join(lines[-15:]))
    finally:
        for pid in marked_processes(mark):
            _kill(pid)
    return Outcome(result["samples"], result["details"])


def run_row(
    row: Row, systems: list[System], repetitions: int, seconds: float, console: Console
) -> dict[System, Outcome]:
    """Run a row on each of the systems in turn, as many rounds as it asks for."""
    outcomes: dict[System, Outcome] = {system: Outcome() for system in systems}
    for number in range(row.rounds):
        for system, outcome in outcomes.items():
            with console.status(f"{row.title}: {system} ({number + 1}/{row.rounds})"):
                once = run_once(row, system, repetitions, seconds)
            outcome.samples += once.samples
            outcome.details |= once.details
            outcome.error = outcome.error or once.error
    return outcomes


def comparison(row: Row, outcomes: dict[System, Outcome]) -> dict[str, Any]:
    """Return a row's results as they are written to JSON."""
    medians = {system: outcome.median for system, outcome in outcomes.items()}
    shoal, ray = medians.get("shoal"), medians.get("ray")
    return {
        "name": row.name,
        "title": row.title,
        "unit": row.unit,
        "bar": row.bar,
        "systems": {
            system: {
                "median": outcome.median,
                "samples": outcome.samples,
                "details": outcome.details,
                "error": outcome.error,
            }
            for system, outcome in outcomes.items()
        },
        "ratio_to_ray": None if shoal is None or ray is None else row.ratio(shoal, ray),
        "passes": None if shoal is None else row.passes(shoal, ray),
    }


TITLE_WIDTH, CELL_WIDTH, UNIT_WIDTH, RATIO_WIDTH = 34, 12, 6, 12


def print_heading(systems: list[System], console: Console) -> None:
    """Print what stands above the rows."""
    cells = "".join(f"{system:>{CELL_WIDTH}}" for system in systems)
    console.print(f"[bold]{'medians':{TITLE_WIDTH}}{cells} {'':{UNIT_WIDTH}}{'Shoal / Ray':>{RATIO_WIDTH}}  bar[/]")


def print_row(row: dict[str, Any], systems: list[System], console: Console) -> None:
    """Print one row as soon as it was measured, then what else was measured with it and what failed."""
    cells = "".join(f"{_cell(row['systems'].get(system)):>{CELL_WIDTH}}" for system in systems)
    ratio = "" if row["ratio_to_ray"] is None else f"{row['ratio_to_ray']:.1f} x"
    colour = COLOURS[row["passes"]]
    console.print(
        f"{row['title']:{TITLE_WIDTH}}{cells} {row['unit']:{UNIT_WIDTH}}"
        f"[{colour}]{ratio:>{RATIO_WIDTH}}  {row['bar']}[/]",
        highlight=False,
    )
    for system, result in row["systems"].items():
        if result["details"]:
            pairs = ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in result["details"].items())
            console.print(f"[dim]  {system}: {pairs}[/]", highlight=False)
        if result["error"]:
            console.print(f"[red]  {system} failed:[/]", highlight=False)
            console.print(result["error"], markup=False, highlight=False)


def machine() -> dict[str, object]:
    """Return what the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[ROWS]", help="Rows; none means all.")] = None,
    output: Annotated[Format, typer.Option("--format", help="A table, or JSON on stdout.")] = Format.TABLE,
    systems: Annotated[str, typer.Option(help="Only these, by commas: shoal,ray,dask.")] = "",
    repetitions: Annotated[int, typer.Option(min=1, help="Samples in each process.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds for each sample.")] = 2.0,
    show: Annotated[bool, typer.Option("--list", help="List the rows and stop.")] = False,
) -> None:
    """Run rows on Shoal, Ray and Dask in turn, each in a fresh process, and say how they compare."""
    console = Console(stderr=output is Format.JSON, soft_wrap=True)
    if show:
        for row in ROWS:
            console.print(f"{row.name:20}{row.title} ({row.unit}) {row.bar}", highlight=False)
        return
    chosen = cast("list[System]", [name for name in systems.split(",") if name])
    try:
        rows = find_rows(names or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if unknown := set(chosen) - set(SYSTEMS):
        raise typer.BadParameter(f"there is no system {', '.join(sorted(unknown))}; there are: {', '.join(SYSTEMS)}")
    before = machine()
    shown = chosen or list(SYSTEMS)
    print_heading(shown, console)
    results = []
    for row in rows:
        systems_of_row = [system for system in shown if system in row.systems]
        results.append(comparison(row, run_row(row, systems_of_row, repetitions, seconds, console)))
        print_row(results[-1], shown, console)
    if output is Format.JSON:
        print(json.dumps({"machine": before, "rows": results}, indent=2, ensure_ascii=False))
    if any(result["error"] for row in results for result in row["systems"].values()):
        raise typer.Exit(1)


def _cell(result: dict[str, Any] | None) -> str:
    if result is None or (result["median"] is None and not result["error"]):
        return ""
    if result["median"] is None:
        return "failed"
    value = float(result["median"])
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself meanwhile, which is as good


if __name__ == "__main__":
    typer.run(main)
