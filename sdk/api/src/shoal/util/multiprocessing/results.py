"""What a pool's calls return: results that come later, and iterators over them."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import TimeoutError
from typing import Any

from shoal.session import runtime

Chunk = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""The positional and keyword arguments of calls that one actor makes one after the other."""
Outcome = tuple[bool, Any]
"""Whether a call succeeded, and its result or its exception."""

Told = Callable[[int, "Future[list[Outcome]]"], None]


def _outcomes(future: Future[list[Outcome]]) -> list[Outcome]:
    """Return what came of a chunk; one that failed as a whole is one failure."""
    error = future.exception()
    return future.result() if error is None else [(False, error)]


class AsyncResult:
    """The result of ``apply_async`` and ``map_async``: a value, or a list of them, that comes later."""

    def __init__(
        self,
        chunks: int,
        callback: Callable[[Any], Any] | None,
        error_callback: Callable[[BaseException], Any] | None,
        *,
        single: bool = False,
    ) -> None:
        self._chunks: list[list[Outcome]] = [[] for _ in range(chunks)]
        self._missing = chunks
        self._callback = callback
        self._error_callback = error_callback
        self._single = single
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not chunks:
            self._finish()

    def take(self, index: int, future: Future[list[Outcome]]) -> None:
        """Take in what came of a chunk."""
        self._chunks[index] = _outcomes(future)
        with self._lock:
            self._missing -= 1
            last = not self._missing
        if last:
            self._finish()

    def _finish(self) -> None:
        outcomes = [outcome for chunk in self._chunks for outcome in chunk]
        self._error: BaseException | None = next((value for succeeded, value in outcomes if not succeeded), None)
        values = [value for _, value in outcomes]
        self._value = values[0] if self._single else values
        try:
            if self._error is not None and self._error_callback is not None:
                self._error_callback(self._error)
            elif self._error is None and self._callback is not None:
                self._callback(self._value)
        finally:
            self._done.set()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the result is there, or for ``timeout`` seconds."""
        if not self._done.is_set():
            with runtime().getting.waiting():
                self._done.wait(timeout)

    def get(self, timeout: float | None = None) -> Any:
        """Return the result or raise the error; ``multiprocessing.TimeoutError`` where it is not there in time."""
        self.wait(timeout)
        if not self._done.is_set():
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value

    def ready(self) -> bool:
        """Tell whether the result is there."""
        return self._done.is_set()

    def successful(self) -> bool:
        """Tell whether there was no error; ``ValueError`` while the result is not there."""
        if not self._done.is_set():
            raise ValueError(f"{self!r} not ready")
        return self._error is None


class IMapIterator(Iterator[Any]):
    """An iterator over results, in order. An item whose call failed raises its error, and the next one follows."""

    def __init__(self, submit: Callable[[int, Told], bool], ahead: int) -> None:
        self._submit = submit
        self._submitted = 0
        self._taken = 0
        self._ready: deque[Outcome] = deque()
        self._came: queue.SimpleQueue[tuple[int, list[Outcome]]] = queue.SimpleQueue()  # at most ``ahead`` chunks
        self._early: dict[int, list[Outcome]] = {}
        self._ended = False
        for _ in range(ahead):
            self._submit_next()

    def _submit_next(self) -> None:
        if not self._ended:
            self._ended = not self._submit(self._submitted, self._tell)
            self._submitted += not self._ended

    def _tell(self, index: int, future: Future[list[Outcome]]) -> None:
        self._came.put((index, _outcomes(future)))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """Return the next result; ``multiprocessing.TimeoutError`` where it is not there in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ready:
            if self._taken == self._submitted and self._ended:
                raise StopIteration
            self._ready.extend(self._next_chunk(deadline))
            self._taken += 1
            self._submit_next()
        succeeded, value = self._ready.popleft()
        if succeeded:
            return value
        raise value

    def _next_chunk(self, deadline: float | None) -> list[Outcome]:
        while self._taken not in self._early:
            index, outcomes = self._receive(deadline)
            self._early[index] = outcomes
        return self._early.pop(self._taken)

    def _receive(self, deadline: float | None) -> tuple[int, list[Outcome]]:
        """Wait for any chunk."""
        try:
            return self._came.get_nowait()
        except queue.Empty:
            pass
        with runtime().getting.waiting():
            try:
                return self._came.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None


class IMapUnorderedIterator(IMapIterator):
    """An iterator over results in the order in which they become ready."""

    def _next_chunk(self, deadline: float | None) -> list[Outcome]:
        return self._receive(deadline)[1]
