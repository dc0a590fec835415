"""``LoggingConfig``: what is refused, and what log lines look like."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from shoal.driver import DriverOptions
from shoal.logging_config import LoggingConfig, log_settings_of
from shoal_core.protocol.messages import LogSettings
from shoal_core.runtime.reports.logs import set_up_logging


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    return lambda: capsys.readouterr().err.splitlines()


def settings(**options: Any) -> LogSettings:
    made = log_settings_of(LoggingConfig(**options))
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"encoding": "XML"}, "XML"),
        ({"log_level": "LOUD"}, "LOUD"),
        ({"additional_log_standard_attrs": ["colour"]}, "colour"),
    ],
)
def test_what_is_wrong_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoggingConfig(**wrong)


def test_only_a_logging_config_is_one() -> None:
    assert DriverOptions.of(None, None, None, True, logging.INFO).logging is None
    with pytest.raises(TypeError, match="dict"):
        DriverOptions.of(None, None, None, True, logging.INFO, logging_config={"encoding": "JSON"})


def test_json_has_a_record_in_each_line(written: Callable[[], list[str]]) -> None:
    set_up_logging(settings(encoding="JSON", additional_log_standard_attrs=["name"]))
    logger = logging.getLogger("mine")
    logger.debug("unseen")
    logger.info("number %d", 1, extra={"colour": "red"})
    try:
        raise ValueError("no such luck")
    except ValueError:
        logger.exception("it failed")
    first, second = map(json.loads, written())
    assert (first["message"], first["levelname"], first["name"], first["colour"]) == ("number 1", "INFO", "mine", "red")
    assert first["filename"] == "test_logging_config.py"
    assert isinstance(first["timestamp_ns"], int)
    assert "no such luck" in second["exc_text"]


def test_text_is_for_people(written: Callable[[], list[str]]) -> None:
    set_up_logging(settings(log_level="WARNING"))
    set_up_logging(settings(log_level="WARNING"))
    logging.getLogger("mine").info("unseen")
    logging.getLogger("mine").warning("seen", extra={"colour": "red"})
    (line,) = written()
    assert "WARNING test_logging_config.py:" in line
    assert line.endswith("-- seen colour=red")
