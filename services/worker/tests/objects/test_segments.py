"""What the table of segments promises, message by message."""

from __future__ import annotations

import pytest

from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import JobId, ProcessId
from shoal_core.protocol.places import part_of
from shoal_core.testing.builders import process_id
from shoal_worker.objects.files import PAGE_BYTES, CreateFile, FileCommand, RemoveFile, size_class
from shoal_worker.objects.pins import MOST_ENDED
from shoal_worker.objects.segments import Segment, SegmentState, SegmentTable

WRITER, OWNER, READER = process_id(1), process_id(2), process_id(3)
KIB = 1024


class Table(SegmentTable):
    """A table whose files are made at once."""

    def __init__(self, capacity_bytes: int = 1024 * KIB, warm_bytes: int = 256 * KIB, shared_bytes: int = 0) -> None:
        super().__init__(capacity_bytes, warm_bytes, shared_bytes=shared_bytes)

    def taken(self) -> list[FileCommand]:
        commands, self.commands = self.commands, []
        self.sanity_check()
        return commands

    def promise(self, size_bytes: int = PAGE_BYTES, process: ProcessId = WRITER, job: JobId | None = None) -> Segment:
        """Promise a file for which there is room."""
        segment = self.allocate(process, size_bytes, job)
        assert segment is not None
        return segment

    def write(self, size_bytes: int = PAGE_BYTES) -> str:
        """Have a segment that the writer writes."""
        name = self.promise(size_bytes).name
        self.created(name)
        return name

    def sealed(self, size_bytes: int = PAGE_BYTES) -> str:
        name = self.write(size_bytes)
        assert self.seal(name, WRITER, OWNER)
        return name

    def reused(self, size_bytes: int = PAGE_BYTES) -> str:
        """Return which file the next object of this size gets; "" for a new one."""
        self.taken()
        self.write(size_bytes)
        (command,) = self.taken()
        assert isinstance(command, CreateFile)
        return command.reused


def test_a_warm_file_that_somebody_else_still_uses_is_warm_as_before_and_the_last_to_be_used() -> None:
    table = Table()
    first, second = table.sealed(), table.sealed()
    table.free(first, OWNER)
    third = table.promise().name
    (command,) = table.taken()[2:]
    assert command == CreateFile(third, PAGE_BYTES, reused=first)
    table.stays_warm(first, third)
    table.created(third)
    table.free(second, OWNER)
    assert table.warm_bytes == 2 * PAGE_BYTES
    assert [table.reused(), table.reused()] == [second, first]


def test_what_is_busy_is_removed_where_there_is_no_room_to_keep_it() -> None:
    table = Table(capacity_bytes=2 * PAGE_BYTES, warm_bytes=2 * PAGE_BYTES)
    first, _ = table.sealed(), table.sealed()
    table.free(first, OWNER)
    third = table.promise().name
    table.taken()
    table.stays_warm(first, third)
    assert table.taken() == [RemoveFile(first)]
    assert table.warm_bytes == 0


def test_what_another_node_may_have_linked_is_the_last_to_be_used_again() -> None:
    table = Table()
    first, second = table.sealed(), table.sealed()
    table.free(first, OWNER)
    segment = table.get(second)
    assert segment is not None
    segment.lent_to_link = True
    table.free(second, OWNER)
    assert [table.reused(), table.reused()] == [first, second]


def test_a_file_is_at_most_a_quarter_larger_than_its_object() -> None:
    for size in [1, 4096, 4097, 5000, 100_000, 1_000_001, 123_456_789]:
        assert size <= size_class(size) <= max(PAGE_BYTES, size * 1.25 + PAGE_BYTES)
        assert size_class(size) % PAGE_BYTES == 0
        assert size_class(size_class(size)) == size_class(size)
    assert len({size_class(size) for size in range(1 << 20, 1 << 21, 1000)}) <= 5


def test_the_file_of_a_freed_object_is_kept_warm_under_a_new_name() -> None:
    table = Table()
    name = table.sealed()
    assert table.used_bytes == PAGE_BYTES
    assert table.free(name, OWNER)
    assert (table.used_bytes, table.warm_bytes, len(table)) == (0, PAGE_BYTES, 0)
    second = table.promise()
    assert second.name != name
    assert table.taken() == [CreateFile(name, PAGE_BYTES), CreateFile(second.name, PAGE_BYTES, name)]
    assert (table.used_bytes, table.warm_bytes) == (PAGE_BYTES, 0)


def test_what_is_pinned_is_reused_only_after_the_last_pin() -> None:
    table = Table()
    name = table.sealed()
    table.pin(name, READER, 1)
    table.pin(name, READER, 2)
    table.pin(name, WRITER, 1)
    table.free(name, OWNER)
    for process, serial in ((READER, 1), (WRITER, 1)):
        table.unpin(name, process, serial)
        assert table.reused() == ""
    table.unpin(name, READER, 2)
    assert table.reused() == name


