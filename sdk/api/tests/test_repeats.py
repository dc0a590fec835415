"""Lines that many processes print alike: which are shown, when, and with which count."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import repeats as repeats_module
from shoal.repeats import HINT, RepeatRules, Repeats, repeat_rules_of
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.messages import LogLines
from shoal_core.testing.builders import node_id, process_id

REPEATED = re.compile(r" \[repeated (\d+)x across cluster\]")


def lines(process: int, *texts: str, stream: str = "stdout") -> LogLines:
    return LogLines(
        node_id=node_id(1),
        job_id=JobId("00000001"),
        process_id=process_id(process),
        pid=process,
        stream=stream,
        lines=list(texts),
    )


def told(shown: list[LogLines]) -> list[tuple[int, str]]:
    """Return who is shown to have printed what."""
    return [(one.pid, line) for one in shown for line in one.lines]


def test_the_first_is_shown_at_once_and_of_the_others_the_last_with_their_count() -> None:
    repeats = Repeats(RepeatRules(5.0))
    assert told(repeats.take(lines(1, "step 1 of 9", "done"), 0.0)) == [(1, "step 1 of 9"), (1, "done")]
    for process in (2, 3, 4):
        assert repeats.take(lines(process, f"step {process} of 9"), 1.0) == []
    assert repeats.waiting == 1
    assert told(repeats.due(4.9)) == []
    assert told(repeats.due(5.0)) == [(4, f"step 4 of 9 [repeated 3x across cluster]{HINT}")]
    assert repeats.waiting == 0
    assert repeats.take(lines(1, "step 5 of 9"), 6.0) == [], "it is counted anew"
    repeats.take(lines(1, "step 6 of 9"), 6.0)
    assert told(repeats.due(10.0)) == [(1, "step 6 of 9 [repeated 2x across cluster]")], "and explained once"


def test_what_one_process_prints_again_and_again_is_shown() -> None:
    repeats = Repeats(RepeatRules())
    assert told(repeats.take(lines(1, "again", "again", "again"), 0.0)) == [(1, "again")] * 3
    assert repeats.waiting == 0


def test_a_single_one_is_shown_as_it_is_and_then_all_begins_anew() -> None:
    repeats = Repeats(RepeatRules(5.0))
    repeats.take(lines(1, "ready"), 0.0)
    assert repeats.take(lines(2, "ready"), 1.0) == []
    assert told(repeats.due(5.0)) == [(2, "ready")]
    assert told(repeats.take(lines(3, "ready"), 6.0)) == [(3, "ready")]


def test_the_streams_are_kept_apart_and_so_is_what_has_no_words() -> None:
    repeats = Repeats(RepeatRules())
    shown = [
        line
        for process in (1, 2)
        for line in told(repeats.take(lines(process, "1 2 3", "", "0x1f", stream="stdout"), 0.0))
    ]
    assert len(shown) == 6
    assert told(repeats.take(lines(1, "words"), 0.0) + repeats.take(lines(2, "words", stream="stderr"), 0.0)) == [
        (1, "words"),
        (2, "words"),
    ]


def test_some_are_shown_in_any_case_and_some_never() -> None:
    repeats = Repeats(RepeatRules(5.0, re.compile("^keep"), re.compile("noise")))
    for process in (1, 2):
        assert told(repeats.take(lines(process, "keep this", "much noise"), 0.0)) == [(process, "keep this")]
    assert told(repeats.take(lines(1, "keep noise"), 0.0)) == [(1, "keep noise")]


def test_of_too_many_kinds_the_oldest_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats_module, "MOST_KINDS", 2)
    repeats = Repeats(RepeatRules())
    repeats.take(lines(1, "a"), 0.0)
    repeats.take(lines(2, "a"), 0.0)
    assert told(repeats.take(lines(1, "b", "c"), 0.0)) == [(1, "b"), (1, "c"), (2, "a")]
    assert repeats.waiting == 0
    assert told(repeats.take(lines(3, "a"), 0.0))[-1] == (3, "a")


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.lists(st.sampled_from(["a", "b 1", "b 2", "7"]), max_size=3), st.floats(0, 4)),
        max_size=30,
    )
)
def test_every_line_is_shown_or_counted(printed: list[tuple[int, list[str], float]]) -> None:
    repeats, now = Repeats(RepeatRules(5.0)), 0.0
    shown: list[LogLines] = []
    for process, texts, seconds in printed:
        now += seconds
        shown += repeats.take(lines(process, *texts), now)
        assert repeats.waiting >= 0
    shown += repeats.end()
    assert repeats.waiting == 0
    counted: Counter[str] = Counter()
    for _, line in told(shown):
        times = REPEATED.search(line)
        counted[line.split()[0]] += int(times[1]) if times else 1
    assert counted == Counter(text.split()[0] for _, texts, _ in printed for text in texts)


def test_the_environment_says_how() -> None:
    assert repeat_rules_of({}) == RepeatRules(5.0)
    assert repeat_rules_of({"SHOAL_DEDUP_LOGS": "0", "SHOAL_DEDUP_LOGS_AGG_WINDOW_S": "x"}) is None
    variables = {
        "SHOAL_DEDUP_LOGS_AGG_WINDOW_S": "0.5",
        "SHOAL_DEDUP_LOGS_ALLOW_REGEX": "loss",
        "SHOAL_DEDUP_LOGS_SKIP_REGEX": "noise",
    }
    assert repeat_rules_of(variables) == RepeatRules(0.5, re.compile("loss"), re.compile("noise"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHOAL_DEDUP_LOGS_AGG_WINDOW_S", "soon"),
        ("SHOAL_DEDUP_LOGS_AGG_WINDOW_S", "0"),
        ("SHOAL_DEDUP_LOGS_AGG_WINDOW_S", "nan"),
        ("SHOAL_DEDUP_LOGS_ALLOW_REGEX", "("),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        repeat_rules_of({name: value})
