"""Labels of nodes and selectors: what is allowed, and what a selector means."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.labels import as_value, check_labels, check_value, parse_selector, system_labels
from shoal_core.protocol.placement import Condition, Operator, all_met


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"zone": "a", "gpu_type": "A100", "empty": ""},
        {"abc.com/1234567890-_.abcXYZ": "1234567890-_.abcXYZ", "x" * 63: "y" * 63},
        {"ray.io/accelerator-type": "H100", "ray.io/market-type": "spot", "ray.io/availability-zone": "eu-1a"},
    ],
)
def test_labels_that_a_node_may_have(labels: dict[str, str]) -> None:
    check_labels(labels)


@pytest.mark.parametrize(
    ("labels", "error", "names"),
    [
        ([("a", "b")], TypeError, "dict of str to str, got list"),
        ({1: "a"}, TypeError, "1: 'a'"),
        ({"a": 1}, TypeError, "'a': 1"),
        ({"": "a"}, ValueError, "key ''"),
        ({"-a": "a"}, ValueError, "key '-a'"),
        ({"a b": "a"}, ValueError, "key 'a b'"),
        ({"x" * 64: "a"}, ValueError, "at most 63"),
        ({"A.com/a": "a"}, ValueError, "DNS subdomain"),
        ({"a..b/a": "a"}, ValueError, "DNS subdomain"),
        ({"/a": "a"}, ValueError, "DNS subdomain"),
        ({"a/b/c": "a"}, ValueError, "DNS subdomain"),
        ({"a" * 254 + "/a": "a"}, ValueError, "253"),
        ({"a/": "a"}, ValueError, "key 'a/'"),
        ({"a": "b c"}, ValueError, "value 'b c'"),
        ({"a": "b-"}, ValueError, "value 'b-'"),
        ({"a": "b\n"}, ValueError, r"value 'b\\n'"),
        ({"a": "x" * 64}, ValueError, "at most 63"),
        ({"ray.io/node-id": "a"}, ValueError, "reserved prefix"),
        ({"ray.io/anything": "a"}, ValueError, "reserved prefix"),
        ({"shoal.io/hostname": "a"}, ValueError, "reserved prefix"),
    ],
)
def test_labels_that_it_may_not_have_are_named(labels: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        check_labels(labels)


@given(st.text())
def test_any_text_becomes_a_value(text: str) -> None:
    check_value(as_value(text))


def test_every_node_has_the_labels_of_the_system() -> None:
    assert system_labels("0" * 16, "my_host.lan") == {"ray.io/node-id": "0" * 16, "shoal.io/hostname": "my_host.lan"}
    assert system_labels("0" * 16, "h", "A100")["ray.io/accelerator-type"] == "A100"


@pytest.mark.parametrize(
    ("selected", "operator", "values"),
    [
        ("a", Operator.IN, ("a",)),
        ("", Operator.IN, ("",)),
        ("!a", Operator.NOT_IN, ("a",)),
        ("in(a)", Operator.IN, ("a",)),
        ("in(a,b, c)", Operator.IN, ("a", "b", "c")),
        ("!in(a,b)", Operator.NOT_IN, ("a", "b")),
        ("in", Operator.IN, ("in",)),
    ],
)
def test_a_selector_is_a_condition_for_each_key(selected: str, operator: Operator, values: tuple[str, ...]) -> None:
    assert parse_selector("label_selector", {"x": "y", "zone": selected}) == (
        Condition("x", Operator.IN, ("y",)),
        Condition("zone", operator, values),
    )


def test_a_node_without_the_label_is_not_of_its_values() -> None:
    assert all_met(parse_selector("label_selector", {"zone": "!a"}), {})
    assert not all_met(parse_selector("label_selector", {"zone": "in(a,b)"}), {})


@pytest.mark.parametrize(
    ("selector", "error", "names"),
    [
        ("zone=a", TypeError, "type of label_selector is str"),
        ({1: "a"}, TypeError, "1: 'a'"),
        ({"a": ["b"]}, TypeError, r"'a': \['b'\]"),
        ({"a b": "a"}, ValueError, "label_selector.*key 'a b'"),
        ({"a": "!!b"}, ValueError, "label_selector.*'!!b' is none of"),
        ({"a": "in(b"}, ValueError, "is none of"),
        ({"a": "in(b))"}, ValueError, "is none of"),
        ({"a": "out(b)"}, ValueError, "is none of"),
        ({"a": "b,c"}, ValueError, "is none of"),
        ({"a": "in()"}, ValueError, "empty value"),
        ({"a": "in(b,)"}, ValueError, "empty value"),
        ({"a": "b c"}, ValueError, "value 'b c'"),
        ({"a": "in(b c)"}, ValueError, "value 'b c'"),
    ],
)
def test_what_is_no_selector_is_named(selector: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        parse_selector("label_selector", selector)
