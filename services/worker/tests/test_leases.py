"""What the tables of leases and GPUs promise."""

from __future__ import annotations

import pytest

from shoal_core.protocol.ids import JobId, ProcessId, SlotId
from shoal_core.protocol.messages import LeaseSummary
from shoal_core.protocol.resources import Resources, to_resources
from shoal_core.testing.builders import process_id
from shoal_worker import leases
from shoal_worker.gpus import GpuShare, GpuTable, why_impossible
from shoal_worker.leases import Lease, LeaseTable

OWNER, OTHER = process_id(1, node=2), process_id(2, node=2)
JOB = JobId("00000001")
ONE_CPU = to_resources({"CPU": 1})


def table(**amounts: float) -> LeaseTable:
    return LeaseTable(to_resources(amounts), [str(index) for index in range(int(amounts.get("GPU", 0)))])


def grant(
    leases: LeaseTable, slot: int, resources: Resources = ONE_CPU, owner: ProcessId = OWNER, job: JobId = JOB
) -> Lease:
    lease = leases.grant(owner, job, 1, SlotId(slot), resources)
    assert lease is not None
    leases.sanity_check()
    return lease


# ------------------------------------------------------------------------------- leases


def test_what_was_granted_is_not_free_until_the_lease_ends() -> None:
    leases = table(CPU=2, custom=1)
    lease = grant(leases, 1, to_resources({"CPU": 1.5, "custom": 1}))
    assert leases.free == to_resources({"CPU": 0.5})
    assert leases.grant(OWNER, JOB, 1, SlotId(2), ONE_CPU) is None
    leases.end(lease)
    assert leases.free == leases.total
    with pytest.raises(KeyError):
        leases.end(lease)
    assert leases.free == leases.total


def test_numbers_of_leases_rise_and_are_never_used_again() -> None:
    leases = table(CPU=1)
    numbers = []
    for slot in range(3):
        lease = grant(leases, slot)
        numbers.append(lease.number)
        leases.end(lease)
        assert leases.get(lease.number) is None
    assert numbers == [1, 2, 3]


def test_a_blocked_lease_gives_back_its_cpu_and_nothing_else() -> None:
    leases = table(CPU=2, GPU=1)
    lease = grant(leases, 1, to_resources({"CPU": 2, "GPU": 1}))
    assert leases.block(lease)
    assert not leases.block(lease)
    assert leases.free == to_resources({"CPU": 2})
    assert leases.unblock(lease)
    assert not leases.unblock(lease)
    assert leases.free == {}
    leases.block(lease)
    leases.end(lease)
    assert leases.free == leases.total


def test_unblocking_never_waits_and_may_overdraw_the_cpus() -> None:
    leases = table(CPU=1)
    first = grant(leases, 1)
    leases.block(first)
    second = grant(leases, 2)
    leases.unblock(first)
    leases.sanity_check()
    assert leases.free == {"CPU": -10_000}
    assert leases.grant(OWNER, JOB, 1, SlotId(3), {"CPU": 1}) is None
    leases.end(second)
    assert leases.free == {}


def test_a_slot_is_known_as_long_as_its_owner_lives() -> None:
    leases = table(CPU=1)
    lease = grant(leases, 1)
    leases.end(lease)
    assert leases.knows(OWNER, SlotId(1))
    assert not leases.knows(OTHER, SlotId(1))
    assert leases.owners() == [OWNER]
    leases.forget(OWNER)
    assert not leases.knows(OWNER, SlotId(1))
    assert leases.owners() == []


def test_a_dead_owner_is_on_record_until_its_last_lease_has_ended() -> None:
    leases = table(CPU=2)
    both = [grant(leases, 1), grant(leases, 2)]
    leases.forget(OWNER)
    assert leases.of_owner(OWNER) == both
    leases.end(both[0])
    assert leases.owners() == [OWNER]
    leases.end(both[1])
    assert leases.owners() == []


def test_the_end_of_a_job_forgets_also_those_owners_that_hold_no_lease_any_more() -> None:
    leases = table(CPU=1)
    leases.end(grant(leases, 1))
    leases.end(grant(leases, 1, owner=OTHER, job=JobId("00000002")))
    assert leases.jobs() == {JOB, JobId("00000002")}
    leases.forget_job(JOB)
    assert leases.owners() == [OTHER]


