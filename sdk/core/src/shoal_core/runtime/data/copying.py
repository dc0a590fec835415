"""Copying large buffers, and having memory for them: by several threads at once.

One core alone does not use all of the memory's bandwidth. Python's own copies hold the interpreter's lock; what is
called by ``ctypes`` does not. So other threads of this process go on meanwhile, and a large buffer is divided among a
few threads that live for this one copy.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import stringzilla

from shoal_core.machine import cpu_count

POPULATED_BYTES = 16 * 1024 * 1024
"""The step in which pages are entered, which for pages that are new takes ten times as long as to copy them."""
PAGE_BYTES = mmap.PAGESIZE
SHARED_BYTES = 8 * 1024 * 1024
"""What each thread gets at least; to start one takes as long as to copy a megabyte."""
MOST_THREADS = 4
MADV_POPULATE_WRITE = 23
"""Of Linux's ``madvise``; Python has no name for it yet, and holds the interpreter's lock meanwhile."""
STREAMS_WITH = "skylake"
"""What StringZilla calls processors with AVX-512: on those without, its copies are slower than the C library's."""
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _streaming() -> Callable[[int, int, int], object]:
    """Return what copies memory: a function of StringZilla's C interface where that goes past the caches.

    So does the C library's from some size on, but which that is, is decided when a process starts, and far too large in
    some virtual machines (measured for 80 MB by two threads: 5.9 ms, by StringZilla 3.8).
    """
    function = getattr(ctypes.CDLL(stringzilla.__file__), "sz_copy", None)
    if function is None or STREAMS_WITH not in stringzilla.__capabilities__:
        return ctypes.memmove
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None
    return cast(Callable[[int, int, int], object], function)


_copy_bytes = _streaming()

STEP_BYTES = 1024 * 1024 * 1024 if _copy_bytes is ctypes.memmove else 4 * 1024 * 1024
"""A signal is heard between steps, which take a tenth of a second at most.

Steps are as long as that allows where the C library copies: it goes past the caches where a move is longer than they
are (measured for 0.8 GB by two threads: 51 ms in steps of 16 MiB, else 39).
"""


def copy(target: memoryview, source: memoryview) -> None:
    """Copy ``source``, which is contiguous, to the beginning of ``target``, which is writable and one of bytes.

    It returns, or raises an interruption that came meanwhile, when no thread writes to ``target`` any more.
    """
    size = source.nbytes
    if size < 2 * SHARED_BYTES:
        target[:size] = _flat(source)
        return
    to, of = address_of(target, writable=True), address_of(source, writable=False)
    _divided(size, STEP_BYTES, partial(_move, to, of))


def populate(target: memoryview) -> None:
    """Enter all pages of a mapping, which begins where ``target`` does, so that none is entered as it is written to.

    The kernel clears pages that are new, which takes longer than to write to them. ``OSError`` where it has none; where
    it cannot do this (before Linux 5.14), nothing happens.
    """
    failures: list[int] = []
    _divided(target.nbytes, POPULATED_BYTES, partial(_enter, address_of(target, writable=True), failures))
    if failures and failures[0] != errno.EINVAL:
        raise OSError(failures[0], os.strerror(failures[0]))


def _divided(size: int, step: int, work: Callable[[int, int], None]) -> None:
    """Have several threads do something from and up to some byte, step by step; all but the last end with a page.

    Each takes the next step that is left, so that nobody waits for a thread that begins late.
    """
    count = max(1, min(size // SHARED_BYTES, MOST_THREADS, cpu_count()))
    share = -(-size // count // PAGE_BYTES) * PAGE_BYTES
    step = max(PAGE_BYTES, min(step, share))
    starts = iter(range(0, size, step))  # the interpreter takes the next one out in one step

    def take() -> None:
        for start in starts:
            work(start, min(start + step, size))

    helpers = [_Helper(take) for _ in range(count - 1)]
    try:
        for helper in helpers:
            helper.start()
        take()
    finally:
        _stop(helpers)


def _enter(address: int, failures: list[int], start: int, stop: int) -> None:
    """Enter pages, unless one thread has failed or was interrupted."""
    try:
        if not failures and _madvise(address + start, stop - start, MADV_POPULATE_WRITE):
            failures.append(ctypes.get_errno())
    except BaseException:
        failures.append(errno.EINTR)
        raise


def _move(to: int, of: int, start: int, stop: int) -> None:
    _copy_bytes(to + start, of + start, stop - start)


class _Helper:
    """A thread that does one part of the work.

    Nobody waits for it to begin, as ``threading.Thread.start`` does for a twentieth of what a copy of 80 MB takes.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._decided: dict[str, bool] = {}
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin in a new thread."""
        _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        if self._begins(True):
            try:
                self._work()
            finally:
                self._ended.set()

    def _begins(self, begins: bool) -> bool:
        """Return whether the work is begun at all, which whoever asks first decides, in one step of the interpreter."""
        return self._decided.setdefault("begins", begins)

    def wait(self) -> None:
        """Wait until the work is done."""
        self._ended.wait()

    def stop(self) -> None:
        """Have the work not begin any more; where it has, wait until it is done."""
        if self._begins(False):
            self.wait()


def _stop(helpers: Sequence[_Helper]) -> None:
    """Have no helper do anything any more, whatever interrupts that; an interruption is raised afterwards."""
    interruption: BaseException | None = None
    for helper in helpers:
        stopped = False
        while not stopped:
            try:
                helper.stop()
                stopped = True
            except BaseException as error:
                interruption = error
    if interruption is not None:
        raise interruption


class _Buffer(ctypes.Structure):
    """CPython's ``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)
_WRITABLE = 1  # PyBUF_WRITABLE; 0 is PyBUF_SIMPLE: contiguous bytes


def _flat(view: memoryview) -> memoryview:
    """Return a view as one of bytes."""
    if not view.nbytes:
        return memoryview(b"")  # there is no shape to cast
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


def address_of(view: memoryview, *, writable: bool) -> int:
    """Return where the bytes of a view lie; they lie there while the view lives, which is the caller's to see to."""
    buffer = _Buffer()
    _get_buffer(_flat(view), buffer, _WRITABLE if writable else 0)
    try:
        return int(buffer.buf)
    finally:
        _release_buffer(buffer)
