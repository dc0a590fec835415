"""Every error Shoal raises. One root; Ray's names are kept, also as aliases where its names carry "Ray".

::

    ShoalError
    ├── ConnectionFailedError (ConnectionError)   nobody answers, wrong credential, no JetStream, wrong version
    │   ├── ClusterUnreachableError
    │   ├── AuthenticationError
    │   ├── JetStreamUnavailableError
    │   └── VersionMismatchError
    ├── BusError                       the broker between us
    │   ├── DisconnectedError          the connection broke while a request was in flight
    │   ├── NoRespondersError          nobody listens on the subject
    │   ├── RequestTimeoutError (TimeoutError)
    │   ├── PayloadTooLargeError (ValueError)
    │   ├── BufferFullError            the bounded write buffer is full
    │   ├── PermissionViolationError   the broker does not allow this role to use the subject
    │   ├── RevisionConflict           the key changed meanwhile
    │   ├── JetStreamError             JetStream refused a call
    │   ├── BusClosedError
    │   └── BadFrameError              a peer sent what no end of its channel would send: the peer's fault
    ├── RequestRefusedError            a service refused: the asker's fault
    │   ├── InvalidRequestError        the request itself was wrong
    │   ├── NotFoundError              what it names does not exist
    │   ├── AlreadyExistsError         what it would make exists
    │   └── DeclaredDeadError          the asker was declared dead, and this is not undone
    ├── ServiceError                   a service failed: not the asker's fault
    ├── TaskError                      user code raised; also an instance of the cause's class
    ├── TaskCancelledError ⊃ TaskKilledError (WorkerCrashedError)
    ├── WorkerCrashedError             the worker process died
    ├── ActorError ⊃ ActorDiedError ⊃ ActorPlacementGroupRemoved; ActorUnavailableError
    ├── SystemError_ (RaySystemError) ⊃ ChannelError ⊃ ChannelTimeoutError
    ├── ObjectStoreFullError, OutOfDiskError, OutOfMemoryError
    ├── NodeDiedError, LocalNodeDiedError (LocalRayletDiedError)
    ├── ObjectLostError ⊃ ObjectFetchTimedOutError, ReferenceCountingAssertionError, ObjectFreedError,
    │                     OwnerDiedError, ObjectReconstructionFailedError (and its kinds)
    ├── GetTimeoutError (TimeoutError)
    ├── RuntimeEnvSetupError, TaskPlacementGroupRemoved
    ├── PendingCallsLimitExceeded, TaskUnschedulableError, ActorUnschedulableError
    └── AsyncioActorExit, CrossLanguageError, PlasmaObjectNotAvailable, ObjectRefStreamEndOfStreamError,
        UserCodeException, UnserializableException, OufOfBandObjectRefSerializationException,
        ActorAlreadyExistsError (ValueError), ActorHandleNotFoundError (ValueError),
        PlacementGroupAlreadyExistsError (ValueError)

The caller's fault, the peer's fault and a lost resource are different classes. Errors that cross the wire have a
code (``wire_code``); ``from_wire`` maps every code back, and a test holds that the mapping is whole.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ShoalError(Exception):
    """The root of all errors of Shoal (Ray: ``RayError``)."""


# ------------------------------------------------------------------------------------ connecting


class ConnectionFailedError(ShoalError, ConnectionError):
    """The cluster could not be joined."""


class ClusterUnreachableError(ConnectionFailedError):
    """Nobody answers at the address."""


class AuthenticationError(ConnectionFailedError):
    """The broker refused the credential, or one of the two the other's certificate."""


class JetStreamUnavailableError(ConnectionFailedError):
    """The broker runs without JetStream, where the control store lives."""


class VersionMismatchError(ConnectionFailedError):
    """The SDK and the services speak different versions of the protocol."""


# ------------------------------------------------------------------------------------ the bus


class BusError(ShoalError):
    """Something between this process and the broker."""


class DisconnectedError(BusError):
    """The connection broke while the request was in flight; it may or may not have been carried out."""


class NoRespondersError(BusError):
    """Nobody listens on the subject."""


class RequestTimeoutError(BusError, TimeoutError):
    """No answer came in time."""


class PayloadTooLargeError(BusError, ValueError):
    """The message is larger than the broker takes."""


class BufferFullError(BusError):
    """The bounded write buffer is full: the broker does not read as fast as this process writes."""


class PermissionViolationError(BusError):
    """The broker does not let this role publish or subscribe to the subject; nothing was sent."""


