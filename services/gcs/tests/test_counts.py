"""What a replica of the control store counts of its own writes, and shows of all records."""

from __future__ import annotations

import pytest

from services.gcs.tests.test_actors import record
from shoal_core.protocol.actors import ActorState
from shoal_core.protocol.measures import labels
from shoal_gcs.actor_operations import ACTOR_UNSCHEDULABLE, dead, ended
from shoal_gcs.counts import Counts
from shoal_gcs.service import by_state

ALIVE, RESTARTING, DEAD = ActorState.ALIVE, ActorState.RESTARTING, ActorState.DEAD


def test_an_incarnation_that_is_followed_by_another_is_one_restart() -> None:
    counts = Counts()
    again = ended(record(ALIVE, max_restarts=1), "it crashed", 1.0)
    counts.wrote(again)
    counts.wrote(again.model_copy(update={"node_id": "n" * 16}))
    counts.wrote(record(ALIVE))
    assert (counts.actor_restarts, sum(counts.actor_deaths.values())) == (1, 0)


@pytest.mark.parametrize(
    ("cause", "end"),
    [
        ("released", dead(record(ALIVE), "nobody refers to it", 1.0, graceful=True)),
        ("raised", dead(record(ALIVE), "its __init__ raised", 1.0, error=b"pickle")),
        ("unschedulable", dead(record(), "no such node", 1.0, code=ACTOR_UNSCHEDULABLE)),
        ("died", ended(record(ALIVE), "its process was killed", 1.0)),
    ],
)
def test_deaths_are_told_by_their_cause(cause: str, end: object) -> None:
    counts = Counts()
    counts.wrote(end)  # type: ignore[arg-type]
    assert counts.actor_deaths == {**dict.fromkeys(counts.actor_deaths, 0), cause: 1}


def test_states_in_which_nothing_is_are_shown_too() -> None:
    assert by_state([ALIVE, DEAD], [ALIVE, ALIVE]) == {labels(state="ALIVE"): 2.0, labels(state="DEAD"): 0.0}
