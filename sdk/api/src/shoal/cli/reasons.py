"""How ``shoal why`` looks to people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from shoal.reasons import Reasons, about_actor, task_words, words
from shoal_core.protocol.resources import to_amounts
from shoal_core.protocol.scheduling import PendingDemand


def print_reasons(reasons: Reasons, out: Console) -> None:
    """Print them, the longest-waiting first."""
    if not reasons.are_known:
        out.print(f"Nothing that is called {escape(reasons.about)} waits.")
        return
    if reasons.task is not None:
        out.print(f"[bold]Task {escape(reasons.task.name or reasons.about)}[/]")
        for sentence in task_words(reasons.task):
            out.print(f"  {escape(sentence)}")
    elif reasons.silence:
        out.print(f"The task's owner cannot be asked ({escape(reasons.silence)}). This is all that waits of it:")
    for actor in reasons.actors:
        out.print(escape(about_actor(actor)))
    for item in reasons.pending:
        out.print(f"[bold]{escape(_headline(item))}[/]")
        for sentence in words(item):
            out.print(f"  {escape(sentence)}")
    if reasons.count > len(reasons.pending):
        out.print(f"{reasons.count - len(reasons.pending)} more wait, for less long.")


def _headline(item: PendingDemand) -> str:
    """Return what waits, how long and for what."""
    amounts = to_amounts(item.resources).items()
    needs = ", ".join(f"{name} {amount:g}" for name, amount in amounts) or "no resources"
    many = "" if item.actor is not None or item.group else f"{item.wanted} × "
    where = f"job {item.job_id}, owner {item.owner}"
    return f"{many}{item.name} ({where}): waits {item.waiting_seconds:.0f} s for {needs}"
