"""The loop whose turns threads run while they wait: one at a time, to its end, and always somebody."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from asyncio import base_events, selector_events
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial

import pytest
import uvloop

from shoal_core.runtime.loop import turns
from shoal_core.runtime.loop.interruptions import Deferred
from shoal_core.runtime.loop.spinning import Spin
from shoal_core.runtime.loop.turns import SharedLoop, attended, check_may_wait, is_here, leave, run_here, visit

LONG_SECONDS = 30.0
CONTEXT = contextvars.Context()


class Hosted:
    """A shared loop with a host of its own."""

    def __init__(self) -> None:
        self.loop = SharedLoop()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.call(lambda: None)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, function: Callable[[], object]) -> object:
        """Return what a function returns on the loop, without visiting it."""
        result: Future[object] = Future()

        def call() -> None:
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

        self.loop.call_soon_threadsafe(call)
        return result.result(LONG_SECONDS)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(LONG_SECONDS)
        assert not self.thread.is_alive()
        self.loop.close()


@pytest.fixture
def hosted() -> Iterator[Hosted]:
    hosted = Hosted()
    yield hosted
    hosted.end()


def spin() -> Spin:
    return Spin(0.0)


def wait_for(hosted: Hosted, event: threading.Event | Come) -> None:
    """Wait as a user thread does: visit, and sleep where somebody else runs the loop."""
    visit(hosted.loop, event.is_set, LONG_SECONDS, spin())
    assert event.wait(LONG_SECONDS)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def visit_with(
    hosted: Hosted, begin: Callable[[], object], done: Callable[[], bool], seconds: float = LONG_SECONDS
) -> None:
    """Visit the loop, which lets this thread in, and do something first."""
    until(lambda: hosted.loop._polls and not hosted.loop._turn.locked())
    begun: list[object] = []

    def begin_then() -> bool:
        if not begun:
            begun.append(begin())
        return done()

    visit(hosted.loop, begin_then, seconds, spin())
    assert begun


def stay(hosted: Hosted, over: threading.Event) -> threading.Thread:
    """Return a thread that is the loop's guest until something is over."""
    guest = threading.Thread(target=visit_with, args=(hosted, lambda: None, over.is_set))
    guest.start()
    until(lambda: hosted.loop._guest == guest.ident)
    return guest


def test_who_waits_runs_the_turns(hosted: Hosted) -> None:
    ran: list[int] = []
    came = threading.Event()

    def come() -> None:
        ran.append(threading.get_ident())
        assert asyncio.get_running_loop() is hosted.loop
        came.set()

    visit_with(hosted, lambda: hosted.loop.call_later(0.02, come), came.is_set)
    assert ran == [threading.get_ident()]
    assert not is_here(hosted.loop)


def test_what_is_run_here_has_a_turn_of_its_own_and_others_go_on_after_it(hosted: Hosted) -> None:
    ran: list[tuple[bool, int]] = []
    came = threading.Event()

    def callback() -> None:
        ran.append((is_here(hosted.loop), threading.get_ident()))
        hosted.loop.call_soon(came.set)

    until(lambda: run_here(hosted.loop, callback))  # else the host had the turn
    assert ran == [(True, threading.get_ident())]
    assert not is_here(hosted.loop)
    assert came.wait(LONG_SECONDS), "the host hears of what it has left"


def test_nothing_is_run_here_while_another_has_the_turn(hosted: Hosted) -> None:
    holds, over = threading.Event(), threading.Event()

    def hold() -> None:
        holds.set()
        over.wait(LONG_SECONDS)

    hosted.loop.call_soon_threadsafe(hold)
    assert holds.wait(LONG_SECONDS)
    assert not run_here(hosted.loop, lambda: None)
    over.set()
    loop = asyncio.new_event_loop()
    assert not run_here(loop, lambda: None), "it is not shared"
    loop.close()


