"""Draws what panels show as one picture: ``python -m observability.picture http://127.0.0.1:9090 out.svg``.

The data are a Prometheus' own, of the last minutes; the panels are those of ``PANELS``.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from xml.sax.saxutils import escape

from observability.dashboards import BOARDS
from observability.live import Series, filled_in, query_range
from observability.panels import Graph

PANELS = (
    "Tasks by outcome",
    "Time to run",
    "Resources in use",
    "Decisions",
    "Busy",
    "Bytes by tier",
    "Transfers",
    "There and back",
)
COLUMNS, WIDTH, HEIGHT = 2, 480, 190
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 30, 42
POINTS = 60
MOST_SERIES = 5
MOST_CHARACTERS = 12
COLOURS = ("#3b7dd8", "#d9822b", "#2e9f6b", "#b0413e", "#7d5bbe")
UNITS = {"s": "s", "ops": "/s", "percentunit": "", "Bps": "B/s", "bytes": "B"}
STYLE = "text{font:11px sans-serif;fill:#444}.t{font-weight:bold;font-size:13px;fill:#222}"


def draw(address: str, seconds: float) -> str:
    """Return the picture of the last ``seconds`` as SVG."""
    end = time.time()
    graphs = [panel for board in BOARDS for part in board.sections for panel in part.panels if isinstance(panel, Graph)]
    chosen = [next(graph for graph in graphs if graph.title == title) for title in PANELS]
    rows = -(-len(chosen) // COLUMNS)
    parts = [_panel(graph, _read(graph, address, end - seconds, end), end - seconds, end) for graph in chosen]
    placed = [
        f'<g transform="translate({WIDTH * (index % COLUMNS)},{HEIGHT * (index // COLUMNS)})">{part}</g>'
        for index, part in enumerate(parts)
    ]
    size = f'width="{WIDTH * COLUMNS}" height="{HEIGHT * rows}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style><rect {size} fill="#fff"/>'
    return "\n".join([head, *placed, "</svg>"]) + "\n"


def _read(graph: Graph, address: str, begin: float, end: float) -> list[tuple[str, Series]]:
    """Return the series of a graph with their legends."""
    found = []
    for query in graph.queries:
        for series in query_range(address, filled_in(query.expression), begin, end, (end - begin) / POINTS):
            points = [point for point in series.points if point[1] == point[1]]
            legend = _filled(query.legend, series.labels)
            found.append((legend, Series(series.labels, points)))
    return [pair for pair in found if pair[1].points][:MOST_SERIES]


def _filled(legend: str, labels: dict[str, str]) -> str:
    """Return a legend with the values of its labels."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


def _panel(graph: Graph, found: list[tuple[str, Series]], begin: float, end: float) -> str:
    """Return one graph: a title, two axes, a line for each series, a legend."""
    top = max((value for _, series in found for _, value in series.points), default=0.0) or 1.0
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    base = TOP + high
    parts = [f'<text class="t" x="{LEFT}" y="18">{escape(graph.title)}</text>']
    for part in (0.0, 0.5, 1.0):
        y = base - part * high
        label = _short(part * top, graph.unit)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{wide}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for index, (legend, series) in enumerate(found):
        colour = COLOURS[index % len(COLOURS)]
        line = " ".join(
            f"{LEFT + wide * (at - begin) / (end - begin):.1f},{base - high * value / top:.1f}"
            for at, value in series.points
        )
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        x = LEFT + index * wide / MOST_SERIES
        parts.append(f'<rect x="{x:.1f}" y="{base + 16}" width="8" height="8" fill="{colour}"/>')
        parts.append(
            f'<text x="{x + 11:.1f}" y="{base + 24}">{escape(_without_ports(legend)[:MOST_CHARACTERS])}</text>'
        )
    return "".join(parts)


def _without_ports(legend: str) -> str:
    """Return a legend with instances told by the last digits of their ports, since lines are narrow."""
    return re.sub(r"[\w.]+:\d*(\d\d)\b", r":\1", legend)


def _short(value: float, unit: str) -> str:
    """Return a number as people write it at an axis."""
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s" and value < 1:
        return f"{value * 1000:.2g} ms"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}{UNITS.get(unit, '')}"
    return f"{value:.3g} {UNITS.get(unit, '')}".strip()


def main() -> None:
    """Draw the last minutes of a Prometheus."""
    parser = argparse.ArgumentParser(description="Draw what the dashboards show of the last minutes, as SVG.")
    parser.add_argument("address", help="the Prometheus: http://host:port")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--seconds", type=float, default=300.0, help="how much of the past")
    told = parser.parse_args()
    told.out.write_text(draw(told.address, told.seconds))


if __name__ == "__main__":
    main()