class RevisionConflict(BusError):
    """The key was changed meanwhile; ``key``, ``value``, ``revision`` are what it holds now (None and 0: nothing)."""

    def __init__(self, text: str, key: str, value: bytes | None, revision: int) -> None:
        super().__init__(text, key, value, revision)
        self.key = key
        self.value = value
        self.revision = revision

    def __str__(self) -> str:
        return str(self.args[0])


class JetStreamError(BusError):
    """JetStream refused a call; ``code`` is of HTTP's kind (404: not found), ``error_code`` is its own."""

    def __init__(self, text: str, code: int, error_code: int) -> None:
        super().__init__(text, code, error_code)
        self.code = code
        self.error_code = error_code

    def __str__(self) -> str:
        return str(self.args[0])


class BusClosedError(BusError):
    """The connection was closed by this process."""


class BadFrameError(BusError):
    """A peer sent what no end of its channel would send; the frame was dropped."""


# ------------------------------------------------------------------------------------ services


class RequestRefusedError(ShoalError):
    """A service refused the request; the asker is at fault."""


class InvalidRequestError(RequestRefusedError):
    """The request itself was wrong."""


class NotFoundError(RequestRefusedError):
    """What the request names does not exist."""


class AlreadyExistsError(RequestRefusedError):
    """What the request would make exists already."""


class DeclaredDeadError(RequestRefusedError):
    """The asker was declared dead; that is never undone. Join again as a new incarnation."""


class ServiceError(ShoalError):
    """A service failed while it carried out the request."""


# ------------------------------------------------------------------------------------ tasks and actors


class TaskError(ShoalError):
    """User code raised. What ``get`` raises is an instance of this class and of the cause's class.

    Attributes: ``function_name``, ``traceback_text`` (the remote traceback, ready to print), ``cause`` (the
    exception itself; an ``UnserializableException`` with its text where it could not travel).
    """

    def __init__(self, function_name: str, traceback_text: str, cause: BaseException) -> None:
        super().__init__(function_name, traceback_text, cause)
        self.function_name = function_name
        self.traceback_text = traceback_text
        self.cause = cause

    def __str__(self) -> str:
        return self.traceback_text

    def __reduce__(self) -> tuple[Any, ...]:
        return TaskError, (self.function_name, self.traceback_text, self.cause)

    def as_instanceof_cause(self) -> TaskError:
        """Return this error as an instance of its class and of the cause's class.

        Where the cause's class cannot be combined (it is final, or its layout conflicts), the error itself.
        """
        cause_class = type(self.cause)
        if isinstance(self.cause, TaskError):
            return self.cause.as_instanceof_cause()
        if issubclass(TaskError, cause_class):
            return self
        try:
            dual = _dual_class(cause_class)
            error = dual(*self.cause.args)
            error.__dict__.update(getattr(self.cause, "__dict__", {}))
            error.function_name = self.function_name
            error.traceback_text = self.traceback_text
            error.cause = self.cause
            error.args = self.cause.args
        except Exception:
            return self
        return error


def _dual_class(cause_class: type[BaseException]) -> type[TaskError]:
    """Return the class that is both a TaskError and ``cause_class``."""
    known = _dual_classes.get(cause_class)
    if known is None:
        name = f"TaskError({cause_class.__name__})"
        body = {
            "__module__": __name__,
            "__str__": TaskError.__str__,
            "__reduce__": _reduce_dual,
            "__init__": _skip_init,
        }
        known = type(name, (TaskError, cause_class), body)
        _dual_classes[cause_class] = known
    return known


def _skip_init(self: TaskError, *args: Any, **kwargs: Any) -> None:
    """Do nothing: the parts of a dual error are set by ``as_instanceof_cause``."""


def _reduce_dual(self: TaskError) -> tuple[Any, ...]:
    return _restore_dual, (self.function_name, self.traceback_text, self.cause)


def _restore_dual(function_name: str, traceback_text: str, cause: BaseException) -> TaskError:
    return TaskError(function_name, traceback_text, cause).as_instanceof_cause()


_dual_classes: dict[type[BaseException], type[TaskError]] = {}


class TaskCancelledError(ShoalError):
    """The task was cancelled."""


class WorkerCrashedError(ShoalError):
    """The worker process that ran the task died, more often than ``max_retries`` allows."""


class TaskKilledError(TaskCancelledError, WorkerCrashedError):
    """The task was cancelled with ``force``. Ray's documentation calls this a crash, Ray itself a cancellation."""