def test_the_host_goes_on_by_itself_when_no_guest_comes(hosted: Hosted) -> None:
    came = threading.Event()
    leave(hosted.loop, came.set, CONTEXT)
    wait_for(hosted, came)
    assert hosted.call(threading.get_ident) == hosted.thread.ident
    late = threading.Event()
    leave(hosted.loop, late.set, CONTEXT)
    assert late.wait(LONG_SECONDS)


def test_what_is_left_for_a_guest_is_its_own_to_run(hosted: Hosted) -> None:
    for _ in range(50):
        ran: list[int] = []
        came = threading.Event()
        leave(hosted.loop, lambda ran=ran: ran.append(threading.get_ident()), CONTEXT)  # type: ignore[misc]
        leave(hosted.loop, came.set, CONTEXT)
        wait_for(hosted, came)
        if ran == [threading.get_ident()]:
            return
    pytest.fail("the host ran it each time")


def test_what_was_left_in_vain_wakes_the_host_at_once_from_then_on(hosted: Hosted) -> None:
    until(lambda: _is_left_after_a_visit(hosted))
    until(lambda: hosted.loop._left_in_vain)
    rung: list[bool] = []
    hosted.loop._ring = lambda: rung.append(True)  # type: ignore[method-assign]
    hosted.loop._naps = True
    try:
        leave(hosted.loop, lambda: None, CONTEXT)
    finally:
        hosted.loop._naps = False
        del hosted.loop._ring
    assert rung


def _is_left_after_a_visit(hosted: Hosted) -> bool:
    visit_with(hosted, lambda: None, lambda: True)
    leave(hosted.loop, lambda: None, CONTEXT)
    return hosted.loop._is_left


def test_a_visit_ends_when_its_time_is_over(hosted: Hosted) -> None:
    began = time.monotonic()
    visit_with(hosted, lambda: None, lambda: False, 0.05)
    assert time.monotonic() - began >= 0.05
    assert hosted.call(lambda: len(hosted.loop._scheduled)) == 0


def test_visits_that_are_over_at_once_hold_up_nothing(hosted: Hosted) -> None:
    """Somebody who asks again and again whether something has come keeps the host from it."""
    came = threading.Event()
    hosted.call(lambda: hosted.loop.call_later(0.02, came.set))
    end = time.monotonic() + LONG_SECONDS
    while not came.is_set() and time.monotonic() < end:
        visit(hosted.loop, came.is_set, 0.0, spin())
    assert came.is_set()


def test_there_is_nothing_to_visit_once_the_loop_has_ended() -> None:
    """Although it had not when the guest looked."""
    loop = SharedLoop()
    loop._host = 1
    turn = loop._turn

    class Ends:
        def acquire(self, blocking: bool) -> bool:
            loop._host = None
            return turn.acquire(blocking)

        def release(self) -> None:
            turn.release()

    loop._turn = Ends()  # type: ignore[assignment]
    assert not loop.visit(lambda: False, 0.01, spin())
    assert loop._visits == 0
    assert not turn.locked()
    loop.close()


def test_a_visit_ends_with_the_loop() -> None:
    hosted = Hosted()
    visit_with(hosted, lambda: hosted.loop.call_later(0.05, hosted.loop.stop), lambda: False)
    hosted.thread.join(LONG_SECONDS)
    assert not hosted.thread.is_alive()
    visit(hosted.loop, lambda: False, LONG_SECONDS, spin())  # there is nothing to visit
    hosted.loop.close()


def test_whoever_waits_while_another_is_the_guest_is_served_by_it(hosted: Hosted) -> None:
    came, over = threading.Event(), threading.Event()
    guest = stay(hosted, over)
    leave(hosted.loop, lambda: hosted.loop.call_later(0.01, came.set), CONTEXT)
    wait_for(hosted, came)
    assert hosted.loop._guest == guest.ident
    leave(hosted.loop, over.set, CONTEXT)
    guest.join(LONG_SECONDS)
    assert not guest.is_alive()


