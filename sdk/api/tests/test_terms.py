"""What a program may claim, and the error for what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.actor_options import check_actor, resolve_actor
from shoal.options import check, resolve
from shoal.terms import terms_of
from shoal_core.protocol.messages import JobTerms


def test_terms_are_what_was_given() -> None:
    assert terms_of(0, 1.0, None) == JobTerms()
    given = terms_of(-3, 2, {"CPU": 8, "GPU": 0.5, "licence": 0})
    assert given == JobTerms(priority=-3, weight=2.0, quotas={"CPU": 80_000, "GPU": 5_000, "licence": 0})


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"priority": 1.5}, TypeError, "priority is float; it must be an int"),
        ({"priority": True}, TypeError, "priority is bool"),
        ({"priority": 1001}, ValueError, "between -1000 and 1000"),
        ({"weight": "2"}, TypeError, "weight must be a number, got str"),
        ({"weight": 0}, ValueError, "weight must be between 0.001 and 1000, got 0"),
        ({"weight": float("nan")}, ValueError, "got nan"),
        ({"quotas": [8]}, TypeError, "quotas must be a dict of resource names to amounts, got list"),
        ({"quotas": {1: 8}}, TypeError, "got the name 1"),
        ({"quotas": {"CPU": "8"}}, TypeError, r"quotas\['CPU'\] must be a number, got str"),
        ({"quotas": {"CPU": -1}}, ValueError, r"quotas\['CPU'\] is wrong: .*negative"),
        ({"quotas": {"CPU": 0.00001}}, ValueError, "at least 0.0001"),
    ],
)
def test_a_wrong_term_is_an_error(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        terms_of(**{"priority": 0, "weight": 1.0, "quotas": None, **wrong})


def test_priorities_of_tasks_and_actors_are_checked_and_used() -> None:
    assert resolve({"priority": 5}, "f").scheduling_class.priority == 5
    assert resolve({}, "f").scheduling_class.priority is None, "that of whoever submits it"
    assert resolve_actor({"priority": -2}).priority == -2
    assert resolve_actor({}).priority is None
    for checked in (check, check_actor):
        with pytest.raises(TypeError, match="priority"):
            checked({"priority": "high"})
        with pytest.raises(ValueError, match="between -1000 and 1000"):
            checked({"priority": 5000})
