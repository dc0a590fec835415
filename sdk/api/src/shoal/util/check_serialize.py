"""Why something cannot be sent to another process: a search for the innermost parts that cannot be pickled."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import reprlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from shoal_core.runtime.data.failures import said
from shoal_core.runtime.data.serialization import dumps_uncounted

MOST_ITEMS = 1000
"""So many items of a container are looked at, so that a huge one does not take for ever."""
LINE = "=" * 80

_texts = reprlib.Repr()
_texts.maxother = _texts.maxstring = 100


class FailureTuple:
    """Something that cannot be pickled: the object, the name it goes by, and the object it was found in."""

    def __init__(self, obj: Any, name: str, parent: Any) -> None:
        self.obj = obj
        self.name = name
        self.parent = parent

    def __repr__(self) -> str:
        return f"FailTuple({self.name} [obj={_short(self.obj)}, parent={_short(self.parent)}])"


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int = 3, print_file: TextIO | None = None
) -> tuple[bool, set[FailureTuple]]:
    """Tell whether an object can be pickled, as for another process; if not, find what in it is to blame.

    Looks into closures, globals and defaults of functions, attributes of objects and classes, and items of containers,
    ``depth`` levels deep, and prints what it finds as a tree to ``print_file`` (the standard output by default).
    Returns whether it can be pickled, and the innermost parts that cannot: each a ``FailureTuple`` with ``obj``,
    ``name`` and ``parent``. Nothing is sent, and references inside are not kept.
    """
    if depth < 0:
        raise ValueError(f"depth must not be negative, got {depth}.")
    search = _Search(print_file or sys.stdout)
    found = search.run(base_obj, name or getattr(base_obj, "__qualname__", None) or _short(base_obj), depth)
    return not found, set(found)


class _Search:
    """One search; what it finds is printed as it is found."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._seen: dict[int, Any] = {}

    def run(self, obj: Any, name: str, depth: int) -> list[FailureTuple]:
        """Return the innermost failures of an object."""
        self._print(f"{LINE}\nChecking serializability of {name}\n{LINE}")
        error = _error_of(obj)
        if error is None:
            self._print("It can be pickled.")
            return []
        self._print(f"!!! FAIL: {said(error)}")
        self._seen[id(obj)] = obj
        found = self._look_into(obj, depth, 1) or [FailureTuple(obj, name, obj)]
        names = "\n".join(f"    {failure!r}" for failure in found)
        self._print(
            f"{LINE}\nCannot be pickled:\n{names}\n"
            "Make these objects where they are used, inside the function or the actor, instead of sending them; or\n"
            "leave them out (__getstate__), or say how to pickle them (shoal.util.register_serializer).\n"
            "There may be others, behind those that were found.\n" + LINE
        )
        return found

    def _look_into(self, obj: Any, depth: int, level: int) -> list[FailureTuple]:
        """Return the innermost failures below an object that cannot be pickled; none where it is to blame itself."""
        if depth == 0:
            return []
        found: list[FailureTuple] = []
        for kind, name, part in _parts(obj):
            if id(part) in self._seen or (error := _error_of(part)) is None:
                continue
            self._seen[id(part)] = part
            self._print(f"{'    ' * level}{kind} {name} = {_short(part)}\n{'    ' * level}!!! FAIL: {said(error)}")
            found += self._look_into(part, depth - 1, level + 1) or [FailureTuple(part, name, obj)]
        return found

    def _print(self, text: str) -> None:
        print(text, file=self._file)


def _error_of(obj: Any) -> Exception | None:
    """Return what keeps an object from being pickled; user code may raise anything there."""
    try:
        dumps_uncounted(obj)
    except Exception as error:
        return error
    return None


def _parts(obj: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield what an object consists of, as far as its pickle would hold that: the kind of each part, its name, it."""
    if isinstance(obj, types.FunctionType):
        yield from _parts_of_function(obj)
    elif isinstance(obj, types.MethodType):
        yield "object", "__self__", obj.__self__
        yield "function", "__func__", obj.__func__
    elif isinstance(obj, functools.partial):
        yield "function", "func", obj.func
        yield from _items("argument", enumerate(obj.args))
        yield from _items("argument", obj.keywords.items())
    elif isinstance(obj, type):
        yield from _parts_of_class(obj)
    elif isinstance(obj, Mapping):
        yield from _items("item", obj.items())
    elif isinstance(obj, (list, tuple, set, frozenset)):
        yield from _items("item", enumerate(obj))
    if not isinstance(obj, (type, types.FunctionType)):
        yield from _attributes(obj)
        if not _is_importable(type(obj)):
            yield "class", type(obj).__qualname__, type(obj)


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    if (wrapped := getattr(function, "__wrapped__", None)) is not None:
        yield "function", "__wrapped__", wrapped
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield "closure variable", name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in sorted(_global_names(function.__code__) & function.__globals__.keys()):
        yield "global variable", name, function.__globals__[name]
    yield from _items("default", enumerate(function.__defaults__ or ()))
    yield from _items("default", (function.__kwdefaults__ or {}).items())
    yield from _items("attribute", vars(function).items())


def _parts_of_class(cls: type) -> Iterator[tuple[str, str, Any]]:
    for name, value in vars(cls).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if name not in ("__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl"):
            yield ("method" if inspect.isfunction(value) else "attribute"), name, value
    for base in cls.__bases__:
        if not _is_importable(base):
            yield "base class", base.__qualname__, base


def _attributes(obj: Any) -> Iterator[tuple[str, str, Any]]:
    yield from _items("attribute", getattr(obj, "__dict__", {}).items())
    for cls in type(obj).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if name not in ("__dict__", "__weakref__") and hasattr(obj, name):
                yield "attribute", name, getattr(obj, name)


def _items(kind: str, items: Any) -> Iterator[tuple[str, str, Any]]:
    for name, value in itertools.islice(list(items), MOST_ITEMS):
        yield kind, name if isinstance(name, str) else _short(name), value


def _global_names(code: types.CodeType) -> set[str]:
    """Return the names of the globals that code reads, that of functions inside it included."""
    names = {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _is_importable(cls: type) -> bool:
    """Tell whether a class is pickled by its name alone."""
    module = sys.modules.get(cls.__module__)
    return cls.__module__ != "__main__" and getattr(module, cls.__name__, None) is cls


def _short(obj: Any) -> str:
    """Return a short text of an object, whatever its ``__repr__`` does."""
    try:
        return _texts.repr(obj)
    except Exception as error:
        return f"<{type(obj).__name__}, whose repr raises {type(error).__name__}>"