class ActorError(ShoalError):
    """Something befell an actor (Ray: ``RayActorError``).

    Attributes: ``actor_id`` (in hex, where it is known), ``cause`` (the exception that its ``__init__`` raised, where
    that is what befell it), and under Ray's names ``error_msg``, ``actor_init_failed`` and ``preempted``.
    """

    actor_id: str | None = None
    cause: BaseException | None = None
    preempted = False

    @property
    def error_msg(self) -> str:
        """The text of the error."""
        return str(self)

    @property
    def actor_init_failed(self) -> bool:
        """Whether its ``__init__`` raised."""
        return self.cause is not None


class ActorDiedError(ActorError):
    """The actor is dead; the text says how it died."""


class ActorUnavailableError(ActorError):
    """The actor cannot be reached just now; it may come back."""


class SystemError_(ShoalError):
    """Shoal itself is in a state it must not be in (Ray: ``RaySystemError``)."""


class ChannelError(SystemError_):
    """A channel between two processes broke (Ray: ``RayChannelError``)."""


class ChannelTimeoutError(ChannelError, TimeoutError):
    """A channel did not answer in time (Ray: ``RayChannelTimeoutError``)."""


class NodeDiedError(ShoalError):
    """The node that ran the task died, more often than ``max_retries`` allows."""


class LocalNodeDiedError(ShoalError):
    """The node service of this machine died (Ray: ``LocalRayletDiedError``)."""


class OutOfMemoryError(ShoalError):
    """The node ran out of memory and killed the task's worker to save the rest."""


class ObjectStoreFullError(ShoalError):
    """Shared memory is full and nothing in it can be evicted; the text says who holds what."""


class OutOfDiskError(ShoalError):
    """The disk that objects spill to is full."""


# ------------------------------------------------------------------------------------ objects


class ObjectLostError(ShoalError):
    """No copy of the object is left, and it could not be made again."""


class ObjectFetchTimedOutError(ObjectLostError):
    """The object's copy exists but could not be fetched in time."""


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The object was deleted while a reference to it was still in use."""


class ObjectFreedError(ObjectLostError):
    """The object was freed on request."""


class OwnerDiedError(ObjectLostError):
    """The process that owned the object died, and the object with it."""


class ObjectReconstructionFailedError(ObjectLostError):
    """The object's copies are gone and its task could not be run again; ``reason`` is Ray's name for why."""

    reason: ClassVar[str] = "FAILED"


class ObjectReconstructionFailedMaxAttemptsExceededError(ObjectReconstructionFailedError):
    """The object's task was run again as often as ``max_retries`` allows."""

    reason = "MAX_ATTEMPTS_EXCEEDED"


class ObjectReconstructionFailedLineageEvictedError(ObjectReconstructionFailedError):
    """The record of the object's task was dropped to save memory."""

    reason = "LINEAGE_EVICTED"


class ObjectReconstructionFailedPutError(ObjectReconstructionFailedError):
    """The object was made by ``put``, or from large arguments passed by value: no task makes it again."""

    reason = "PUT"


class ObjectReconstructionFailedRetriesDisabledError(ObjectReconstructionFailedError):
    """The object's task may not be run again: ``max_retries`` (of an actor's method ``max_task_retries``) is 0."""

    reason = "RETRIES_DISABLED"


class ObjectReconstructionFailedBorrowedError(ObjectReconstructionFailedError):
    """The object is made from one of another process, which has freed it or has died."""

    reason = "BORROWED"


class ObjectReconstructionFailedRefNotFoundError(ObjectReconstructionFailedError):
    """The object's owner remembers nothing of it or of its task."""

    reason = "REF_NOT_FOUND"


class ObjectReconstructionFailedTaskCancelledError(ObjectReconstructionFailedError):
    """The object's task was cancelled before it had made the object again."""

    reason = "TASK_CANCELLED"


class ObjectReconstructionFailedLineageDisabledError(ObjectReconstructionFailedError):
    """The object's owner keeps no records of tasks (``SHOAL_LINEAGE_BYTES=0``)."""

    reason = "LINEAGE_DISABLED"


class PlasmaObjectNotAvailable(ShoalError):
    """The object is not in shared memory yet."""


class GetTimeoutError(ShoalError, TimeoutError):
    """``get`` ran out of time; the objects may still become ready."""


class OufOfBandObjectRefSerializationException(ShoalError):
    """A reference was pickled outside Shoal where this is forbidden (the spelling is Ray's)."""


class ObjectRefStreamEndOfStreamError(ShoalError):
    """A generator has no more items."""


class UserCodeException(ShoalError):
    """User code raised inside the system, for instance in a serializer."""


