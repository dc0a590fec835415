"""Files that small segments share: which part is given out, what goes, and what stays for the dead."""

from __future__ import annotations

from shoal_core.protocol.places import part_of
from shoal_worker.objects.files import SLAB_BYTES
from shoal_worker.objects.slabs import Slabs, Vacated

PART = SLAB_BYTES // 4


def full(slabs: Slabs) -> list[str]:
    return [slabs.take(PART) for _ in range(4)]


def test_parts_of_one_size_share_a_file_until_it_is_full() -> None:
    slabs = Slabs()
    places = full(slabs)
    assert places == [part_of("s1", index * PART) for index in range(4)]
    assert slabs.take(PART) == part_of("s2", 0)
    assert slabs.take(PART // 2) == part_of("s3", 0)
    assert len(slabs) == 3


def test_what_does_not_divide_a_file_does_not_reach_beyond_its_end() -> None:
    slabs = Slabs()
    size = SLAB_BYTES // 3 // 4096 * 4096 - 4096
    places = [slabs.take(size) for _ in range(4)]
    assert places == [part_of("s1", index * size) for index in range(3)] + [part_of("s2", 0)]


def test_a_part_that_was_vacated_is_given_out_again_and_the_last_takes_its_file_along() -> None:
    slabs = Slabs()
    places = full(slabs)
    assert slabs.vacate(places[1]) == Vacated(places[1], PART)
    assert slabs.take(PART) == places[1]
    for place in places[:3]:
        assert slabs.vacate(place) == Vacated(place, PART)
    assert slabs.vacate(places[3]) == Vacated("s1")
    assert len(slabs) == 0
    assert slabs.take(PART) == part_of("s2", 0), "a name is used once"


def test_a_part_that_the_dead_may_use_stays_as_long_as_others_in_its_file() -> None:
    slabs = Slabs()
    lost, first, second = (slabs.take(PART) for _ in range(3))
    assert slabs.lose(lost) is None
    assert slabs.is_closed(first)
    assert slabs.lost_bytes() == PART
    assert slabs.take(PART) == part_of("s2", 0), "nothing new keeps it"
    assert slabs.vacate(first) == Vacated(first, PART)
    assert slabs.vacate(second) == Vacated("s1", lost_bytes=PART)
    assert slabs.lost_bytes() == 0
    assert slabs.lose(part_of("s2", 0)) == Vacated("s2", lost_bytes=PART)
    assert len(slabs) == 0
