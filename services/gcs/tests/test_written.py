"""What a replica remembers of values that are written once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_gcs.written import Written


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.integers(0, 60), st.booleans()), max_size=40))
def test_the_newest_are_kept_within_the_bound(steps: list[tuple[str, int | None, bool]]) -> None:
    """A model beside it: a list, the newest last."""
    written, model = Written(100), dict[str, bytes]()
    for key, size, read in steps:
        if read:
            known = written.get(key)
            assert known == model.get(key)
            if known is not None:
                model[key] = model.pop(key)
        else:
            value = None if size is None else bytes(size)
            written.remember(key, value)
            model.pop(key, None)
            if value is not None:
                model[key] = value
            while sum(map(len, model.values())) > 100:
                del model[next(iter(model))]
        assert len(written) == len(model)
        assert written.size_bytes == sum(map(len, model.values())) <= 100


def test_what_begins_alike_is_forgotten_together() -> None:
    written = Written()
    for key in ("job.1.a", "job.1.b", "job.2.a"):
        written.remember(key, b"data")
    written.forget_all("job.1.")
    assert [written.get(key) for key in ("job.1.a", "job.1.b", "job.2.a")] == [None, None, b"data"]
    assert written.size_bytes == 4
