"""References that users hold, and the state of the object behind each of them.

All references of a process to one object are one Python object (``ObjectRef`` is interned when it is
unpickled), so identity is equality, and hashing and comparing references cost nothing.

A state's ``value`` goes from None to a value exactly once, and again each time that its copy is lost and made anew: it
is None in between, and ``lost`` is what it was. Both are set by the I/O thread alone. User threads read them without a
lock; to wait they register a ``Waiter`` under the table's lock, once for a whole list.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import msgspec

from shoal_core.protocol.errors import ObjectLostError
from shoal_core.protocol.ids import (
    MAX_RETURNS,
    JobId,
    ObjectKey,
    ProcessId,
    TaskNumber,
    object_id_bytes,
    object_key,
    task_id_bytes,
    task_of,
)
from shoal_core.protocol.records import Failed, Inline, Reference, Stored, Value
from shoal_core.runtime.loop.awaiting import until_told
from shoal_core.runtime.ownership.identities import JobID, TaskID

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

ID_BYTES = 24


class Home(Protocol):
    """What a reference needs of the runtime it belongs to."""

    def release(self, state: ObjectState) -> None:
        """A reference to the object is gone (any thread, in a finalizer)."""

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_seconds: float | None) -> list[Any]:
        """Return the values of references, waiting for them."""

    def notify(self, state: ObjectState, callback: Callable[[], None]) -> Any:
        """Call back on the I/O thread once the object is ready, or known not to become so; return the notice."""

    def withdraw(self, notice: Any) -> None:
        """Nobody waits for the notice any more."""

    def waiter(self) -> Callable[[bool], None] | None:
        """Return whom to tell when what runs in this context waits, if it holds a CPU that others may need."""

    def aside(self, work: Callable[[], None]) -> None:
        """Do something beside the I/O thread, since it may block or run user code (I/O thread)."""

    def load(self, state: ObjectState) -> Any:
        """Return the value of an object, or raise its error, or why it will not be ready; waits where it was lost."""

    def awaited(self, state: ObjectState, began_ns: int) -> None:
        """An object was awaited, since ``began_ns`` (by the clock on the wall), until it was ready."""

    def check(self) -> None:
        """Raise why nothing becomes ready, if there is a reason."""

    def pin(self, ref: ObjectRef[Any]) -> None:
        """Keep the object until the job ends: a reference to it is being pickled where nobody counts."""

    def job_of(self, owner: ProcessId) -> JobId:
        """Return the job that a process of this cluster works for, as far as it is known here."""


class Waiter:
    """One blocked user thread: released when enough of its objects are ready, or one has failed."""

    __slots__ = ("_lock", "fail_fast", "needed")

    def __init__(self, needed: int, fail_fast: bool) -> None:
        self.needed = needed
        self.fail_fast = fail_fast
        self._lock = threading.Lock()
        self._lock.acquire()

    def ready(self, state: ObjectState) -> None:
        """Count an object that became ready (I/O thread, under the table's lock)."""
        self.needed -= 1
        if (self.needed <= 0 or (self.fail_fast and type(state.value) is Failed)) and self._lock.locked():
            self._lock.release()

    def give_up(self) -> None:
        """Release the thread although its objects are not ready (under the table's lock)."""
        if self._lock.locked():
            self._lock.release()

    def wait(self, timeout_seconds: float | None) -> bool:
        """Block until released; False if the time ran out first."""
        if timeout_seconds is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=min(max(0.0, timeout_seconds), threading.TIMEOUT_MAX))

    def is_released(self) -> bool:
        """Tell whether the thread need not wait any more."""
        return not self._lock.locked()


class ObjectState(msgspec.Struct, eq=False):
    """What this process knows of one object, its own or another's.

    ``lost`` is a copy that was lost; while it is there and ``value`` is None, the object comes only if it is asked for.
    ``contents`` are the references inside the value: a container keeps what it contains. ``shared`` is this process's
    mapping of the value's segment, while one is alive. ``reference`` finds the one ``ObjectRef`` again; ``instances``
    counts those that exist (a new one may be made before the end of the old one was noticed). An error is ``heeded``
    once somebody was given it. ``trace`` is that of the task of this process that makes it, where it is recorded.
    """

    home: Home
    owner: ProcessId
    key: ObjectKey
    value: Value | None = None
    lost: Stored | None = None
    waiters: list[Waiter] | None = None
    observers: list[Callable[[ObjectState], None]] | None = None
    contents: Sequence[ObjectRef[Any]] = ()
    shared: weakref.ref[Any] | None = None
    fetching: bool = False
    heeded: bool = False
    instances: int = 1
    reference: weakref.ref[ObjectRef[Any]] | None = None
    trace: str = ""

    def wire(self) -> Reference:
        """Return the object's name on the wire."""
        return Reference(self.owner, self.key)


