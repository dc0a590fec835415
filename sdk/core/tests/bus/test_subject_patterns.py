"""Subject patterns: what they mean, and when one means all that another does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.bus.subject_patterns import covers, matches

SUBJECTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=4)
PATTERNS = st.tuples(st.lists(st.sampled_from("ab*"), max_size=3), st.sampled_from(["a", "*", ">"])).map(
    lambda parts: [*parts[0], parts[1]]
)


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("*", "a.b", False),
    ],
)
def test_patterns_mean_what_the_broker_says(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern.split("."), subject.split(".")) is expected


@given(PATTERNS, PATTERNS, SUBJECTS)
def test_what_a_covered_pattern_means_is_meant_by_the_covering_one(
    allowed: list[str], pattern: list[str], subject: list[str]
) -> None:
    if covers(allowed, pattern) and matches(pattern, subject):
        assert matches(allowed, subject)


@given(PATTERNS)
def test_a_pattern_covers_itself(pattern: list[str]) -> None:
    assert covers(pattern, pattern)
