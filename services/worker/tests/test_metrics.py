"""What a node shows of itself."""

from __future__ import annotations

from services.worker.tests.workers.test_workforce import JOB, NODE, ONE_CPU, OTHER, OWNER, up
from shoal_core.protocol.ids import SlotId
from shoal_core.protocol.measures import labels
from shoal_core.protocol.resources import UNIT, subtract
from shoal_worker.leases import LeaseTable
from shoal_worker.metrics import by_lease_state, by_resource, bytes_by_tier, objects_by_tier
from shoal_worker.objects.segments import SegmentTable
from shoal_worker.workers.processes import ProcessTable


def test_resources_are_shown_by_name_but_for_those_that_stand_for_a_node() -> None:
    total = {"CPU": 4 * UNIT, "node:10.0.0.1": UNIT}
    used = subtract(total, {"CPU": UNIT, "node:10.0.0.1": UNIT})
    assert by_resource(total, total) == {labels(resource="CPU"): 4.0}
    assert by_resource(total, used) == {labels(resource="CPU"): 3.0}
    assert by_resource(total, {}) == {labels(resource="CPU"): 0.0}


def test_leases_are_shown_by_what_they_do() -> None:
    table = LeaseTable({"CPU": 3 * UNIT})
    first, second, _ = (table.grant(OWNER, JOB, 0, SlotId(slot), ONE_CPU) for slot in (1, 2, 3))
    assert first is not None
    assert second is not None
    first.process, second.process = OWNER, OTHER
    table.block(second)
    assert by_lease_state(table) == {
        labels(state="starting"): 1.0,
        labels(state="running"): 1.0,
        labels(state="blocked"): 1.0,
    }


def test_ends_of_processes_are_told_apart() -> None:
    table = ProcessTable(NODE, 0)
    killed, left, died = up(table), up(table), up(table)
    table.kill(killed, "on purpose", 1.0)
    table.remove(killed.process_id, 2.0, in_order=True)
    table.remove(left.process_id, 2.0, in_order=True)
    table.remove(died.process_id, 2.0)
    assert (table.started, table.ended_by_cause) == (3, {"killed": 1, "left": 1, "died": 1, "out_of_memory": 0})


def test_objects_are_shown_where_they_lie() -> None:
    segments = SegmentTable(10_000_000, 0)
    assert (
        objects_by_tier(segments)
        == bytes_by_tier(segments)
        == {
            labels(tier="memory"): 0.0,
            labels(tier="copy"): 0.0,
            labels(tier="spilled"): 0.0,
        }
    )
    mine = segments.allocate(OWNER, 1000, JOB)
    copy = segments.allocate(OWNER, 500, JOB, is_copy=True)
    assert mine is not None
    assert copy is not None
    assert sum(objects_by_tier(segments).values()) == 0, "their files are not there yet"
    for segment in (mine, copy):
        segments.created(segment.name)
    assert objects_by_tier(segments)[labels(tier="memory")] == 1
    assert bytes_by_tier(segments)[labels(tier="memory")] == 1000
    assert bytes_by_tier(segments)[labels(tier="copy")] == 500