def test_the_host_sleeps_while_one_guest_stays_and_goes_on_after_it(hosted: Hosted) -> None:
    over = threading.Event()
    guest = stay(hosted, over)

    def sleeps() -> bool:
        leave(hosted.loop, lambda: None, CONTEXT)  # either of them may see that something came
        return hosted.loop._sleeps

    until(sleeps)
    leave(hosted.loop, over.set, CONTEXT)
    guest.join(LONG_SECONDS)
    assert hosted.call(threading.get_ident) == hosted.thread.ident
    assert not hosted.loop._sleeps


def test_what_a_guest_has_not_come_to_the_host_runs(hosted: Hosted) -> None:
    came, ran = threading.Event(), threading.Event()

    def come() -> None:
        came.set()
        hosted.loop.call_soon(ran.set)

    leave(hosted.loop, come, CONTEXT)
    wait_for(hosted, came)
    assert ran.wait(LONG_SECONDS)


def test_the_host_hears_of_timers_that_a_guest_has_set(hosted: Hosted) -> None:
    for _ in range(200):
        late = threading.Event()
        visit_with(hosted, lambda late=late: hosted.loop.call_later(0.0001, late.set), lambda: True)  # type: ignore[misc]
        assert late.wait(LONG_SECONDS)


def test_only_one_thread_runs_callbacks_and_each_is_run_once(hosted: Hosted) -> None:
    """Threads that visit, threads that do not, sockets and timers, with the interpreter giving way all the time."""
    inside: list[int] = []
    failures: list[str] = []
    count = 0

    def step() -> None:
        nonlocal count
        inside.append(threading.get_ident())
        if len(inside) != 1 or asyncio.get_running_loop() is not hosted.loop:
            failures.append(f"{inside}")
        count += 1
        inside.pop()

    def user(seed: int, visits: bool) -> None:
        draw = random.Random(seed)
        for _ in range(600):
            came = threading.Event()

            def come(came: threading.Event = came) -> None:
                step()
                came.set()

            kind = draw.randrange(3)
            if kind == 0:
                leave(hosted.loop, come, CONTEXT)
            elif kind == 1:
                hosted.loop.call_soon_threadsafe(come)
            else:
                hosted.loop.call_soon_threadsafe(partial(hosted.loop.call_later, draw.random() / 2000, come))
            if visits:
                wait_for(hosted, came)
            else:
                assert came.wait(LONG_SECONDS)
            if draw.random() < 0.1:
                time.sleep(draw.random() * 2 * turns.NAP_SECONDS)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=user, args=(seed, seed % 3 != 2)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * LONG_SECONDS)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
    assert count == 6 * 600


def test_data_that_comes_while_the_host_naps_is_read_by_the_next_guest(hosted: Hosted) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    got: list[tuple[bytes, int]] = []
    came = threading.Event()

    def readable() -> None:
        got.append((ours.recv(10), threading.get_ident()))
        came.set()

    hosted.call(lambda: hosted.loop.add_reader(ours, readable))
    for _ in range(100):
        came.clear()
        visit_with(hosted, lambda: None, lambda: True)  # the host naps from now on
        theirs.send(b"x")
        wait_for(hosted, came)
    hosted.call(lambda: hosted.loop.remove_reader(ours))
    assert len(got) == 100
    assert any(thread == threading.get_ident() for _, thread in got)
    ours.close()
    theirs.close()


# ------------------------------------------------------------------------------- who may not visit


async def test_a_thread_with_a_running_loop_is_no_guest() -> None:
    hosted = Hosted()
    visit(hosted.loop, lambda: False, None, spin())
    assert hosted.loop._visits == 0
    await asyncio.to_thread(hosted.end)


