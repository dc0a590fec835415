"""How ``shoal status`` looks to people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from shoal.cli.tables import new_table, print_table
from shoal.status import ClusterStatus, NodeStatus
from shoal_core.bus.credentials import redacted
from shoal_core.protocol.messages import NodeState
from shoal_core.protocol.resources import MEMORY, OBJECT_STORE_MEMORY, from_units, to_amounts

_BYTES = {MEMORY, OBJECT_STORE_MEMORY}


def print_status(seen: ClusterStatus, out: Console) -> None:
    """Print the nodes, what is used of their resources, and what waits."""
    alive = len(seen.alive())
    out.print(
        f"Cluster [bold]{seen.cluster}[/] at {redacted(seen.address)}: {alive} of {len(seen.nodes)} nodes alive\n"
    )
    nodes = new_table("node", "host", "state", "CPU", "other", "processes", texts={"state", "other"})
    for node in seen.nodes:
        nodes.add_row(*_node_cells(node))
    print_table(nodes, out)
    out.print("\n[bold]used/total[/]")
    for name, (used, total) in seen.totals().items():
        out.print(f"  {escape(name):24}{_share(name, used, total)}")
    if not seen.pending:
        out.print("\nNothing waits.")
        return
    out.print("\n[bold]waiting[/]")
    waiting = new_table("tasks", "function", "each needs", "since", "why", texts={"each needs", "why"})
    for item in seen.pending:
        needs = ", ".join(f"{name} {_amount(name, amount)}" for name, amount in to_amounts(item.resources).items())
        why = escape(item.why) if item.feasible else f"[red]{escape(item.why)}[/]"
        waiting.add_row(f"{item.wanted:,}", escape(item.name), needs or "nothing", f"{item.waiting_seconds:.0f} s", why)
    print_table(waiting, out)


def _node_cells(node: NodeStatus) -> list[str]:
    description = node.record.description
    if node.record.state is NodeState.DEAD:
        return [
            description.node_id,
            description.hostname,
            f"[red]DEAD[/] {escape(node.record.death_reason)}",
            "",
            "",
            "",
        ]
    if node.announcement is None or node.used is None:
        return [description.node_id, description.hostname, "[yellow]silent[/]", "", "", ""]
    used, total = node.used, node.announcement.total
    state = "[yellow]draining[/]" if node.announcement.draining else "[green]ALIVE[/]"
    cells = {name: _share(name, from_units(used.get(name, 0)), from_units(units)) for name, units in total.items()}
    cpu = cells.pop("CPU", "")
    others = ", ".join(f"{name} {cell}" for name, cell in sorted(cells.items()) if not name.startswith("node:"))
    processes = str(node.announcement.worker_processes)
    return [description.node_id, description.hostname, state, cpu, others, processes]


def _share(name: str, used: float, total: float) -> str:
    """Return how much of a resource is used, and its unit once."""
    return f"{used / 2**30:.1f}/{total / 2**30:.1f} GiB" if name in _BYTES else f"{used:g}/{total:g}"


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if name in _BYTES else f"{amount:g}"
