"""``Pool``: what ``multiprocessing.Pool`` offers, over actors instead of processes of this machine."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing import TimeoutError
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from typing import Any

from shoal.actor import ActorClass, kill
from shoal.handle import ActorHandle
from shoal.session import init, is_initialized, runtime
from shoal.state import cluster_resources
from shoal.util.multiprocessing.results import AsyncResult, Chunk, IMapIterator, IMapUnorderedIterator, Outcome
from shoal_core.protocol.errors import ActorError

__all__ = ["AsyncResult", "IMapIterator", "IMapUnorderedIterator", "Pool", "TimeoutError"]

CHUNKS_PER_PROCESS = 4
AHEAD_PER_PROCESS = 2
"""So many chunks of an ``imap`` are under way for each process before the first result is taken."""


class PoolActor:
    """One process of a pool."""

    def __init__(self, initializer: Callable[..., Any] | None, initargs: Sequence[Any]) -> None:
        if initializer is not None:
            initializer(*initargs)

    def ping(self) -> None:
        """Answer: the process is up."""

    def run(self, function: Callable[..., Any], calls: Chunk) -> list[Outcome]:
        """Call a function once for each of ``calls``, and return what came of each."""
        return [_outcome(function, args, kwargs) for args, kwargs in calls]


def _outcome(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    try:
        return True, function(*args, **kwargs)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception as reason:
            return False, MaybeEncodingError(reason, error)
        return False, error


class _Process:
    """An actor of the pool, and how many chunks it has been given."""

    __slots__ = ("actor", "chunks")

    def __init__(self, actor: ActorHandle[PoolActor]) -> None:
        self.actor = actor
        self.chunks = 0


class Pool:
    """A pool of actors that run functions, each one call after the other; use it like ``multiprocessing.Pool``.

    ``processes``: how many; the CPUs of the cluster by default. ``initializer(*initargs)`` is called in each at first.
    ``maxtasksperchild``: an actor that has run so many chunks is replaced by a new one. ``context`` is accepted and
    means nothing. ``ray_address`` is the cluster to join if this process has joined none, ``ray_remote_args`` are
    options of the actors; they hold no CPU unless told to. An actor that dies fails its chunk and is replaced.

    Raises ``ValueError`` for a wrong number of processes, and what ``initializer`` raises, as ``ActorDiedError``.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] | None = None,
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: dict[str, Any] | None = None,
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError("Processes in the pool must be >0.")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild < 1):
            raise ValueError("maxtasksperchild must be a positive int or None")
        if not is_initialized():
            _join(processes, ray_address)
        cpus = int(cluster_resources().get("CPU", 0))
        if processes is not None and processes > cpus:
            raise ValueError(
                f"Tried to start a pool with {processes} processes on a cluster that has {cpus} CPUs in all."
            )
        self._class: ActorClass[PoolActor] = ActorClass(PoolActor, {"num_cpus": 0, **(ray_remote_args or {})})
        self._made_of = (initializer, tuple(initargs or ()))
        self._most_chunks = maxtasksperchild
        self._changed = threading.Condition()
        self._waiting: deque[_Work] = deque()  # as long as what the program has submitted
        self._busy: dict[_Work, _Process] = {}
        self._closed = False
        count = processes or max(1, cpus)
        self._idle = [self._new_process() for _ in range(count)]
        self._size = count
        runtime().get([process.actor.ping.remote() for process in self._idle], None)

    # ------------------------------------------------------------------------------- calls

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Call ``func(*args, **kwargs)`` in the pool and return its result."""
        return self.apply_async(func, args, kwargs).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """Have ``func(*args, **kwargs)`` called in the pool; a callback gets the result, or the error."""
        result = AsyncResult(1, callback, error_callback, single=True)
        self._submit(func, [[(tuple(args or ()), dict(kwargs or {}))]], result.take)
        return result

    def map(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """Return ``func(item)`` of each item, in order; raises the first error."""
        return list(self.map_async(func, iterable, chunksize).get())

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """Like ``map``, without waiting; a callback gets the list, or the first error."""
        return self._map(func, _each(iterable), chunksize, callback, error_callback)

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[Any]:
        """Return ``func(*item)`` of each item, in order; raises the first error."""
        return list(self.starmap_async(func, iterable, chunksize).get())

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """Like ``starmap``, without waiting; a callback gets the list, or the first error."""
        return self._map(func, ((tuple(item), {}) for item in iterable), chunksize, callback, error_callback)

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = 1) -> IMapIterator:
        """Return an iterator over the results, in order; what ``iterable`` yields is taken as results are."""
        return IMapIterator(*self._lazily(func, iterable, chunksize))

    def imap_unordered(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = 1
    ) -> IMapUnorderedIterator:
        """Like ``imap``, with the results in the order in which they become ready."""
        return IMapUnorderedIterator(*self._lazily(func, iterable, chunksize))

    def _map(
        self,
        func: Callable[..., Any],
        calls: Iterator[tuple[tuple[Any, ...], dict[str, Any]]],
        chunksize: int | None,
        callback: Callable[[Any], Any] | None,
        error_callback: Callable[[BaseException], Any] | None,
    ) -> AsyncResult:
        self._check_running()
        all_calls = list(calls)
        if chunksize is None:
            chunksize = max(1, -(-len(all_calls) // (self._size * CHUNKS_PER_PROCESS)))
        chunks = list(_chunks(iter(all_calls), chunksize))
        result = AsyncResult(len(chunks), callback, error_callback)
        self._submit(func, chunks, result.take)
        return result

    def _lazily(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None
    ) -> tuple[Callable[[int, Callable[[int, Future[list[Outcome]]], None]], bool], int]:
        """Return how a lazy iterator submits its next chunk, and how many it keeps under way."""
        self._check_running()
        chunks = _chunks(_each(iterable), chunksize or 1)

        def submit(index: int, told: Callable[[int, Future[list[Outcome]]], None]) -> bool:
            chunk = next(chunks, None)
            if chunk is None:
                return False
            self._submit(func, [chunk], lambda _, future: told(index, future))
            return True

        return submit, self._size * AHEAD_PER_PROCESS

    # ------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Take no more calls; the actors end when all that were submitted have."""
        with self._changed:
            self._closed = True
            self._retire_if_done()

    def terminate(self) -> None:
        """Kill the actors at once; what has not ended fails with ``ActorDiedError``."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            processes = [*self._idle, *self._busy.values()]
            self._idle = []
        for work in waiting:
            work.future.set_exception(ActorError("The pool was terminated before this was begun."))
        for process in processes:
            kill(process.actor)

    def join(self) -> None:
        """Wait until all calls have ended and the actors were told to; ``ValueError`` before ``close``."""
        if not self._closed:
            raise ValueError("Pool is still running")
        with runtime().getting.waiting(), self._changed:
            while self._busy or self._waiting:
                self._changed.wait()

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *exception: object) -> None:
        self.terminate()

    def _check_running(self) -> None:
        if self._closed:
            raise ValueError("Pool not running")

    def _retire_if_done(self) -> None:
        """Let the actors go once nothing is left to be done (under the lock)."""
        if self._closed and not self._busy and not self._waiting:
            self._idle = []  # an actor ends with its last handle
            self._changed.notify_all()

    # ------------------------------------------------------------------------------- giving out work

    def _new_process(self) -> _Process:
        return _Process(self._class.remote(*self._made_of))

    def _submit(
        self,
        func: Callable[..., Any],
        chunks: Sequence[Chunk],
        told: Callable[[int, Future[list[Outcome]]], None],
    ) -> None:
        self._check_running()
        works = [_Work(func, chunk, index, told) for index, chunk in enumerate(chunks)]
        with self._changed:
            self._waiting.extend(works)
            begun = self._give_out()
        self._begin(begun)

    def _give_out(self) -> list[tuple[_Work, _Process]]:
        """Choose who works on what waits (under the lock)."""
        begun = []
        while self._waiting and self._idle:
            work, process = self._waiting.popleft(), self._idle.pop(0)
            self._busy[work] = process
            begun.append((work, process))
        return begun

    def _begin(self, begun: Sequence[tuple[_Work, _Process]]) -> None:
        to_begin = deque(begun)
        while to_begin:
            work, process = to_begin.popleft()
            process.chunks += 1
            try:
                ref = process.actor.run.remote(work.func, work.chunk)
            except Exception as error:  # a function or an argument that cannot be sent
                to_begin.extend(self._end(work, error, None))
                continue
            ref.future().add_done_callback(partial(self._answered, work))

    def _answered(self, work: _Work, future: Future[list[Outcome]]) -> None:
        self._begin(self._end(work, future.exception(), future))

    def _end(
        self, work: _Work, error: BaseException | None, future: Future[list[Outcome]] | None
    ) -> list[tuple[_Work, _Process]]:
        """An actor has done a chunk, or failed: it takes the next, or another one does in its place."""
        with self._changed:
            process = self._busy.pop(work)
            if not self._closed or self._waiting:
                used_up = self._most_chunks is not None and process.chunks >= self._most_chunks
                self._idle.append(self._new_process() if used_up or isinstance(error, ActorError) else process)
            begun = self._give_out()
            self._retire_if_done()
        if error is not None:
            work.future.set_exception(error)
        elif future is not None:
            work.future.set_result(future.result())
        return begun


class _Work:
    """One chunk on its way; ``told`` gets its index and the future of what came of it."""

    __slots__ = ("chunk", "func", "future")

    def __init__(
        self,
        func: Callable[..., Any],
        chunk: Chunk,
        index: int,
        told: Callable[[int, Future[list[Outcome]]], None],
    ) -> None:
        self.func = func
        self.chunk = chunk
        self.future: Future[list[Outcome]] = Future()
        self.future.add_done_callback(lambda future: told(index, future))


def _join(processes: int | None, address: str | None) -> None:
    """Join a cluster, or start one with as many CPUs as the pool has processes."""
    if address is not None or os.environ.get("SHOAL_ADDRESS"):
        init(address)
    else:
        init(num_cpus=processes)


def _each(iterable: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    return (((item,), {}) for item in iterable)


def _chunks(calls: Iterator[Any], size: int) -> Iterator[Chunk]:
    if size < 1:
        raise ValueError(f"chunksize must be at least 1, got {size}")
    return iter(lambda: list(itertools.islice(calls, size)), [])
