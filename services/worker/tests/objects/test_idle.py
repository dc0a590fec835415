"""Idle segments in the order of their last use."""

from __future__ import annotations

from random import Random

from shoal_worker.objects.idle import LEAST_STALE, IdleQueue


def test_the_first_is_what_was_used_the_longest_ago() -> None:
    queue = IdleQueue()
    assert queue.first() is None
    for name, used in (("b", 2), ("a", 1), ("c", 3)):
        queue.put(name, used, 10)
    assert queue.first() == "a"
    queue.put("a", 4, 10)
    assert queue.first() == "b"
    queue.remove("b")
    queue.remove("b")
    assert queue.first() == "c"
    assert queue.total_bytes == 20
    assert len(queue) == 2
    assert "b" not in queue


def test_any_history_has_the_same_first_as_a_search_and_keeps_no_more_than_it_needs() -> None:
    random, queue = Random(1), IdleQueue()
    members: dict[str, int] = {}
    for used in range(5000):
        name = f"o{random.randrange(40)}"
        if random.random() < 0.3:
            queue.remove(name)
            members.pop(name, None)
        else:
            queue.put(name, used, 7)
            members[name] = used
            assert len(queue._heap) <= 2 * len(members) + LEAST_STALE
        assert queue.first() == (min(members, key=lambda one: members[one]) if members else None)
        assert queue.total_bytes == 7 * len(members)