def test_a_thread_deep_in_calls_is_no_guest(hosted: Hosted) -> None:
    def sink(depth: int) -> None:
        if depth:
            sink(depth - 1)
        else:
            visit(hosted.loop, lambda: False, None, spin())

    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    sink(sys.getrecursionlimit() - depth - turns.SPARE_FRAMES // 2)
    assert hosted.loop._visits == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_copy_of_the_process_is_no_guest(hosted: Hosted) -> None:
    child = os.fork()
    if not child:
        visit(hosted.loop, lambda: False, None, spin())
        os._exit(hosted.loop._visits)
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------------------- signals


class Interruption(BaseException):
    """What a handler raises."""


@pytest.fixture
def interrupted() -> Iterator[Callable[[], None]]:
    """Return what interrupts this thread by a handler that raises."""

    def raises(number: int, frame: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGUSR1, raises)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is raises
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_does_not_break_into_a_turn(hosted: Hosted, interrupted: Callable[[], None]) -> None:
    whole: list[bool] = []

    def turn() -> None:
        assert is_here(hosted.loop)
        interrupted()
        time.sleep(0.01)
        whole.append(True)

    with pytest.raises(Interruption):
        visit_with(hosted, lambda: hosted.loop.call_soon(turn), lambda: False)
    assert whole
    assert hosted.loop._guest is None
    assert hosted.call(lambda: 7) == 7


def test_a_handler_is_called_where_another_has_the_turn(interrupted: Callable[[], None]) -> None:
    class Taken:
        def acquire(self, blocking: bool) -> bool:
            interrupted()
            return False

    loop = SharedLoop()
    loop._host = 1
    loop._turn = Taken()  # type: ignore[assignment]
    with pytest.raises(Interruption):
        loop.visit(lambda: False, None, spin())
    loop.close()


def test_a_handler_is_called_while_nothing_comes(hosted: Hosted, interrupted: Callable[[], None]) -> None:
    timer = threading.Timer(0.05, interrupted)
    with pytest.raises(Interruption):
        visit_with(hosted, timer.start, lambda: False)
    assert hosted.call(lambda: 7) == 7
    timer.join()


def test_a_visit_goes_on_after_a_handler_that_does_not_raise(hosted: Hosted) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        came = threading.Event()

        def begin() -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            hosted.loop.call_later(0.05, came.set)

        visit_with(hosted, begin, came.is_set)
        assert came.is_set()
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


class Come:
    """An event whose ``wait`` a handler may leave by an exception; one of ``threading`` may stay locked by that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.set = self._lock.release

    def is_set(self) -> bool:
        return not self._lock.locked()

    def wait(self, timeout: float) -> bool:
        return self._lock.acquire(timeout=timeout)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may hit a finalizer, too
def test_signals_at_any_moment_leave_nothing_behind(hosted: Hosted) -> None:
    """A handler that raises at random moments, thousands of times: the loop is always run by somebody afterwards."""

    def raises(number: int, frame: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, raises)
    hits = 0
    try:
        for index in range(6000):
            came = Come()
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + index % 300 * 1e-6)
                leave(hosted.loop, came.set, CONTEXT)
                wait_for(hosted, came)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interruption:
                hits += 1
            assert signal.getsignal(signal.SIGALRM) is raises
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hosted.call(lambda: 7) == 7
    assert hits


# ------------------------------------------------------------------------------- loops that attend


@pytest.mark.parametrize("make", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_loop_attends_to_the_shared_one(hosted: Hosted, make: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """What is left by its callbacks is run after them, in the same thread; what comes from outside too, mostly."""
    own = make()
    ran: list[int] = []
    rounds = 0

    def come() -> None:
        ran.append(threading.get_ident())
        own.call_soon_threadsafe(again)

    def again() -> None:
        nonlocal rounds
        assert asyncio.get_running_loop() is own
        rounds += 1
        if rounds == 200:
            own.stop()
        else:
            leave(hosted.loop, come, CONTEXT)

    own.call_soon(again)
    with attended(hosted.loop, own):
        own.run_forever()
    own.close()
    assert len(ran) == 199
    assert ran.count(threading.get_ident()) > 100
    assert hosted.call(lambda: 7) == 7


def test_a_loop_that_is_held_up_holds_up_nobody(hosted: Hosted) -> None:
    own = asyncio.new_event_loop()

    def hold_up() -> None:
        assert hosted.call(threading.get_ident) == hosted.thread.ident
        own.stop()

    own.call_soon(hold_up)
    with attended(hosted.loop, own):
        own.run_forever()
    own.close()


def test_what_a_loop_leaves_before_it_is_held_up_is_seen_to(hosted: Hosted) -> None:
    own = asyncio.new_event_loop()
    came = threading.Event()
    seen: list[bool] = []

    def hold_up() -> None:
        until(lambda: hosted.loop._polls)
        leave(hosted.loop, came.set, CONTEXT)
        seen.append(came.wait(LONG_SECONDS))
        own.stop()

    own.call_soon(hold_up)
    with attended(hosted.loop, own):
        own.run_forever()
    own.close()
    assert seen == [True]


# ------------------------------------------------------------------------------- what it leans on


def test_asyncio_has_what_the_loop_leans_on() -> None:
    base, selecting = base_events.BaseEventLoop, selector_events.BaseSelectorEventLoop
    assert all(hasattr(base, name) for name in ("_run_once", "_call_soon"))
    assert hasattr(selecting, "_write_to_self")
    loop = asyncio.SelectorEventLoop()
    names = ("_ready", "_scheduled", "_selector", "_stopping", "_thread_id")
    assert all(hasattr(loop, name) for name in names)
    loop.close()


def test_nothing_of_a_loop_stays() -> None:
    gc.collect()  # what tests before left for it, descriptors among it
    descriptors = os.listdir("/proc/self/fd")
    threads = threading.active_count()
    for _ in range(3):
        hosted = Hosted()
        visit_with(hosted, lambda: None, lambda: False, 0.01)
        hosted.end()
    del hosted
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert threading.active_count() == threads


def test_ctrl_c_ends_a_program_that_waits() -> None:
    """By the handler that Python itself has."""
    program = f"""
import signal, threading
from shoal_core.runtime.loop.interruptions import Deferred
from shoal_core.runtime.loop.spinning import Spin
from shoal_core.runtime.loop.turns import SharedLoop, visit
signal.signal(signal.SIGINT, signal.default_int_handler)  # else who started the tests may have it ignored
loop = SharedLoop()
threading.Thread(target=loop.run_forever, daemon=True).start()
while not loop._polls: pass
try:
    visit(loop, lambda: print("waits", flush=True), {LONG_SECONDS}, Spin(0.0))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith("interrupted\n")
        assert process.wait(LONG_SECONDS) == 0


def test_a_callback_that_would_wait_for_the_loop_is_told_so(hosted: Hosted) -> None:
    """Whoever runs it: it would wait for itself."""

    def wait() -> None:
        check_may_wait(hosted.loop)

    with pytest.raises(RuntimeError, match="callback or a finalizer"):
        visit_with(hosted, wait, lambda: True)
    with pytest.raises(RuntimeError, match="callback or a finalizer"):
        hosted.call(wait)
    wait()


def test_what_was_noted_beside_a_signal_whose_handler_raises_is_delivered_too() -> None:
    heard: list[int] = []

    def raises(number: int, frame: object) -> None:
        heard.append(number)
        raise Interruption

    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(number, raises) for number in numbers]
    try:
        deferred = Deferred(lambda: None)
        with deferred:
            for number in numbers:
                signal.raise_signal(number)
        assert not heard
        with pytest.raises(Interruption):
            deferred.deliver()
        assert heard == list(numbers)
        assert all(signal.getsignal(number) is raises for number in numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
