"""Asking a Prometheus: whether a query returns numbers, and what a panel has shown."""

from __future__ import annotations

import json
import math
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Series:
    """One series: its labels, and its values by time (a single one for a query at one time)."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def filled_in(expression: str, window: str = "1m") -> str:
    """Return a panel's query with what Grafana puts in for its variables."""
    return expression.replace("$__rate_interval", window)


def query(address: str, expression: str) -> list[Series]:
    """Return what an expression is now; ``urllib.error.HTTPError`` where it is wrong."""
    found = _get(address, "query", query=expression)
    return [Series(one["metric"], [_point(one["value"])]) for one in found["result"]]


def query_range(address: str, expression: str, begin: float, end: float, step: float) -> list[Series]:
    """Return what an expression has been between two times, every ``step`` seconds."""
    found = _get(address, "query_range", query=expression, start=begin, end=end, step=step)
    return [Series(one["metric"], [_point(pair) for pair in one["values"]]) for one in found["result"]]


def rules(address: str) -> list[dict[str, Any]]:
    """Return all rules with their health."""
    return [rule for group in _get(address, "rules")["groups"] for rule in group["rules"]]


def has_data(series: list[Series]) -> bool:
    """Tell whether a query returned a number, and nothing that is none."""
    values = [value for one in series for _, value in one.points]
    return bool(values) and not any(math.isnan(value) for value in values)


def measured(expression: str) -> list[str]:
    """Return what an alert measures: its expression without the bounds, one part for each clause."""
    clauses = re.split(r"\s+and(?:\s+on\s*\(\))?\s+", expression)
    return [re.sub(r"\s*[<>]=?\s*[0-9.e]+\s*$", "", clause) for clause in clauses]


def _get(address: str, what: str, **parameters: Any) -> Any:
    """Return the data of an answer of Prometheus' API."""
    url = f"{address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)["data"]


def _point(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