def test_a_freed_object_is_not_mapped_again() -> None:
    table = Table()
    name = table.sealed()
    table.pin(name, READER, 1)
    table.free(name, OWNER)
    with pytest.raises(NotFoundError, match="was freed"):
        table.pin(name, WRITER, 1)
    with pytest.raises(NotFoundError):
        table.pin("o99", READER, 2)


def test_pins_whose_requests_overtook_each_other_are_all_held() -> None:
    table = Table()
    name = table.sealed()
    table.pin(name, READER, 2)
    table.pin(name, READER, 1)
    table.unpin(name, READER, 2)
    table.free(name, OWNER)
    assert table.reused() == ""
    table.unpin(name, READER, 1)
    assert table.reused() == name


def test_a_pin_that_has_ended_is_not_held_again_by_a_copy_of_its_request() -> None:
    table = Table()
    name = table.sealed()
    table.pin(name, READER, 1)
    table.pin(name, READER, 1)
    table.unpin(name, READER, 1)
    with pytest.raises(NotFoundError, match=r"pin 1 .* has ended"):
        table.pin(name, READER, 1)
    table.free(name, OWNER)
    assert table.reused() == name


def test_an_unpin_that_overtakes_its_pin_wins() -> None:
    table = Table()
    name = table.sealed()
    table.unpin(name, READER, 1)
    with pytest.raises(NotFoundError):
        table.pin(name, READER, 1)


def test_what_is_remembered_of_ended_pins_is_bounded_and_errs_on_the_safe_side() -> None:
    table = Table()
    name = table.sealed()
    table.pin(name, READER, 3)
    for serial in range(10, 10 + 3 * MOST_ENDED):
        table.pin(name, READER, serial)
        table.unpin(name, READER, serial)
    for serial in (1, 10, 9 + 3 * MOST_ENDED):
        with pytest.raises(NotFoundError):
            table.pin(name, READER, serial)
    table.pin(name, READER, 3)
    table.free(name, OWNER)
    assert table.reused() == ""
    table.unpin(name, READER, 3)
    assert table.reused() == name


def test_a_free_that_overtakes_the_seal_takes_effect_with_it() -> None:
    table = Table()
    name = table.write()
    assert not table.free(name, OWNER)
    assert not table.free(name, READER)
    assert table.get(name) is not None
    assert table.seal(name, WRITER, OWNER)
    assert table.get(name) is None
    assert table.reused() == name


def test_only_the_writer_seals_and_only_the_owner_frees() -> None:
    table = Table()
    name = table.write()
    assert not table.seal(name, READER, READER)
    assert table.seal(name, WRITER, OWNER)
    assert not table.seal(name, WRITER, READER)
    assert not table.free(name, WRITER)
    assert not table.free(name, READER)
    assert table.free(name, OWNER)
    assert not table.free(name, OWNER)


def test_a_segment_whose_writer_died_unsealed_is_removed_and_never_used_again() -> None:
    table = Table()
    name = table.write()
    table.pin(name, READER, 1)
    table.taken()
    table.process_died(WRITER)
    assert table.taken() == [RemoveFile(name)]
    assert not table.seal(name, WRITER, OWNER)
    assert table.reused() == ""


def test_a_writer_that_gives_up_leaves_nothing() -> None:
    table = Table()
    name = table.write()
    table.taken()
    assert table.free(name, WRITER)
    assert table.taken() == [RemoveFile(name)]
    assert table.used_bytes == 0


def test_a_file_that_is_made_after_its_writers_death_is_removed() -> None:
    table = Table()
    name = table.promise(1).name
    table.process_died(WRITER)
    table.taken()
    assert table.used_bytes == PAGE_BYTES, "its pages are in use until it is removed"
    assert table.created(name) is None
    assert table.taken() == [RemoveFile(name)]
    assert table.used_bytes == 0


def test_a_file_that_could_not_be_made_was_never_promised() -> None:
    table = Table()
    name = table.promise(1).name
    table.creation_failed(name)
    assert (table.used_bytes, len(table)) == (0, 0)
    table.sanity_check()


def test_the_death_of_an_owner_frees_what_it_owned_and_that_of_a_reader_what_it_pinned() -> None:
    table = Table()
    name = table.sealed()
    table.pin(name, READER, 1)
    table.process_died(OWNER)
    segment = table.get(name)
    assert segment is not None
    assert segment.state is SegmentState.FREED
    table.process_died(READER)
    assert table.reused() == name


def test_what_a_process_that_was_not_reaped_has_mapped_is_never_used_again() -> None:
    table = Table()
    mapped, read_before = table.sealed(), table.sealed()
    table.pin(mapped, READER, 1)
    table.pin(read_before, READER, 2)
    table.unpin(read_before, READER, 2)
    table.process_died(READER, reaped=False)
    table.taken()
    table.free(mapped, OWNER)
    table.free(read_before, OWNER)
    assert table.taken() == [RemoveFile(mapped)]
    assert table.reused() == read_before


def test_where_there_is_no_room_nothing_is_promised() -> None:
    table = Table(capacity_bytes=16 * KIB)
    table.sealed(8 * KIB)
    table.write(4 * KIB)
    assert table.allocate(WRITER, 5 * KIB) is None
    assert table.used_bytes == 12 * KIB
    table.promise(4 * KIB)