class ObjectRef(Generic[T_co]):
    """A reference to an object of the cluster: the future value of a task, or something ``put``.

    ``get(ref)`` returns the value; ``await ref`` does so in any event loop; ``ref.future()`` is a
    ``concurrent.futures.Future``. A reference passed as a task's own argument is replaced by its value;
    inside a container it stays a reference. The object lives as long as any process refers to it.
    """

    __slots__ = ("__weakref__", "_state")

    _state: ObjectState

    def __init__(self, state: ObjectState) -> None:
        self._state = state

    def __del__(self) -> None:
        try:
            state = self._state
        except AttributeError:
            return
        state.home.release(state)

    def binary(self) -> bytes:
        """Return the object's id: 24 bytes."""
        return object_id_bytes(self._state.owner, self._state.key)

    def hex(self) -> str:
        """Return the object's id as 48 hex digits."""
        return self.binary().hex()

    def task_id(self) -> TaskID:
        """Return the id of the task that makes the object."""
        return TaskID(task_id_bytes(self._state.owner, task_of(self._state.key)))

    def job_id(self) -> JobID:
        """Return the id of the job the object belongs to; that of nothing where it is of no cluster."""
        job = self._state.home.job_of(self._state.owner)
        return JobID(job) if job else JobID.nil()

    @classmethod
    def nil(cls) -> ObjectRef[Any]:
        """Return the reference to nothing: ``get`` raises ``ObjectLostError`` at once, and it cannot be sent."""
        return _NIL

    @classmethod
    def from_random(cls) -> ObjectRef[Any]:
        """Return a reference with an id of chance, which names nothing either."""
        number = TaskNumber(secrets.randbits(63))
        return ObjectRef(_nothing(ProcessId(secrets.token_hex(12)), object_key(number, 0)))

    def is_nil(self) -> bool:
        """Tell whether this is the reference to nothing."""
        return self is _NIL

    def future(self) -> concurrent.futures.Future[T_co]:
        """Return a future that gets the value, or the error, once the object is ready."""
        future: concurrent.futures.Future[T_co] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        home = self._state.home

        def settle() -> None:
            try:
                # By way of the reference, which nobody else may hold: without one the object would be gone.
                value = home.load(self._state)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)

        home.notify(self._state, lambda: home.aside(settle))
        return future

    def _on_completed(self, callback: Callable[[Any], Any]) -> None:
        """Call back with the value, or with the exception that stands in its place, once the object is ready."""

        def told(future: concurrent.futures.Future[T_co]) -> None:
            error = future.exception()
            callback(future.result() if error is None else error)

        self.future().add_done_callback(told)

    def __await__(self) -> Generator[Any, None, T_co]:
        loop = asyncio.get_running_loop()
        home, state = self._state.home, self._state
        began_ns = time.time_ns()
        if state.value is None:
            yield from until_told(state, loop)
        home.awaited(state, began_ns)
        if type(state.value) not in (Inline, Failed):  # to map or fetch it takes a while, in which the loop should turn
            return (yield from loop.run_in_executor(None, home.load, state))  # type: ignore[no-any-return]
        return home.load(state)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        # Shoal's own pickler never comes here: this is a pickle that leaves the system.
        self._state.home.pin(self)
        return restore_reference, (self._state.owner, self._state.key)

    def __copy__(self) -> ObjectRef[T_co]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ObjectRef[T_co]:
        return self

    def __repr__(self) -> str:
        return f"ObjectRef({self.hex()})"


class _Nowhere:
    """The home of references to nothing: whoever asks is told so at once."""

    def release(self, state: ObjectState) -> None:
        """Nobody counts."""

    def notify(self, state: ObjectState, callback: Callable[[], None]) -> None:
        callback()

    def withdraw(self, notice: Any) -> None:
        """Nobody was to be told."""

    def waiter(self) -> None:
        return None

    def aside(self, work: Callable[[], None]) -> None:
        work()

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_seconds: float | None) -> NoReturn:
        self.load(refs[0]._state)

    def load(self, state: ObjectState) -> NoReturn:
        raise ObjectLostError(NO_OBJECT)

    def awaited(self, state: ObjectState, began_ns: int) -> None:
        """Nothing is awaited here."""

    def check(self) -> NoReturn:
        raise ObjectLostError(NO_OBJECT)

    def pin(self, ref: ObjectRef[Any]) -> NoReturn:
        raise ValueError(NO_OBJECT)

    def job_of(self, owner: ProcessId) -> JobId:
        return JobId("")


NO_OBJECT = "The reference was made by ObjectRef.nil() or ObjectRef.from_random(), and names no object."
_NOWHERE = _Nowhere()


def _nothing(owner: ProcessId, key: ObjectKey) -> ObjectState:
    state = ObjectState(_NOWHERE, owner, key)
    state.value = Failed("object_lost", NO_OBJECT)
    return state


_NIL: ObjectRef[Any] = ObjectRef(_nothing(ProcessId("f" * 24), object_key(TaskNumber((1 << 64) - 1), MAX_RETURNS)))

Restore = Callable[[ProcessId, ObjectKey], ObjectRef[Any]]
_restorers: list[Restore] = []


def install(restore: Restore) -> None:
    """Have references that are unpickled in this process made by ``restore`` from now on."""
    _restorers.append(restore)


