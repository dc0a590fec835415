"""Runtime environments: merging, naming, and setting variables."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.runtime.environments import (
    MOST_TEXT_BYTES,
    Fields,
    encoded,
    merged,
    package_name,
    parts_of,
    set_variables,
    shown,
)
from shoal_core.runtime.tasks.functions import digest

DIGEST = digest(b"package")
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "env_vars": st.dictionaries(st.sampled_from("ABC"), st.text(max_size=3), max_size=3),
        "working_dir": st.sampled_from([package_name(digest(b"1")), package_name(digest(b"2"))]),
        "py_modules": st.lists(st.just(package_name(DIGEST)), max_size=2),
    },
)


@given(FIELDS, FIELDS, FIELDS)
def test_children_of_children_have_what_was_said_last(first: Fields, second: Fields, third: Fields) -> None:
    assert merged(merged(first, second), third) == merged(first, merged(second, third))
    assert merged({}, first) == merged(first, {}) == merged(first, first) == first
    assert merged(first, second).keys() == first.keys() | second.keys()


def test_variables_of_the_child_are_added() -> None:
    assert merged({"env_vars": {"A": "1", "B": "1"}}, {"env_vars": {"B": "2"}}) == {"env_vars": {"A": "1", "B": "2"}}


def test_equal_environments_have_one_name() -> None:
    one = encoded({"env_vars": {"A": "1", "B": "2"}, "py_modules": []})
    other = encoded({"py_modules": [], "env_vars": {"B": "2", "A": "1"}})
    assert one is not None
    assert one == other
    assert encoded({}) is None
    with pytest.raises(ValueError, match="as JSON"):
        encoded({"env_vars": {"A": "x" * MOST_TEXT_BYTES}})


def test_a_long_environment_is_shown_by_its_keys() -> None:
    assert shown({"env_vars": {"A": "1"}}) == '{"env_vars":{"A":"1"}}'
    assert shown({"env_vars": {"A": "x" * MOST_TEXT_BYTES}}) == '{"env_vars":"(long)"}'


def test_an_environment_knows_its_parts() -> None:
    assert parts_of({}) == parts_of({"worker_process_setup_hook": "module.function"}) == []
    fields = {"working_dir": package_name(DIGEST), "worker_process_setup_hook": "function:abc"}
    assert parts_of({**fields, "py_modules": [package_name(digest(b"x"))]}) == [DIGEST, digest(b"x"), "abc"]


def test_variables_may_refer_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHOAL_T_PATH", "SHOAL_T_GONE", "SHOAL_T_NEW"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SHOAL_T_PATH", "/old")
    monkeypatch.setenv("SHOAL_T_NEW", "")
    set_variables({"SHOAL_T_PATH": "/new:${SHOAL_T_PATH}", "SHOAL_T_NEW": "a${SHOAL_T_GONE}b"})
    assert (os.environ["SHOAL_T_PATH"], os.environ["SHOAL_T_NEW"]) == ("/new:/old", "ab")


def test_the_import_path_is_a_variable_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/old"])
    monkeypatch.setenv("PYTHONPATH", "")
    set_variables({"PYTHONPATH": "/one:/old:/two"})
    assert sys.path == ["/one", "/two", "/old"]