def test_warm_files_make_room_for_objects_of_other_sizes() -> None:
    table = Table(capacity_bytes=16 * KIB, warm_bytes=16 * KIB)
    for name in [table.sealed(4 * KIB) for _ in range(3)]:
        table.free(name, OWNER)
    table.taken()
    table.promise(12 * KIB)
    assert table.taken() == [RemoveFile("o1"), RemoveFile("o2"), CreateFile("o4", 12 * KIB)]
    assert (table.used_bytes, table.warm_bytes) == (12 * KIB, 4 * KIB)


def test_no_more_is_kept_warm_than_was_allowed() -> None:
    table = Table(warm_bytes=10 * KIB)
    large, small = table.sealed(8 * KIB), table.sealed(4 * KIB)
    table.free(large, OWNER)
    table.taken()
    table.free(small, OWNER)
    assert table.taken() == [RemoveFile(large)]
    assert table.warm_bytes == 4 * KIB


def test_the_table_says_whose_segments_it_has() -> None:
    table = Table()
    table.sealed()
    table.promise(1, READER, JobId("00000001"))
    assert table.processes() == {OWNER, READER}
    assert table.jobs() == {JobId("00000001")}


def test_of_many_segments_those_are_pinned_that_can_be() -> None:
    table = Table()
    first, gone, second = table.sealed(), table.sealed(), table.sealed()
    table.free(gone, OWNER)
    assert table.pin_many({first: 1, gone: 2, second: 3}, READER) == {first: first, second: second}
    assert table.pin_many({first: 1}, READER) == {first: first}, "a repeated request pins once"
    table.unpin(first, READER, 1)
    assert table.pin_many({first: 1, second: 4}, READER) == {second: second}, "a late copy pins nothing"
    table.free(first, OWNER)
    table.free(second, OWNER)
    assert table.get(first) is None
    assert table.get(second) is not None, "it is pinned twice"
    for serial in (3, 4):
        table.unpin(second, READER, serial)
    assert len(table) == 0


# ------------------------------------------------------------------------------- files that are shared


def shared(capacity_bytes: int = 1024 * KIB, warm_bytes: int = 256 * KIB) -> Table:
    return Table(capacity_bytes, warm_bytes, shared_bytes=64 * KIB)


def written(table: Table, size_bytes: int = PAGE_BYTES) -> Segment:
    """Return a segment that a process has written."""
    segment = table.allocate_to_writer(WRITER, size_bytes)
    assert segment is not None
    table.created(segment.name)
    assert table.seal(segment.name, WRITER, OWNER)
    return segment


def test_small_segments_share_a_file_and_their_parts_are_kept_warm() -> None:
    table = shared()
    first, second, large = written(table), written(table), written(table, 80 * KIB)
    assert [first.place, second.place, large.place] == [part_of("s1", 0), part_of("s1", PAGE_BYTES), large.name]
    table.taken()
    table.free(first.name, OWNER)
    assert table.taken() == []
    assert table.warm_bytes == PAGE_BYTES
    third = written(table)
    assert third.place == first.place
    assert table.taken() == [CreateFile(third.name, PAGE_BYTES, third.place, part=third.place)]


def test_what_is_pulled_or_restored_has_a_file_of_its_own() -> None:
    table = shared()
    for segment in (table.allocate(WRITER, 1, filled=True), table.allocate(WRITER, 1, is_copy=True)):
        assert segment is not None
        assert segment.place == segment.name


def test_parts_are_given_back_where_there_is_no_room_to_keep_them() -> None:
    table = shared(warm_bytes=0)
    first, second = written(table), written(table)
    table.taken()
    table.free(first.name, OWNER)
    table.free(second.name, OWNER)
    assert table.taken() == [RemoveFile(first.place, PAGE_BYTES), RemoveFile("s1")]
    assert table.used_bytes == 0


def test_a_part_that_could_not_be_reserved_is_free_again() -> None:
    table = shared()
    kept = written(table)
    segment = table.allocate_to_writer(WRITER, 1)
    assert segment is not None
    table.creation_failed(segment.name)
    assert table.used_bytes == kept.capacity_bytes
    assert written(table).place == segment.place


def test_what_a_process_may_still_map_that_counts_as_dead_is_not_taken_from_it() -> None:
    table = shared()
    read, beside, warm = written(table), written(table), written(table)
    writing = table.allocate_to_writer(READER, 1)
    assert writing is not None
    table.created(writing.name)
    table.pin(read.name, READER, 1)
    table.free(warm.name, OWNER)
    table.taken()
    table.process_died(READER, reaped=False)
    table.free(read.name, OWNER)
    assert table.taken() == [RemoveFile(warm.place, PAGE_BYTES)], "what is warm would only keep the file"
    assert table.used_bytes == 3 * PAGE_BYTES, "it takes room, and is counted"
    assert written(table).place == part_of("s2", 0)
    table.taken()
    table.free(beside.name, OWNER)
    assert table.taken() == [RemoveFile("s1")]
    assert table.used_bytes == PAGE_BYTES
