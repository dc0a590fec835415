"""Saying something once."""

from __future__ import annotations

import pytest

from shoal.util import debug, disable_log_once_globally, enable_periodic_logging, log_once


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "_said", debug._Said())


def test_each_key_is_new_once() -> None:
    assert [log_once("a"), log_once("a"), log_once("b"), log_once("a")] == [True, False, True, False]


def test_periodically_it_is_new_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("shoal.util.debug.time.monotonic", lambda: now)
    debug._said.since = now
    enable_periodic_logging()
    assert [log_once("a"), log_once("a")] == [True, False]
    now += debug.PERIOD_SECONDS + 1
    assert [log_once("a"), log_once("a")] == [True, False]


def test_it_can_be_switched_off() -> None:
    disable_log_once_globally()
    assert not log_once("a")
