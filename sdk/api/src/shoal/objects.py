"""get, put and wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

from shoal.session import runtime
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.ownership.streams import ObjectRefGenerator

T = TypeVar("T")
R = TypeVar("R", bound=ObjectRef[Any] | ObjectRefGenerator[Any])


@overload
def get(object_refs: ObjectRef[T], *, timeout: float | None = None) -> T: ...


@overload
def get(object_refs: Sequence[ObjectRef[T]], *, timeout: float | None = None) -> list[T]: ...


def get(object_refs: Any, *, timeout: float | None = None) -> Any:
    """Return the value of a reference, or the list of values of a list of them, waiting until they are ready.

    ``timeout`` is in seconds; 0 only looks, and -1 means none, as in Ray. Raises ``GetTimeoutError``, or the first
    error among the objects as soon as it is known: an exception of user code is raised as an instance of its own class
    that is a ``TaskError`` as well. Arrays are read-only views of shared memory where they are large.
    """
    if timeout is not None and timeout < 0:
        if timeout != -1:
            raise ValueError(f"timeout must not be negative, got {timeout}.")
        timeout = None
    if type(object_refs) is ObjectRef:
        return runtime().get((object_refs,), timeout)[0]
    if isinstance(object_refs, ObjectRefGenerator):
        return object_refs
    if not isinstance(object_refs, (list, tuple)):
        raise ValueError(
            f"Invalid type of object refs, {type(object_refs).__name__}, is given. 'object_refs' must either be an "
            "ObjectRef or a list of ObjectRefs."
        )
    _check(object_refs, "get", {ObjectRef})
    return runtime().get(object_refs, timeout) if object_refs else []


def put(value: T, *, durable: bool | None = None, keep_seconds: float | None = None) -> ObjectRef[T]:
    """Make an object of a value and return a reference to it; it lives as long as anybody refers to it.

    A ``durable`` object is also kept in the cluster's durable tier, which has it when this returns. So it survives its
    owner (this process) and its node: who refers to it reads it from there. It goes, like any object, when nobody
    refers to it any more; once its owner is gone, with the end of the job, and in any case after ``keep_seconds``, if
    given. References inside it are not made durable with it. By default, what the process of a detached actor puts is
    durable, and nothing else.

    Raises ``TypeError`` where the value is a reference itself or cannot be pickled, ``ValueError`` for ``keep_seconds``
    of an object that is not durable, or not above zero, and ``ObjectStoreFullError``.
    """
    if type(value) is ObjectRef:
        raise TypeError(
            "Calling put() on an ObjectRef is not allowed. If you really want a reference to a reference, wrap it in a "
            "list: put([ref])."
        )
    if durable is None and keep_seconds is None:
        return runtime().put(value)
    if keep_seconds is not None and (durable is False or not keep_seconds > 0):
        raise ValueError(
            f"keep_seconds must be a number of seconds above 0, for a durable object; got {keep_seconds!r} with "
            f"durable={durable!r}."
        )
    return runtime().put(value, durable=durable or keep_seconds is not None, keep_seconds=keep_seconds)


def wait(
    object_refs: Sequence[R], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[R], list[R]]:
    """Wait until ``num_returns`` of the objects are ready; return those and the others, both in the order given.

    After ``timeout`` seconds fewer may be ready. An object whose task failed is ready. A generator may stand among the
    references: it is ready when its next item is, or when it has ended. ``fetch_local`` is accepted;
    large objects are read where they lie. Raises ``TypeError`` for anything but a list of references, and
    ``ValueError`` for duplicates and for a number of objects that cannot be.
    """
    if isinstance(object_refs, ObjectRef):
        raise TypeError("wait() expected a list of ObjectRefs, got a single ObjectRef.")
    if not isinstance(object_refs, (list, tuple)):
        raise TypeError(f"wait() expected a list of ObjectRefs, got {type(object_refs).__name__}.")
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout must not be negative, got {timeout}.")
    _check(object_refs, "wait", {ObjectRef, ObjectRefGenerator})
    if len(set(object_refs)) != len(object_refs):
        raise ValueError("wait() requires a list of unique ObjectRefs.")
    if not object_refs:
        return [], []
    if num_returns <= 0:
        raise ValueError(f"Invalid number of objects to return: {num_returns}.")
    if num_returns > len(object_refs):
        raise ValueError(
            f"num_returns is {num_returns}, more than the {len(object_refs)} objects that were given to wait()."
        )
    return runtime().wait(object_refs, num_returns, timeout)  # type: ignore[return-value]


def cancel(ref: ObjectRef[Any] | ObjectRefGenerator[Any], *, force: bool = False, recursive: bool = True) -> None:
    """Cancel the task that makes an object, or that is a generator, if it has not ended; returns at once.

    What waits never starts. A task that runs is interrupted by ``KeyboardInterrupt``, also while it sleeps or waits;
    with ``force`` its process is killed. A call of an async actor is cancelled as an asyncio task; other actors see
    ``get_runtime_context().is_canceled()``. With ``recursive``, the tasks that it submitted are cancelled too. ``get``
    then raises ``TaskCancelledError`` (with ``force`` also a ``WorkerCrashedError``), unless the task ended by itself
    before, or caught the interruption. What a call returns that was cancelled is dropped.
    Cancelled tasks are never retried. Raises ``TypeError`` for anything else, and ``ValueError`` for ``force`` on a
    call of an actor.
    """
    if isinstance(ref, ObjectRefGenerator):
        ref = ref.completed()
    if not isinstance(ref, ObjectRef):
        raise TypeError(
            f"cancel() only takes an ObjectRef or an ObjectRefGenerator. For actors, use kill(). Got: {ref!r}."
        )
    runtime().cancel(ref, force=force, recursive=recursive)


def _check(object_refs: Sequence[Any], function: str, allowed: set[type]) -> None:
    """Raise unless everything is a reference, or whatever else is allowed."""
    if set(map(type, object_refs)) - allowed:
        wrong = next(ref for ref in object_refs if type(ref) not in allowed)
        raise TypeError(
            f"{function}() expected a list of ObjectRefs, but it holds {wrong!r} of type {type(wrong).__name__}."
        )
