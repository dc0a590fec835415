"""Plots as SVG: lines over a grid, side by side, each with its scale. No library is needed to look at a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"]
WIDTH, HEIGHT, MARGIN = 420.0, 260.0, 56.0
COLUMNS = 2
STEPS = 4
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line of a plot; an empty name is not shown."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """Lines over one scale, which begins at zero."""

    title: str
    across: str
    series: list[Series]


def draw(plots: list[Plot]) -> str:
    """Return an SVG document with all plots."""
    rows = -(-len(plots) // COLUMNS)
    parts = [
        f'<g transform="translate({index % COLUMNS * WIDTH:g} {index // COLUMNS * HEIGHT:g})">{_plot(plot)}</g>'
        for index, plot in enumerate(plots)
    ]
    size = f'width="{COLUMNS * WIDTH:g}" height="{rows * HEIGHT:g}"'
    style = 'font-family="sans-serif" font-size="10"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'


def _plot(plot: Plot) -> str:
    points = [point for series in plot.series for point in series.points]
    most_across = max((x for x, _ in points), default=0.0) or 1.0
    most_up = max((y for _, y in points), default=0.0) or 1.0
    left, bottom = MARGIN, HEIGHT - MARGIN / 2 - 12
    width, height = WIDTH - MARGIN - 16, HEIGHT - MARGIN - 24

    def place(x: float, y: float) -> str:
        return f"{left + x / most_across * width:.1f},{bottom - y / most_up * height:.1f}"

    parts = [_text(left, 16, plot.title, "start", bold=True), _text(left + width / 2, HEIGHT - 8, plot.across)]
    for step in range(STEPS + 1):
        part = step / STEPS
        y, x = bottom - part * height, left + part * width
        parts.append(f'<path d="M{left:g} {y:.1f}h{width:g}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y + 3, f"{part * most_up:.3g}", "end"))
        parts.append(_text(x, bottom + 13, f"{part * most_across:.3g}"))
    for index, series in enumerate(plot.series):
        colour = COLOURS[index % len(COLOURS)]
        thinned = series.points[:: max(1, len(series.points) // MOST_POINTS)]
        line = " ".join(place(x, y) for x, y in thinned)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if series.name:
            parts.append(_text(left + width, 30 + 12 * index, series.name, "end", colour=colour))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "middle", *, colour: str = "#333", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'
