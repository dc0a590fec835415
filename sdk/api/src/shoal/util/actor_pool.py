"""``ActorPool``: values in, results out, over a fixed number of actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar, cast

from shoal.handle import ActorHandle
from shoal.objects import get, wait
from shoal.session import runtime
from shoal_core.protocol.errors import ActorDiedError
from shoal_core.runtime.ownership.objects import ObjectRef

T = TypeVar("T")
V = TypeVar("V")
R = TypeVar("R")

TIMED_OUT = "Timed out waiting for result"


AHEAD_SECONDS = 0.005
"""So much work, by what its calls have been taking, an actor is given before it has ended what it does."""
MOST_AHEAD = 64
OVERHEAD_SECONDS = 20e-6


class _Work:
    """One call that an actor of the pool makes; ``future`` is what the user's function returned for it."""

    __slots__ = ("actor", "future", "index")

    def __init__(self, index: int, actor: ActorHandle[Any], future: Any) -> None:
        self.index = index
        self.actor = actor
        self.future = future


class ActorPool(Generic[T]):
    """A pool of actors, each of which works on one value at a time.

    ::

        pool = ActorPool([Worker.remote(), Worker.remote()])
        print(list(pool.map(lambda actor, value: actor.double.remote(value), [1, 2, 3, 4])))  # [2, 4, 6, 8]

    Values for which no actor is idle wait here, so that long calls are never stacked up behind each other; an actor
    whose calls take less than some milliseconds gets the next ones before it has ended the one it runs. An actor that
    is found dead leaves the pool; each value that it had been given comes out as an error. Not thread-safe.
    """

    def __init__(self, actors: Iterable[ActorHandle[T]]) -> None:
        self._idle = list(actors)
        self._busy: dict[ActorHandle[T], int] = {}
        self._working: dict[Hashable, _Work] = {}
        self._by_index: dict[int, _Work] = {}
        self._next_index = 0
        self._next_return = 0
        self._waiting: deque[tuple[Callable[[ActorHandle[T], Any], Any], Any]] = deque()

    def map(self, fn: Callable[[ActorHandle[T], V], ObjectRef[R]], values: Iterable[V]) -> Iterator[R]:
        """Call ``fn(actor, value)`` for each value and return an iterator over the results, in order.

        ``fn`` makes the call and returns its reference. The calls begin at once, as actors are idle; the others follow
        while results are taken. What was submitted before and not taken yet is dropped.
        """
        while self.has_next():
            self._drop()
        for value in values:
            self.submit(fn, value)
        return self._results(self.get_next)

    def map_unordered(self, fn: Callable[[ActorHandle[T], V], ObjectRef[R]], values: Iterable[V]) -> Iterator[R]:
        """Like ``map``, with the results in the order in which they become ready."""
        while self.has_next():
            self._drop()
        for value in values:
            self.submit(fn, value)
        return self._results(self.get_next_unordered)

    def _results(self, following: Callable[[], R]) -> Iterator[R]:
        while self.has_next():
            yield following()

    def submit(self, fn: Callable[[ActorHandle[T], V], Any], value: V) -> None:
        """Call ``fn(actor, value)`` with an idle actor, as soon as there is one."""
        self._waiting.append((fn, value))
        self._feed()

    def has_next(self) -> bool:
        """Tell whether there are results that were not taken."""
        return bool(self._working)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """Return the next result, in the order of submission.

        Raises ``StopIteration`` where there is none, ``ValueError`` after ``get_next_unordered`` has taken later ones,
        the error of the call if it failed, and ``TimeoutError`` after ``timeout`` seconds; with ``ignore_if_timedout``
        the call is dropped then, and its actor takes the next value.
        """
        self._check_next()
        if self._next_return >= self._next_index:
            raise ValueError("It is not allowed to call get_next() after get_next_unordered().")
        work = self._by_index[self._next_return]
        ready = timeout is None or _is_ready(work.future, timeout)
        if not ready and not ignore_if_timedout:
            raise TimeoutError(TIMED_OUT)
        return self._take(work, ready)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """Return any result, as soon as there is one.

        Raises ``StopIteration`` where there is none to come, the error of the call if it failed, and ``TimeoutError``
        after ``timeout`` seconds; with ``ignore_if_timedout`` the call that waited longest is dropped then.
        """
        self._check_next()
        ready, _ = wait(cast(Any, list(self._working)), num_returns=1, timeout=timeout)
        if not ready and not ignore_if_timedout:
            raise TimeoutError(TIMED_OUT)
        work = self._working[ready[0] if ready else next(iter(self._working))]
        return self._take(work, bool(ready))

    def has_free(self) -> bool:
        """Tell whether an actor is idle and no value waits for one."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> ActorHandle[T] | None:
        """Take an idle actor out of the pool; None where none is idle."""
        return self._idle.pop() if self.has_free() else None

    def push(self, actor: ActorHandle[T]) -> None:
        """Add an actor to the pool; ``ValueError`` where it is in it."""
        if actor in self._idle or actor in self._busy:
            raise ValueError("Actor already belongs to current ActorPool")
        self._idle.append(actor)
        self._feed()

    # ------------------------------------------------------------------------------- inside

    def _check_next(self) -> None:
        if not self.has_next():
            raise StopIteration("No more results to get")

    def _take(self, work: _Work, ready: bool) -> Any:
        """Take the result of a call, and give its actor the next value."""
        self._forget(work)
        if not ready:
            self._feed()
            raise TimeoutError(f"{TIMED_OUT}. The task {work.future} has been ignored.")
        try:
            return get(work.future)
        except ActorDiedError:
            self._bury(work.actor)
            raise
        finally:
            self._feed()

    def _forget(self, work: _Work) -> None:
        """A call is over, or nobody waits for it: its actor is free for another."""
        actor = work.actor
        del self._working[_key(work.future)]
        del self._by_index[work.index]
        self._next_return = max(self._next_return, work.index + 1)
        if actor in self._busy:
            self._busy[actor] -= 1
            if not self._busy[actor]:
                del self._busy[actor]
                self._idle.append(actor)

    def _drop(self) -> None:
        """Forget the oldest call; its actor takes the next value."""
        self._forget(next(iter(self._working.values())))
        self._feed()

    def _feed(self) -> None:
        """Give what waits to actors that are idle, or will soon be."""
        while self._waiting and (actor := self._free()) is not None:
            self._call(*self._waiting.popleft(), actor)

    def _free(self) -> ActorHandle[T] | None:
        """Return the actor that should take the next value, None where all have enough to do."""
        if self._idle:
            return self._idle.pop()
        actor = min(self._busy, key=lambda actor: self._busy[actor], default=None)
        return actor if actor is not None and self._busy[actor] < _ahead(actor) else None

    def _call(self, fn: Callable[[ActorHandle[T], Any], Any], value: Any, actor: ActorHandle[T]) -> None:
        self._busy[actor] = self._busy.get(actor, 0) + 1
        work = _Work(self._next_index, actor, fn(actor, value))
        self._working[_key(work.future)] = self._by_index[work.index] = work
        self._next_index += 1

    def _bury(self, actor: ActorHandle[T]) -> None:
        """An actor is dead: it is given nothing more. What it was given comes out as errors, since it may have run."""
        self._busy.pop(actor, None)
        if actor in self._idle:
            self._idle.remove(actor)


def _ahead(actor: ActorHandle[Any]) -> int:
    """Return how many calls an actor may have at once, by how long they have been taking."""
    seconds = runtime().call_seconds(actor._shoal_actor) if actor._shoal_description.sequential else None
    return 1 if seconds is None else max(1, min(MOST_AHEAD, int(AHEAD_SECONDS / (seconds + OVERHEAD_SECONDS))))


def _key(future: Any) -> Hashable:
    """Return what identifies a call; one of a method with several returns has several references."""
    return tuple(future) if isinstance(future, list) else cast(Hashable, future)


def _is_ready(future: Any, timeout: float) -> bool:
    refs = future if isinstance(future, list) else [future]
    ready, _ = wait(refs, num_returns=len(refs), timeout=timeout)
    return len(ready) == len(refs)
