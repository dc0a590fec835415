"""What a replica has written itself, it does not decode."""

from __future__ import annotations

from shoal_core.protocol.groups import GroupDescription, GroupRecord, GroupState
from shoal_core.protocol.ids import JobId, PlacementGroupId, ProcessId
from shoal_gcs.drafts import Drafts


def record(number: int) -> GroupRecord:
    about = GroupDescription(
        group_id=PlacementGroupId(f"{number:032x}"),
        job_id=JobId("00000001"),
        owner=ProcessId("0" * 24),
        bundles=[{"CPU": 10}],
    )
    return GroupRecord(description=about, state=GroupState.PENDING, nodes=[None], created_at=0.1 * number)


def test_what_was_encoded_here_is_the_same_record_once_it_is_stored() -> None:
    drafts = Drafts()
    first = record(1)
    value = drafts.encode(first)
    assert drafts.decode(bytes(bytearray(value))) is first
    assert len(drafts) == 0
    again = drafts.decode(value)
    assert again is not first
    assert again == first, "the store has kept the same"


def test_of_writes_that_failed_only_the_newest_are_kept() -> None:
    drafts = Drafts(most=2)
    values = [drafts.encode(record(number)) for number in range(3)]
    assert len(drafts) == 2
    assert [drafts.decode(value) for value in values] == [record(number) for number in range(3)]
