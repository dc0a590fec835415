"""What one replica of the control store has recorded: the ends and the new beginnings that it wrote itself.

The records themselves are every replica's; these are not, so that sums over replicas are right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal_core.protocol.actors import ActorRecord, ActorState
from shoal_gcs.actor_operations import ACTOR_UNSCHEDULABLE


@dataclass(slots=True)
class Counts:
    """Numbers since this replica began, ends by their cause."""

    actor_restarts: int = 0
    actor_deaths: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("released", "raised", "unschedulable", "died"), 0)
    )
    node_deaths: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("left", "silent"), 0))

    def wrote(self, record: ActorRecord) -> None:
        """This replica has changed the record of an actor."""
        if record.state is ActorState.DEAD:
            self.actor_deaths[_cause(record)] += 1
        elif record.state is ActorState.RESTARTING and record.node_id is None:
            self.actor_restarts += 1


def _cause(record: ActorRecord) -> str:
    if record.graceful:
        return "released"
    if record.death is not None and record.death.code == ACTOR_UNSCHEDULABLE:
        return "unschedulable"
    return "raised" if record.death is not None and record.death.error else "died"
