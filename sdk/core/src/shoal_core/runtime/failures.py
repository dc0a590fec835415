"""Exceptions on their way: how one of user code travels, and which one a failed value stands for."""

from __future__ import annotations

import os
import pickle
import reprlib
import traceback
from collections.abc import Sequence
from typing import Any

from shoal_core.protocol.errors import ActorDiedError, TaskError, UnserializableException, from_wire
from shoal_core.protocol.records import Failed
from shoal_core.runtime.serialization import Codec


def failure(name: str, error: BaseException) -> Failed:
    """Return an exception of user code as it travels: with its remote traceback, and pickled if it can be."""
    frames = traceback.format_exception(type(error), error, _user_frames(error))
    text = f"{name}() (pid={os.getpid()}, ip={_address()})\n" + "".join(frames).rstrip()
    return Failed("task", text, pickle_error(name, text, error))


def pickle_error(name: str, text: str, error: BaseException) -> bytes:
    """Pickle a ``TaskError``; where its cause cannot travel, with the cause's text instead."""
    import cloudpickle

    error.__traceback__ = None
    cause = error.cause if isinstance(error, TaskError) else error
    try:
        data: bytes = cloudpickle.dumps(TaskError(name, text, cause), protocol=5)
        pickle.loads(data)
    except Exception as reason:
        substitute = UnserializableException(f"{type(cause).__name__}: {cause} (it could not be pickled: {reason})")
        data = pickle.dumps(TaskError(name, text, substitute), 5)
    return data


_OUR_FOLDER = os.path.dirname(__file__)


def _user_frames(error: BaseException) -> Any:
    """Return the traceback from the user's first frame on."""
    frames = error.__traceback__
    while frames is not None and os.path.dirname(frames.tb_frame.f_code.co_filename) == _OUR_FOLDER:
        frames = frames.tb_next
    return frames


def _address() -> str:
    return os.environ.get("SHOAL_NODE_ADDRESS", "127.0.0.1")


def error_of(value: Failed) -> Exception:
    """Return the exception that a failed value stands for."""
    if value.code == "actor_died":
        return _actor_died(value)
    if value.data:
        try:
            error = pickle.loads(value.data)
        except Exception as reason:
            return TaskError("task", f"{value.text}\n(the exception could not be unpickled here: {reason})", reason)
        return error.as_instanceof_cause() if isinstance(error, TaskError) else error
    return from_wire(value.code, value.text)


def _actor_died(value: Failed) -> ActorDiedError:
    """Return the error of calls of a dead actor; its cause is what ``__init__`` raised, if it did."""
    error = ActorDiedError(value.text)
    if value.data:
        try:
            cause = pickle.loads(value.data)
        except Exception as reason:
            cause = TaskError("__init__", f"{value.text}\n(the exception could not be unpickled: {reason})", reason)
        error.cause = error.__cause__ = cause.as_instanceof_cause() if isinstance(cause, TaskError) else cause
    return error


def culprit(codec: Codec, args: Sequence[Any], kwargs: dict[str, Any], error: BaseException) -> str:
    """Say which argument cannot be pickled."""
    named = [*((f"argument {index}", arg) for index, arg in enumerate(args)), *kwargs.items()]
    for name, value in named:
        try:
            codec.dump(value)
        except Exception as reason:
            return f"{name}, {reprlib.repr(value)} of type {type(value).__name__}, cannot be pickled: {reason}"
    return str(error)
