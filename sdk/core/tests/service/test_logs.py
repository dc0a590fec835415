"""Log lines as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from shoal_core.service.logs import JsonFormatter, set_up_logs


def line(level: int = logging.INFO, message: str = "text", *arguments: object, **more: Any) -> dict[str, Any]:
    """Return what a log record becomes."""
    error = more.pop("exc_info", None)
    record = logging.LogRecord("shoal.test", level, "file.py", 1, message, arguments, error)
    record.__dict__.update(more)
    text = JsonFormatter("gcs", "replica").format(record)
    assert "\n" not in text
    fields: dict[str, Any] = json.loads(text)
    return fields


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Keep the root logger and Shoal's as they were, whose level ``init`` may have set in this process."""
    root, shoal = logging.getLogger(), logging.getLogger("shoal")
    handlers, levels = root.handlers[:], (root.level, shoal.level)
    root.handlers = []
    shoal.setLevel(logging.NOTSET)
    yield root
    root.handlers = handlers
    root.setLevel(levels[0])
    shoal.setLevel(levels[1])


def test_a_line_says_when_how_bad_who_and_what() -> None:
    fields = line(logging.WARNING, "node %s is %s", "a", "dead")
    time = datetime.fromisoformat(fields.pop("time"))
    assert abs((datetime.now(UTC) - time).total_seconds()) < 60
    assert fields == {
        "level": "warning",
        "service": "gcs",
        "id": "replica",
        "logger": "shoal.test",
        "message": "node a is dead",
    }


def test_what_extra_adds_stands_in_the_line() -> None:
    assert line(node="n1", sizes=[1, 2])["node"] == "n1"
    assert line(odd=object)["odd"] == "<class 'object'>"


def test_an_exception_stays_on_the_line() -> None:
    try:
        raise ValueError("first line\nsecond line")
    except ValueError:
        fields = line(exc_info=sys.exc_info())
    assert "ValueError: first line\nsecond line" in fields["exception"]


def test_lines_go_to_standard_error_from_the_level_on(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("gcs", "replica", "warning", "json")
    logging.getLogger("shoal.x").info("not this")
    logging.getLogger("shoal.x").error("but\nthis")
    printed = capsys.readouterr()
    assert printed.out == ""
    [text] = printed.err.splitlines()
    assert json.loads(text)["message"] == "but\nthis"


def test_text_is_for_people(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("gcs", "replica", "info", "text")
    logging.getLogger("shoal.x").info("hello")
    assert capsys.readouterr().err.rstrip().endswith("INFO    shoal.x hello")
