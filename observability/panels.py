"""What dashboards are made of: numbers and graphs, their queries, and how they become what Grafana reads."""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders.common import ReduceDataOptions, StackingConfig, VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as StatPanel
from grafana_foundation_sdk.builders.timeseries import Panel as TimePanel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WINDOW = "$__rate_interval"

STAT_SPAN, STAT_HEIGHT, SPAN, HEIGHT = 4, 4, 12, 8
"""Of a width of 24: six numbers in a row, or two graphs."""


@dataclass(frozen=True)
class Query:
    """One query of a panel; ``legend`` is a template over its labels."""

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class Number:
    """A panel that shows one number as it is now."""

    title: str
    text: str
    query: Query
    unit: str = "short"


@dataclass(frozen=True)
class Graph:
    """A panel that shows series over time."""

    title: str
    text: str
    queries: tuple[Query, ...]
    unit: str = "short"
    stacked: bool = False


@dataclass(frozen=True)
class Section:
    """A row with a title and its panels."""

    title: str
    panels: tuple[Number | Graph, ...]


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    text: str
    sections: tuple[Section, ...]


def graph(title: str, text: str, *queries: tuple[str, str], unit: str = "short", stacked: bool = False) -> Graph:
    """Describe a graph by the expressions and legends of its queries."""
    return Graph(title, text, tuple(Query(*query) for query in queries), unit, stacked)


def number(title: str, text: str, expression: str, unit: str = "short") -> Number:
    """Describe a number by its expression."""
    return Number(title, text, Query(expression), unit)


def quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """Return the queries for the median and the 95th percentile of a histogram."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    rates = f"sum by ({labels}) (rate({metric}_bucket[{WINDOW}]))"
    return tuple((f"histogram_quantile({q}, {rates})", f"p{round(q * 100)}{legend}") for q in (0.5, 0.95))


def rate(metric: str, by: str) -> tuple[str, str]:
    """Return the query for a counter's rate by one label."""
    return f"sum by ({by}) (rate({metric}[{WINDOW}]))", f"{{{{{by}}}}}"


def render(board: Board) -> str:
    """Return a dashboard as the JSON that Grafana reads."""
    builder = (
        Dashboard(board.title)
        .uid(board.uid)
        .description(board.text)
        .tags(["shoal"])
        .time("now-30m", "now")
        .refresh("10s")
        .readonly()
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for section in board.sections:
        builder.with_row(Row(section.title))
        for panel in section.panels:
            builder.with_panel(_graph(panel) if isinstance(panel, Graph) else _number(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def _query(query: Query, index: int) -> Dataquery:
    target = Dataquery().expr(query.expression).datasource(SOURCE).ref_id(chr(ord("A") + index)).range()
    return target.legend_format(query.legend) if query.legend else target


def _number(panel: Number) -> StatPanel:
    return (
        StatPanel()
        .title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .unit(panel.unit)
        .span(STAT_SPAN)
        .height(STAT_HEIGHT)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(panel.query, 0))
    )


def _graph(panel: Graph) -> TimePanel:
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    builder = (
        TimePanel()
        .title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .unit(panel.unit)
        .span(SPAN)
        .height(HEIGHT)
        .min(0)
        .fill_opacity(40 if panel.stacked else 10)
        .legend(legend)
    )
    if panel.stacked:
        builder.stacking(StackingConfig().mode(StackingMode.NORMAL))
    for index, query in enumerate(panel.queries):
        builder.with_target(_query(query, index))
    return builder
