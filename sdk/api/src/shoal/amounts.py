"""Amounts and names as programs state them: what is none, or cannot be sent, is an error that says why."""

from __future__ import annotations

from typing import Any

from shoal_core.protocol.resources import UNIT, to_units


def check_sendable(what: str, text: str) -> None:
    """Raise ``ValueError`` for a text that cannot be sent, since it is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is {text!r}, which cannot be sent: {error.reason}.") from None


def check_amount(what: str, value: Any, *, devices: bool = False) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what is no amount of a resource; of ``devices`` only one is shared."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"The type of {what} is {type(value).__name__}; it must be a number, such as 1 or 0.5.")
    try:
        units = to_units(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"The value of {what} is wrong: {error}.") from None
    if devices and units > UNIT and units % UNIT:
        raise ValueError(f"The value of {what} is {value}; above 1 it must be a whole number.")
