"""How ``shoal memory`` looks to people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from shoal.cli.tables import new_table, print_table
from shoal.memory import ClusterMemory, NodeMemory

KEY_DIGITS = 12
NODE_DIGITS = 8
"""Of the ids, so many digits are shown; ``--format json`` has all of them."""
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_memory(seen: ClusterMemory, limit: int, out: Console) -> None:
    """Print what each node's memory is used for, then the largest objects and who holds them."""
    nodes = new_table("node", "host", "used", "of", "pinned", "warm", "segments", "inline")
    for node in seen.nodes:
        nodes.add_row(*_node_cells(node))
    print_table(nodes, out)
    rows, counted = seen.rows()[:limit], seen.counted()
    if not rows:
        out.print(f"\n{counted:,} objects are known." if counted else "\nNobody holds an object.")
        return
    out.print(f"\n[bold]the largest {len(rows):,} of {counted:,} objects, as each process holds them[/]")
    objects = new_table("object", "size", "where", "status", "why", "type", "pid", "on node", texts={"why"})
    for row in rows:
        objects.add_row(*_object_cells(row))
    print_table(objects, out)


def _node_cells(node: NodeMemory) -> list[str]:
    store = node.objects.store
    inline_bytes = sum(process.inline_bytes for process in node.objects.processes)
    sizes = (store.used_bytes, store.capacity_bytes, store.pinned_bytes, store.warm_bytes)
    name = node.description.node_id, escape(node.description.hostname)
    return [*name, *map(size_text, sizes), f"{store.segments:,}", size_text(inline_bytes)]


def _object_cells(row: dict[str, Any]) -> list[str]:
    by = f"BORROWED by {row['borrowers']}"
    why = ", ".join(by if reason == "BORROWED" else reason for reason in row["reasons"])
    size = size_text(row["object_size"]) if row["object_size"] >= 0 else "?"
    # An id ends with what tells the objects of one process apart, and begins with what tells nodes apart.
    name = f"…{row['object_id'][-KEY_DIGITS:]}" if row["object_id"] else "(gone; still mapped)"
    kind, _, node = row["location"].partition(" ")
    where = f"{kind} {node[:NODE_DIGITS]}".rstrip()
    on = row["node_id"][:NODE_DIGITS]
    return [name, size, where, row["task_status"], why, row["type"], str(row["pid"]), on]


def size_text(size_bytes: int) -> str:
    """Return a size in a unit that people read."""
    for unit, name in _UNITS:
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} B"
