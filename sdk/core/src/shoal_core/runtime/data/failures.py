"""Exceptions on their way: how one of user code travels, and which one a failed value stands for.

What leaves user code is always reported, with its class, its text and its traceback; the exception itself comes along
where it can be pickled here and unpickled there. User code has a say in all of this (``__str__``, ``__reduce__``,
constructors), and whatever it raises there only costs the exception itself its place.
"""

from __future__ import annotations

import os
import pickle
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import shoal_core
from shoal_core.protocol.errors import (
    ActorDiedError,
    ActorError,
    RuntimeEnvSetupError,
    ShoalError,
    TaskError,
    UnserializableException,
    from_wire,
)
from shoal_core.protocol.records import Failed
from shoal_core.runtime.data.serialization import Codec, Serialized, dumps

MOST_TEXT_CHARACTERS = 1_000_000
"""Longer texts are cut in the middle: they are for people."""


def failure(codec: Codec, name: str, error: BaseException) -> tuple[Failed, Serialized]:
    """Return an exception of user code as it travels, and its pickle, which holds the references inside it."""
    text = _text(name, error)
    pickled = _pickle(name, text, error, codec.dump_whole)
    return Failed("task", text, pickled.data, pickled.contained), pickled


def lasting_failure(name: str, error: BaseException) -> tuple[str, bytes]:
    """Return the text and the pickle of an exception that outlives this process; references inside are not counted."""
    text = _text(name, error)
    return text, _pickle(name, text, error, lambda value: Serialized(dumps(value))).data


def _text(name: str, error: BaseException) -> str:
    """Return where the exception was raised and its traceback, as far as it is of the user's code."""
    shown = traceback.TracebackException(type(error), error, _user_frames(error))
    _leave_out_ours(shown, error)
    return sendable(_cut(f"{name}() (pid={os.getpid()}, ip={_address()})\n{''.join(shown.format()).rstrip()}"))


def _pickle(name: str, text: str, error: BaseException, dump: Callable[[Any], Serialized]) -> Serialized:
    """Pickle a ``TaskError``; where its cause cannot travel, with the cause's text instead."""
    error.__traceback__ = None
    cause = error.cause if isinstance(error, TaskError) else error
    try:
        pickled = dump(TaskError(name, text, cause))
        pickle.loads(pickled.data)
    except Exception as reason:
        return dump(TaskError(name, text, UnserializableException(_unserializable(cause, reason))))
    return pickled


def _unserializable(cause: BaseException, reason: Exception) -> str:
    """Return what is left of an exception that cannot travel."""
    return _cut(f"{said(cause)} (the exception itself cannot be pickled and unpickled: {said(reason)})")


def said(error: BaseException) -> str:
    """Return the class and the text of an exception, whatever its ``__str__`` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as reason:
        return f"{type(error).__name__} (whose text raises {type(reason).__name__})"


def sendable(text: str) -> str:
    """Return a text with escapes in place of surrogates, as in names of files that are not UTF-8: else none is sent."""
    return text.encode(errors="backslashreplace").decode()


def _cut(text: str) -> str:
    if len(text) <= MOST_TEXT_CHARACTERS:
        return text
    half = MOST_TEXT_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters were left out …\n{text[-half:]}"


_CORE = os.path.dirname(shoal_core.__file__) + os.sep


def _is_ours(filename: str) -> bool:
    """Tell whether a frame stands between user code and what that asked for; those of ``shoal.util`` do not."""
    api = sys.modules.get("shoal")
    return filename.startswith(_CORE) or (
        api is not None and os.path.dirname(filename) == os.path.dirname(api.__file__ or "")
    )


def _user_frames(error: BaseException) -> Any:
    """Return the traceback from the user's first frame on, or the whole where there is none."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return frames or error.__traceback__


def _leave_out_ours(shown: traceback.TracebackException, error: BaseException) -> None:
    """Leave out how Shoal came to raise its own errors, such as in a ``get`` that of another task.

    The frames of any other exception stay: where it was raised in Shoal, they are the only trace of a mistake.
    """
    pairs: list[tuple[traceback.TracebackException | None, BaseException | None]] = [(shown, error)]
    while pairs:
        shows, of = pairs.pop()
        if shows is None or of is None:
            continue
        if isinstance(of, ShoalError):
            shows.stack[:] = [frame for frame in shows.stack if not _is_ours(frame.filename)]
        pairs += [(shows.__cause__, of.__cause__), (shows.__context__, of.__context__)]
        if isinstance(of, BaseExceptionGroup):
            pairs += zip(shows.exceptions or (), of.exceptions, strict=False)


def _address() -> str:
    return os.environ.get("SHOAL_NODE_ADDRESS", "127.0.0.1")


def error_of(value: Failed) -> Exception:
    """Return the exception that a failed value stands for.

    Where it kept a task from being run it is a ``TaskError`` as well, as in Ray: that of the task.
    """
    error = _error_of(value)
    if not value.kept_from or isinstance(error, TaskError):
        return error
    text = f"{value.kept_from}() was not run: one of its arguments could not be computed.\n{said(error)}"
    return TaskError(value.kept_from, text, error).as_instanceof_cause()


def _error_of(value: Failed) -> Exception:
    if value.code == "actor_died":
        return _actor_died(value)
    if value.data:
        return _unpickled(value, "task")
    error = from_wire(value.code, value.text)
    if isinstance(error, ActorError):
        error.actor_id = value.actor or None
    return error


def _actor_died(value: Failed) -> ActorDiedError | RuntimeEnvSetupError:
    """Return the error of calls of a dead actor; its cause is what ``__init__`` raised, if it did.

    Where its process could not be set up for it, that is the error.
    """
    error = ActorDiedError(value.text)
    error.actor_id = value.actor or None
    if value.data:
        cause = _unpickled(value, "__init__")
        if isinstance(cause, RuntimeEnvSetupError):
            return cause
        error.cause = cause  # and not __cause__, which would be printed before the text, where it stands already
    return error


def _unpickled(value: Failed, name: str) -> Exception:
    """Return the exception whose pickle a failed value holds; where this process cannot read that, one with its text.

    It may be of a class whose module is only there where it was raised.
    """
    try:
        error: Exception = pickle.loads(value.data)
    except Exception as reason:
        text = f"{value.text}\n(the exception itself cannot be unpickled in this process: {said(reason)})"
        return TaskError(name, text, UnserializableException(text))
    return error.as_instanceof_cause() if isinstance(error, TaskError) else error


def culprit(codec: Codec, args: Sequence[Any], kwargs: dict[str, Any], error: BaseException) -> str:
    """Say which argument cannot be pickled."""
    named = [*((f"argument {index}", arg) for index, arg in enumerate(args)), *kwargs.items()]
    for name, value in named:
        try:
            codec.dump(value)
        except Exception as reason:
            return f"{name}, {reprlib.repr(value)} of type {type(value).__name__}, cannot be pickled: {reason}"
    return str(error)
