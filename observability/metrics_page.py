"""The table of ``docs/metrics.md``, made from the catalogue: ``python -m observability.metrics_page`` writes it."""

from __future__ import annotations

from pathlib import Path

from shoal_core.protocol.measures import Kind, Metric
from shoal_core.protocol.metrics import ALL, CATALOGUE, SCHEDULER

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
BEGIN, END = "<!-- the catalogue begins -->\n", "<!-- the catalogue ends -->\n"
HEAD = ("| metric | kind | labels | meaning |", "|---|---|---|---|")
TITLES = {ALL: "Every service", ("gcs",): "`gcs`", (SCHEDULER,): "`scheduler`", ("worker",): "`worker`"}


def render(page: str) -> str:
    """Return the page with its table as it is to be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_tables()}\n{END}{after}"


def _tables() -> str:
    by_services: dict[tuple[str, ...], list[Metric]] = {}
    for metric in CATALOGUE.values():
        by_services.setdefault(metric.services, []).append(metric)
    parts = []
    for services, metrics in by_services.items():
        title = TITLES.get(services, " and ".join(f"`{service}`" for service in services))
        rows = [f"| `{m.name}` | {m.kind} | {_labels(m)} | {m.text} |" for m in metrics]
        parts.append(
            "\n".join([f"### {title}", "", "| metric | kind | labels | meaning |", "|---|---|---|---|", *rows])
        )
    bounds = {metric.bounds: None for metric in CATALOGUE.values() if metric.kind is Kind.HISTOGRAM}
    texts = [", ".join(f"{bound:g}" for bound in one) for one in bounds]
    long = ", ".join(f"`{m.name}`" for m in CATALOGUE.values() if m.bounds == list(bounds)[1])
    parts.append(f"Buckets of histograms end at {texts[0]} seconds; those of {long} at {texts[1]}.")
    return "\n\n".join(parts) + "\n"


def _labels(metric: Metric) -> str:
    return ", ".join(f"`{label}`" for label in metric.labels)


def main() -> None:
    """Write the table."""
    PAGE.write_text(render(PAGE.read_text()))


if __name__ == "__main__":
    main()
