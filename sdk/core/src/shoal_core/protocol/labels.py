"""Labels of nodes: which keys and values there may be, and the selectors by which they are chosen.

The syntax is that of Kubernetes, as Ray has it: a key is a name, or a DNS subdomain, a slash and a name; names and
values have at most 63 letters, digits, ``-``, ``_`` and ``.``, and begin and end with a letter or a digit. A value may
be empty.

The system sets the labels of ``SYSTEM_LABELS`` itself. All other keys of the prefixes ``ray.io/`` and ``shoal.io/`` are
reserved, but for those that describe a machine in Ray's words and that only its operator can know (``DESCRIPTIVE``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shoal_core.protocol.placement import Condition, Conditions, Operator

NODE_ID = "ray.io/node-id"
ACCELERATOR_TYPE = "ray.io/accelerator-type"
HOSTNAME = "shoal.io/hostname"
SYSTEM_LABELS = frozenset({NODE_ID, HOSTNAME})
DESCRIPTIVE = frozenset(
    {
        ACCELERATOR_TYPE,
        "ray.io/availability-region",
        "ray.io/availability-zone",
        "ray.io/gpu-domain",
        "ray.io/market-type",
        "ray.io/node-group",
    }
)
RESERVED_PREFIXES = ("ray.io/", "shoal.io/")
MOST_NAME_CHARACTERS = 63
MOST_PREFIX_CHARACTERS = 253

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_SELECTED = re.compile(r"(?P<negated>!?)(?:in\((?P<values>[^()]*)\)|(?P<value>[^()!,]*))")
_UNWANTED = re.compile(r"[^A-Za-z0-9_.-]+")


def check_labels(labels: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` for the first label that a node may not be given."""
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels must be a dict of str to str, got {type(labels).__name__}.")
    for key, value in labels.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"labels must be a dict of str to str, got {key!r}: {value!r}.")
        check_key(key)
        check_value(value)
        if key.startswith(RESERVED_PREFIXES) and key not in DESCRIPTIVE:
            raise ValueError(
                f"The label {key!r} has a reserved prefix: labels of {' and '.join(RESERVED_PREFIXES)} are the "
                f"system's. Only these may be given: {', '.join(sorted(DESCRIPTIVE))}."
            )


def check_key(key: str) -> None:
    """Raise ``ValueError`` for what cannot be the key of a label."""
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > MOST_PREFIX_CHARACTERS or not _PREFIX.fullmatch(prefix)):
        raise ValueError(
            f"The label key {key!r} has a wrong prefix: it must be a DNS subdomain (lower-case letters, digits, '-' "
            f"and '.') of at most {MOST_PREFIX_CHARACTERS} characters."
        )
    if len(name) > MOST_NAME_CHARACTERS or not _NAME.fullmatch(name):
        raise ValueError(f"The label key {key!r} is wrong: its name must {_MUST}.")


def check_value(value: str) -> None:
    """Raise ``ValueError`` for what cannot be the value of a label."""
    if value and (len(value) > MOST_NAME_CHARACTERS or not _NAME.fullmatch(value)):
        raise ValueError(f"The label value {value!r} is wrong: it must be empty or {_MUST}.")


_MUST = (
    f"have at most {MOST_NAME_CHARACTERS} letters, digits, '-', '_' and '.', and begin and end with a letter or a digit"
)


def as_value(text: str) -> str:
    """Return a text, such as the name of a host, as the value of a label: what cannot be in one becomes ``-``."""
    return _UNWANTED.sub("-", text)[:MOST_NAME_CHARACTERS].strip("-_.")


def system_labels(node_id: str, hostname: str, accelerator_type: str = "") -> dict[str, str]:
    """Return the labels that every node has, and that of its accelerators if it has any."""
    labels = {NODE_ID: node_id, HOSTNAME: as_value(hostname)}
    return {**labels, ACCELERATOR_TYPE: accelerator_type} if accelerator_type else labels


def parse_selector(name: str, selector: Any) -> Conditions:
    """Return what a label selector means: ``{"key": "v" | "!v" | "in(a,b)" | "!in(a,b)"}``, all of which must be met.

    Raises ``TypeError`` and ``ValueError``, which call it by ``name``.
    """
    if not isinstance(selector, Mapping):
        raise TypeError(f"The type of {name} is {type(selector).__name__}; it must be a dict of label keys to str.")
    return tuple(_parse(name, key, value) for key, value in selector.items())


def _parse(name: str, key: Any, selected: Any) -> Condition:
    if not (isinstance(key, str) and isinstance(selected, str)):
        raise TypeError(f"{name} must be a dict of str to str, got {key!r}: {selected!r}.")
    parsed = _SELECTED.fullmatch(selected)
    try:
        check_key(key)
        if parsed is None:
            raise ValueError(f"{selected!r} is none of 'v', '!v', 'in(a,b)' and '!in(a,b)'.")
        listed = parsed["values"]
        values = (parsed["value"],) if listed is None else tuple(value.strip() for value in listed.split(","))
        if listed is not None and not all(values):
            raise ValueError(f"{selected!r} lists an empty value.")
        for value in values:
            check_value(value)
    except ValueError as error:
        raise ValueError(f"The value of {name} is wrong at {key!r}: {error}") from None
    return Condition(key, Operator.NOT_IN if parsed["negated"] else Operator.IN, values)