def uninstall(restore: Restore) -> None:
    """Undo ``install``."""
    _restorers.remove(restore)


def restore_reference(owner: ProcessId, key: ObjectKey) -> ObjectRef[Any]:
    """Make the reference that a pickle names; ``RuntimeError`` outside a running cluster."""
    if not _restorers:
        raise RuntimeError(
            "An ObjectRef was unpickled in a process that has not joined a cluster; call shoal.init() first."
        )
    return _restorers[-1](owner, key)


class ObjectTable:
    """The objects this process knows: its own by key, others' by owner and key.

    Reading is free for every thread; ``settle`` and ``drop`` are the I/O thread's.
    """

    def __init__(self, home: Home, local: ProcessId) -> None:
        self.home = home
        self.local = local
        self.owned: dict[ObjectKey, ObjectState] = {}
        self.borrowed: dict[Reference, ObjectState] = {}
        self.lock = threading.Lock()

    def create(self, key: ObjectKey) -> ObjectRef[Any]:
        """Make a new object of this process and its first reference (any thread)."""
        state = ObjectState(self.home, self.local, key)
        self.owned[key] = state
        return ObjectRef(state)

    def find(self, reference: Reference) -> ObjectState | None:
        """Return the state of an object, if this process knows it."""
        if reference.owner == self.local:
            return self.owned.get(reference.key)
        return self.borrowed.get(reference)

    def restore(self, reference: Reference) -> ObjectRef[Any]:
        """Return the reference to an object, the one that exists or a new one (any thread)."""
        with self.lock:
            state = self.find(reference)
            if state is None:
                state = ObjectState(self.home, reference.owner, reference.key)
                if reference.owner == self.local:
                    self.owned[reference.key] = state
                else:
                    self.borrowed[reference] = state
            else:
                known = None if state.reference is None else state.reference()
                if known is not None:
                    return known
                state.instances += 1
            ref: ObjectRef[Any] = ObjectRef(state)
            state.reference = weakref.ref(ref)
            return ref

    def remember(self, ref: ObjectRef[Any]) -> None:
        """Note that this reference is about to be pickled, so that unpickling finds it again (any thread)."""
        state = ref._state
        if state.home is not self.home:
            raise ValueError(
                f"{ref!r} is not of this cluster: it names no object, or is from before this process joined it anew."
            )
        if state.reference is None or state.reference() is not ref:
            with self.lock:
                state.reference = weakref.ref(ref)

    def register(self, waiter: Waiter, states: Iterable[ObjectState]) -> None:
        """Add a waiter to all of the states that are not ready; those that are count at once."""
        with self.lock:
            for state in states:
                if state.value is not None:
                    waiter.ready(state)
                elif state.waiters is None:
                    state.waiters = [waiter]
                else:
                    state.waiters.append(waiter)

    def unregister(self, waiter: Waiter, states: Iterable[ObjectState]) -> None:
        """Remove a waiter that gave up."""
        with self.lock:
            for state in states:
                if state.waiters is not None and waiter in state.waiters:
                    state.waiters.remove(waiter)
                    if not state.waiters:
                        state.waiters = None

    def release_all(self) -> None:
        """Have every blocked thread look again, although nothing became ready (I/O thread)."""
        with self.lock:
            for state in (*self.owned.values(), *self.borrowed.values()):
                for waiter in state.waiters or ():
                    waiter.give_up()

    def settle(self, ready: Sequence[tuple[ObjectState, Value]]) -> None:
        """Make objects ready and wake who waits for them; the lock is taken once for the batch."""
        observed = []
        with self.lock:
            for state, value in ready:
                state.value = value
                waiters = state.waiters
                if waiters is not None:
                    state.waiters = None
                    for waiter in waiters:
                        waiter.ready(state)
                if state.observers is not None:
                    observed.append(state)
        for state in observed:
            observers, state.observers = state.observers, None
            for observer in observers or ():
                observer(state)

    def lose(self, state: ObjectState, value: Stored) -> bool:
        """The copy of an object is lost; return whether somebody waits for the object (I/O thread)."""
        with self.lock:
            state.lost, state.value, state.shared, state.fetching = value, None, None, False
            return state.waiters is not None or state.observers is not None

    def ignore(self, state: ObjectState, observer: Callable[[ObjectState], None]) -> None:
        """Undo ``observe`` (I/O thread)."""
        if state.observers is not None and observer in state.observers:
            state.observers.remove(observer)
            if not state.observers:
                state.observers = None

    def observe(self, state: ObjectState, observer: Callable[[ObjectState], None]) -> None:
        """Call ``observer`` on the I/O thread when the object is ready; at once if it is (I/O thread)."""
        if state.value is not None:
            observer(state)
        elif state.observers is None:
            state.observers = [observer]
        else:
            state.observers.append(observer)

    def drop(self, reference: Reference) -> ObjectState | None:
        """Forget an object that nobody refers to any more (I/O thread)."""
        if reference.owner == self.local:
            return self.owned.pop(reference.key, None)
        return self.borrowed.pop(reference, None)