class UnserializableException(ShoalError):
    """An exception of user code could not travel; this holds its text."""


class CrossLanguageError(ShoalError):
    """An error from another language; never raised by Shoal, kept for programs that catch it."""


# ------------------------------------------------------------------------------------ scheduling


class RuntimeEnvSetupError(ShoalError):
    """The runtime environment could not be set up."""


class TaskPlacementGroupRemoved(ShoalError):
    """The placement group of the task was removed."""


class ActorPlacementGroupRemoved(ActorDiedError):
    """The placement group of the actor was removed."""


class PendingCallsLimitExceeded(ShoalError):
    """More calls wait on the actor handle than ``max_pending_calls`` allows."""


class TaskUnschedulableError(ShoalError):
    """No node can ever run the task."""


class ActorUnschedulableError(ShoalError):
    """No node can ever run the actor."""


class AsyncioActorExit(ShoalError):
    """An async actor leaves by ``exit_actor``."""


class ActorAlreadyExistsError(ShoalError, ValueError):
    """The actor's name is taken in its namespace."""


class ActorHandleNotFoundError(ShoalError, ValueError):
    """The actor handle is unknown."""


class PlacementGroupAlreadyExistsError(ShoalError, ValueError):
    """The placement group's name is taken in its namespace."""


# ------------------------------------------------------------------------------------ the wire

WIRE_ERRORS: dict[str, type[ShoalError]] = {
    "invalid_request": InvalidRequestError,
    "not_found": NotFoundError,
    "already_exists": AlreadyExistsError,
    "declared_dead": DeclaredDeadError,
    "version_mismatch": VersionMismatchError,
    "authentication": AuthenticationError,
    "service": ServiceError,
    "task": TaskError,
    "task_cancelled": TaskCancelledError,
    "task_killed": TaskKilledError,
    "worker_crashed": WorkerCrashedError,
    "actor_died": ActorDiedError,
    "actor_unavailable": ActorUnavailableError,
    "system": SystemError_,
    "node_died": NodeDiedError,
    "local_node_died": LocalNodeDiedError,
    "out_of_memory": OutOfMemoryError,
    "object_store_full": ObjectStoreFullError,
    "out_of_disk": OutOfDiskError,
    "object_lost": ObjectLostError,
    "object_fetch_timed_out": ObjectFetchTimedOutError,
    "reference_counting": ReferenceCountingAssertionError,
    "object_freed": ObjectFreedError,
    "owner_died": OwnerDiedError,
    "reconstruction_failed": ObjectReconstructionFailedError,
    "reconstruction_attempts": ObjectReconstructionFailedMaxAttemptsExceededError,
    "reconstruction_evicted": ObjectReconstructionFailedLineageEvictedError,
    "reconstruction_put": ObjectReconstructionFailedPutError,
    "reconstruction_disabled": ObjectReconstructionFailedRetriesDisabledError,
    "reconstruction_borrowed": ObjectReconstructionFailedBorrowedError,
    "reconstruction_unknown": ObjectReconstructionFailedRefNotFoundError,
    "reconstruction_cancelled": ObjectReconstructionFailedTaskCancelledError,
    "reconstruction_no_lineage": ObjectReconstructionFailedLineageDisabledError,
    "runtime_env": RuntimeEnvSetupError,
    "task_group_removed": TaskPlacementGroupRemoved,
    "actor_group_removed": ActorPlacementGroupRemoved,
    "task_unschedulable": TaskUnschedulableError,
    "actor_unschedulable": ActorUnschedulableError,
    "actor_exists": ActorAlreadyExistsError,
    "group_exists": PlacementGroupAlreadyExistsError,
}
_CODES = {error_class: code for code, error_class in WIRE_ERRORS.items()}


def wire_code(error: ShoalError) -> str:
    """Return the code under which an error crosses the wire: that of its nearest class that has one."""
    for error_class in type(error).__mro__:
        if error_class in _CODES:
            return _CODES[error_class]
    return "service"


def from_wire(code: str, text: str) -> ShoalError:
    """Return the error a code stands for; an unknown code becomes a ``ServiceError`` that says so.

    So does "task": a ``TaskError`` is made of the exception itself, which travels beside the code.
    """
    error_class = WIRE_ERRORS.get(code)
    if error_class is None:
        return ServiceError(f"{text} (the peer sent the unknown error code {code!r})")
    if error_class is TaskError:
        return ServiceError(f"{text} (the peer sent the error of a task, without the exception that belongs to it)")
    return error_class(text)
