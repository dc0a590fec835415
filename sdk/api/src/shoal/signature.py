"""Whether arguments fit a function, told at the call, before anything is sent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Arguments:
    """The arguments a function takes. ``self`` is left out with ``bound=True``; what has no signature takes all.

    It is looked at with the first call: one that refers to itself is not whole yet when its pickle is read.
    """

    __slots__ = ("_bound", "_fewest", "_function", "_most", "_name", "_signature")

    def __init__(self, function: Callable[..., Any], name: str, *, bound: bool = False) -> None:
        self._function: Callable[..., Any] | None = function
        self._name = name
        self._bound = bound
        self._fewest, self._most = 0, -1  # no call fits before the function was looked at
        self._signature: inspect.Signature | None = None

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise ``TypeError``, as calling the function would, unless the arguments fit."""
        if not kwargs and self._fewest <= len(args) <= self._most:
            return
        if self._function is not None:
            self._inspect(self._function)
            self._function = None
        if self._signature is not None:
            try:
                self._signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{self._name}.remote(): {error}") from None

    def _inspect(self, function: Callable[..., Any]) -> None:
        try:
            signature = inspect.signature(function)
        except (ValueError, TypeError):
            self._most = 1 << 30
            return
        parameters = list(signature.parameters.values())
        if self._bound and parameters and parameters[0].kind in _POSITIONAL:
            parameters = parameters[1:]
        self._signature = signature.replace(parameters=parameters)
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        required = [p for p in parameters if p.default is p.empty]
        if any(p.kind is p.KEYWORD_ONLY for p in required):
            return  # some keyword has to be there: every call is looked at
        self._fewest = sum(p in positional for p in required)
        several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self._most = 1 << 30 if several else len(positional)