def test_only_the_newest_slots_of_an_owner_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MOST_SLOTS", 3)
    one = table(CPU=1)
    for slot in range(5):
        one.end(grant(one, slot))
    assert [one.knows(OWNER, SlotId(slot)) for slot in range(5)] == [False, False, True, True, True]


def test_the_newest_leases_that_run_are_asked_back_once() -> None:
    leases = table(CPU=6)
    held = [grant(leases, slot) for slot in range(5)]
    grant(leases, 5, to_resources({"CPU": 0.5}))
    waiting, oldest, blocked, newer, over = held
    for lease in (oldest, blocked, newer, over):
        lease.process = process_id(lease.number)
    leases.block(blocked)
    over.over = True
    assert leases.recall(OWNER, ONE_CPU, 1) == [newer]
    assert leases.recall(OWNER, ONE_CPU, 5) == [oldest]
    assert leases.recall(OWNER, ONE_CPU, 5) == []
    assert leases.recall(OTHER, ONE_CPU, 5) == []
    assert not waiting.recalled


def test_summaries_count_an_owners_leases_by_resources() -> None:
    leases = table(CPU=5)
    first, second = grant(leases, 1), grant(leases, 2)
    grant(leases, 3, to_resources({"CPU": 2}))
    leases.block(first)
    second.recalled = first.recalled = True
    assert leases.summaries() == [
        LeaseSummary(owner=OWNER, job_id=JOB, resources=ONE_CPU, count=2, blocked=1, recalled=1),
        LeaseSummary(owner=OWNER, job_id=JOB, resources=to_resources({"CPU": 2}), count=1),
    ]


def test_what_actors_hold_is_counted_by_their_jobs() -> None:
    leases = table(CPU=5)
    grant(leases, 1)
    for slot in (2, 3):
        assert leases.grant(OTHER, JOB, 0, SlotId(slot), ONE_CPU, actor=True) is not None
    assert leases.grant(OTHER, JOB, 0, SlotId(4), {}, actor=True) is not None
    assert leases.held_by_actors() == {JOB: to_resources({"CPU": 2})}


def test_a_lease_that_gets_no_gpu_reserves_nothing() -> None:
    leases = table(CPU=2, GPU=2)
    grant(leases, 1, to_resources({"GPU": 0.6}))
    grant(leases, 2, to_resources({"GPU": 0.6}))
    free = dict(leases.free)
    assert leases.grant(OWNER, JOB, 1, SlotId(3), to_resources({"CPU": 1, "GPU": 0.5})) is None
    assert leases.free == free
    assert not leases.knows(OWNER, SlotId(3))
    leases.sanity_check()


# ------------------------------------------------------------------------------- GPUs


def test_whole_gpus_are_whole_devices() -> None:
    gpus = GpuTable(["0", "1", "7"])
    shares = gpus.allocate(20_000)
    assert shares is not None
    assert gpus.names_of(shares) == ["0", "1"]
    assert gpus.allocate(20_000) is None
    gpus.release(shares)
    assert gpus.allocate(30_000) is not None


def test_a_share_goes_to_the_fullest_device_that_has_room() -> None:
    gpus = GpuTable(["0", "1"])
    assert gpus.allocate(3_000) == (GpuShare(0, 3_000),)
    assert gpus.allocate(8_000) == (GpuShare(1, 8_000),)
    assert gpus.allocate(2_000) == (GpuShare(1, 2_000),)
    assert gpus.allocate(7_000) == (GpuShare(0, 7_000),)
    assert gpus.allocate(1) is None


def test_a_device_that_is_shared_is_not_given_as_a_whole() -> None:
    gpus = GpuTable(["0"])
    shares = gpus.allocate(1)
    assert shares is not None
    assert gpus.allocate(10_000) is None
    gpus.release(shares)
    assert gpus.allocate(10_000) == (GpuShare(0, 10_000),)


def test_more_than_one_gpu_must_be_a_whole_number() -> None:
    gpus = GpuTable(["0", "1"])
    assert gpus.allocate(15_000) is None
    assert gpus.free == [10_000, 10_000]
    assert "got 1.5" in why_impossible(15_000)
    assert [why_impossible(units) for units in (0, 5_000, 10_000, 20_000)] == ["", "", "", ""]


def test_no_gpu_is_no_share() -> None:
    assert GpuTable([]).allocate(0) == ()
    assert GpuTable([]).allocate(1) is None
