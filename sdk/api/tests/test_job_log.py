"""The log of a submitted job: however it is written, stored and read, what is read is what was written, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.jobs.log import PIECE_BYTES, SLOTS, Piece, Reading, Written, whole

Slots = dict[str, bytes]


def store(written: Written, slots: Slots, most: int | None = None) -> None:
    """Store what is due, ``most`` pieces of it."""
    while most != 0 and (piece := written.due()) is not None:
        slots[piece.slot] = piece.encode()
        most = None if most is None else most - 1


def read_on(reading: Reading, slots: Slots) -> bytes:
    """Read what a follower can."""
    text = b""
    while (stored := slots.get(reading.slot)) and (new := reading.read(Piece.decode(stored))):
        text += new
    return text


def text_of(start: int, size: int) -> bytes:
    """Return bytes that tell where they are."""
    return bytes((start + index) // 7 % 251 for index in range(size))


SIZES = st.integers(1, 3 * PIECE_BYTES) | st.integers(1, 50) | st.sampled_from([PIECE_BYTES, 2 * PIECE_BYTES])


@given(st.lists(st.tuples(SIZES, st.sampled_from([0, 1, None]), st.booleans()), max_size=8))
def test_who_follows_reads_what_was_written(steps: list[tuple[int, int | None, bool]]) -> None:
    written, slots, reading, expected, read = Written(), Slots(), Reading(), b"", b""
    for size, most, reads in steps:
        data = text_of(len(expected), size)
        expected += data
        written.append(data)
        store(written, slots, most)
        if reads:
            read += read_on(reading, slots)
            assert expected.startswith(read)
    store(written, slots)
    assert written.due() is None
    assert read + read_on(reading, slots) == expected
    assert whole(map(Piece.decode, slots.values())) == expected


def test_only_the_end_is_kept_and_what_is_missing_is_told() -> None:
    written, slots, reading = Written(), Slots(), Reading()
    text = text_of(0, (SLOTS + 2) * PIECE_BYTES + 10)
    written.append(text[:10])
    store(written, slots)
    assert read_on(reading, slots) == text[:10]
    written.append(text[10:])
    store(written, slots)
    lost = 3 * PIECE_BYTES
    assert whole(map(Piece.decode, slots.values())) == b"[%d bytes are not kept]\n" % lost + text[lost:]
    assert (
        reading.read(Piece.decode(slots["2"]))
        == b"[%d bytes are not kept]\n" % ((SLOTS + 2) * PIECE_BYTES - 10) + text[-10:]
    )
    assert len(slots) == SLOTS


def test_a_piece_that_could_not_be_stored_is_due_again_before_younger_ones() -> None:
    written = Written()
    written.append(text_of(0, 2 * PIECE_BYTES))
    first = written.due()
    assert first is not None
    written.failed(first)
    assert written.due() == first
    second = written.due()
    assert second is not None
    assert second.number == 1
    written.append(bytes(SLOTS * PIECE_BYTES))
    written.failed(first)
    assert written.due() == Piece(2, bytes(PIECE_BYTES)), "the first is not kept any more"
