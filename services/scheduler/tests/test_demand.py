"""The open demand of all owners, as one scheduler knows it."""

from __future__ import annotations

from services.scheduler.tests.builders import demand, entry
from services.scheduler.tests.simulation import job_id
from shoal_core.protocol.ids import SlotId
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.demand import FORGET_SECONDS, GRANTED_SECONDS, HELP_SECONDS, DemandTable, Wanted

OWNER = process_id(1, 0)
JOB = job_id(1)
ONE, TWO, THREE = SlotId(1), SlotId(2), SlotId(3)
NODE = node_id(1)


def table(*slots: int, at: float = 0.0) -> tuple[DemandTable, Wanted]:
    """Return a table with one owner's demand for one key."""
    found = DemandTable()
    found.update(demand(1, 1, entry(slots)), at)
    wanted = found.find(OWNER, 0)
    assert wanted is not None
    return found, wanted


def ask_for(wanted: Wanted, slot: SlotId, number: int) -> None:
    del wanted.open[slot]
    wanted.asked[slot] = number


def test_each_version_replaces_the_one_before_and_an_older_one_changes_nothing() -> None:
    demands, _ = table(1, 2)
    demands.update(demand(1, 3, entry([2, 3]), entry([4], key=1)), 1.0)
    demands.update(demand(1, 2, entry([1])), 2.0)
    demands.update(demand(1, 3, entry([1])), 2.0)
    assert {wanted.entry.key: dict(wanted.open) for wanted in demands} == {
        0: {TWO: 0.0, THREE: 1.0},
        1: {SlotId(4): 1.0},
    }
    assert len(demands) == 2


def test_slots_that_are_asked_for_are_not_open_again_when_they_are_repeated() -> None:
    demands, wanted = table(1, 2)
    ask_for(wanted, ONE, 7)
    demands.update(demand(1, 2, entry([1, 2])), 1.0)
    assert (list(wanted.open), wanted.asked, wanted.unmet()) == ([TWO], {ONE: 7}, 2)


def test_a_granted_slot_stays_closed_while_its_worker_starts_and_opens_again_if_it_never_does() -> None:
    demands, wanted = table(1, 2)
    ask_for(wanted, ONE, 7)
    demands.met(wanted, [ONE], NODE, 0.5)
    demands.update(demand(1, 2, entry([1, 2])), 1.0)
    assert list(wanted.open) == [TWO]
    demands.update(demand(1, 3, entry([1, 2])), 0.5 + GRANTED_SECONDS)
    assert list(wanted.open) == [ONE, TWO]


def test_a_slot_whose_grant_died_with_its_node_opens_again_at_once() -> None:
    demands, wanted = table(1, 2)
    demands.met(wanted, [ONE, TWO], NODE, 0.5)
    assert len(demands) == 0
    demands.drop_node(node_id(2))
    demands.update(demand(1, 2, entry([1, 2])), 1.0)
    assert len(demands) == 0
    demands.drop_node(NODE)
    demands.update(demand(1, 3, entry([1, 2])), 1.1)
    found = demands.find(OWNER, 0)
    assert found is not None
    assert list(found.open) == [ONE, TWO]


def test_a_refused_slot_opens_again_for_the_ask_it_belongs_to_only() -> None:
    _, wanted = table(1, 2)
    ask_for(wanted, ONE, 7)
    wanted.reopen([ONE, TWO], 6, 1.0)
    assert wanted.asked == {ONE: 7}
    wanted.reopen([ONE, TWO], 7, 1.0)
    assert (wanted.asked, wanted.open) == ({}, {ONE: 1.0, TWO: 0.0})


def test_a_slot_is_overdue_once_its_owner_has_repeated_it() -> None:
    demands, wanted = table(1)
    demands.update(demand(1, 2, entry([1, 2])), HELP_SECONDS)
    assert wanted.is_overdue
    assert wanted.next_slot(9.0) == ONE, "the only one that its owner repeated"
    del wanted.open[ONE]
    assert not wanted.is_overdue
    assert wanted.next_slot(9.0) is None
    assert wanted.next_slot(HELP_SECONDS) == TWO, "what was opened late enough"


def test_demand_that_is_withdrawn_is_gone() -> None:
    demands, _ = table(1)
    demands.update(demand(1, 2), 1.0)
    assert (len(demands), demands.find(OWNER, 0)) == (0, None)
    demands.update(demand(1, 3, entry([2], wanted=0)), 2.0)
    assert len(demands) == 0, "wanted 0 withdraws, whatever the slots"


def test_patience_begins_anew_when_something_was_granted_or_withdrawn() -> None:
    demands, wanted = table(1, 2, 3)
    demands.update(demand(1, 2, entry([1, 2, 3])), 1.0)
    assert wanted.served_at == 0.0
    demands.update(demand(1, 3, entry([2, 3])), 2.0)
    assert wanted.served_at == 2.0
    demands.met(wanted, [TWO], NODE, 3.0)
    assert (wanted.served_at, wanted.since) == (3.0, 0.0)


def test_what_is_not_repeated_is_forgotten_unless_nobody_could_be_heard() -> None:
    demands, _ = table(1)
    demands.forget_silent(FORGET_SECONDS)
    assert demands.known() == [OWNER]
    demands.renew(FORGET_SECONDS)
    demands.forget_silent(2 * FORGET_SECONDS)
    assert demands.known() == [OWNER]
    demands.forget_silent(2 * FORGET_SECONDS + 0.1)
    assert demands.known() == []


def test_the_dead_want_nothing() -> None:
    demands, _ = table(1)
    on_node = process_id(5, 1)
    demands.update(demand(2, 1, entry([1])).model_copy(update={"owner": on_node}), 0.0)
    demands.update(demand(3, 1, entry([1])).model_copy(update={"job_id": job_id(2)}), 0.0)
    demands.drop_node(node_id(1))
    assert [wanted.owner for wanted in demands] == [OWNER, process_id(3, 0)]
    demands.drop_job(JOB)
    assert [wanted.owner for wanted in demands] == [process_id(3, 0)]
    demands.drop_owner(process_id(3, 0))
    assert demands.known() == []


def test_what_is_remembered_of_grants_is_bounded_by_what_the_owner_lists() -> None:
    demands, wanted = table(*range(1, 101))
    demands.met(wanted, [SlotId(slot) for slot in range(1, 101)], NODE, 0.0)
    demands.update(demand(1, 2, entry([100])), 1.0)
    assert len(demands) == 0, "still granted"
    demands.update(demand(1, 3, entry([])), 1.5)
    demands.update(demand(1, 4, entry([100])), 2.0)
    found = demands.find(OWNER, 0)
    assert found is not None
    assert list(found.open) == [SlotId(100)], "what the owner did not list was forgotten"
