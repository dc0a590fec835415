"""Tables for people: as wide as they have to be, so that ids and numbers can be read and copied whole."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

MOST_COLUMNS = 10_000


def new_table(*headers: str, texts: Collection[str] = ()) -> Table:
    """Return a table without lines; of its columns only ``texts`` give way where there is not enough room."""
    table = Table(box=None, header_style="bold")
    for header in headers:
        table.add_column(header, no_wrap=header not in texts, overflow="fold")
    return table


def print_table(table: Table, out: Console) -> None:
    """Print a table. Where it cannot be as narrow as the terminal its lines are longer, and nothing is cut off."""
    options = out.options.update(max_width=MOST_COLUMNS)
    for column in table.columns:
        cells = [Measurement.get(out, options, out.render_str(str(cell))) for cell in (column.header, *column.cells)]
        column.min_width = max(cell.maximum if column.no_wrap else cell.minimum for cell in cells)
    needed = Measurement.get(out, options, table)
    table.width = min(needed.maximum, max(out.width, needed.minimum))
    out.print(table, crop=False, soft_wrap=True)
