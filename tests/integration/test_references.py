"""An object goes when the last reference to it goes, wherever that was, and no sooner: nothing is left behind."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy
import pytest

import shoal
from shoal import exceptions
from shoal.session import _membership, runtime
from shoal.util import state
from shoal.util.queue import Queue
from tests.integration.stores import used_bytes
from tests.integration.waiting import get, has_stopped, until

LARGE = 1_000_000
"""Too large to travel inline."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with shoal.init(num_cpus=2, log_to_driver=False):
        yield


def known() -> list[state.ObjectState]:
    """Return what all processes know of objects, but for the handles of actors."""
    return [row for row in state.list_objects(limit=10_000) if row.reference_type != "ACTOR_HANDLE"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Hold that what a test made is gone at its end: objects, borrows, segments, mappings."""

    def nothing() -> bool:
        gc.collect()
        return not known() and used_bytes() == 0 and not runtime().reactor.borrowing.lent

    until(nothing, f"what tests before have left: {known()}")
    yield
    deadline = time.monotonic() + 15
    while not nothing() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert known() == []
    assert used_bytes() == 0
    assert runtime().reactor.borrowing.lent == {}


@shoal.remote
def large(letter: str = "x") -> bytes:
    return letter.encode() * LARGE


@shoal.remote
def length(value: bytes) -> int:
    return len(value)


@shoal.remote
def length_of_first(refs: list[Any]) -> int:
    return len(get(refs[0]))


@shoal.remote
def wrapped(refs: Any) -> Any:
    return [refs]


@shoal.remote
def made_inside() -> list[Any]:
    return [large.remote("i"), shoal.put(b"p" * LARGE)]


class _Keeper:
    def __init__(self, refs: Any = None) -> None:
        self.refs = refs

    def keep(self, refs: Any) -> None:
        self.refs = refs

    def make(self) -> list[Any]:
        return [shoal.put(b"k" * LARGE)]

    def read(self) -> int:
        return len(get(self.refs[0]))

    def give(self) -> Any:
        return self.refs

    def drop(self) -> None:
        self.refs = None

    def pid(self) -> int:
        return os.getpid()


Keeper: Any = shoal.remote(num_cpus=0)(_Keeper)


def held_by(ref: shoal.ObjectRef[Any]) -> int:
    """Return how many other processes the driver counts as holders of its object."""
    return len(runtime().reactor.borrowing.lent.get(ref._state.key, {}))


class TestWhatHoldsAnObject:
    def test_a_local_reference(self) -> None:
        ref = shoal.put(b"x" * LARGE)
        assert len(get(ref)) == LARGE
        assert [row.reference_type for row in known()] == ["LOCAL_REFERENCE"]
        del ref

    def test_a_task_that_has_not_ended(self) -> None:
        ref = length.remote(large.remote())
        assert get(ref) == LARGE

    def test_many_tasks_at_once(self) -> None:
        ref = shoal.put(b"x" * LARGE)
        refs = [length.remote(ref) for _ in range(50)] + [length_of_first.remote([ref]) for _ in range(50)]
        del ref
        assert get(refs) == [LARGE] * 100

    def test_a_container(self) -> None:
        outer = shoal.put({"inner": [shoal.put(b"x" * LARGE)]})
        gc.collect()
        reasons = {row.reference_type: row.object_size for row in known()}
        assert reasons["CAPTURED_IN_OBJECT"] > LARGE
        assert len(get(get(outer)["inner"][0])) == LARGE

    def test_a_container_in_a_container_of_tasks(self) -> None:
        ref = wrapped.remote([wrapped.remote([large.remote()])])
        (inner,) = get(get(ref)[0][0])[0]
        del ref
        assert len(get(inner)) == LARGE

    def test_a_result_that_was_made_inside_a_task(self) -> None:
        ref = made_inside.remote()
        first, second = get(ref)
        del ref
        assert get(first) == b"i" * LARGE
        del first
        assert get(second) == b"p" * LARGE

    def test_a_result_that_is_passed_on_without_being_looked_at(self) -> None:
        assert get(length_of_first.remote(get(wrapped.remote(large.remote()))[:0] or [large.remote()])) == LARGE
        ref = made_inside.remote()
        assert get(length.remote(get(ref)[0])) == LARGE

    def test_the_state_of_an_actor(self) -> None:
        ref = shoal.put(b"x" * LARGE)
        keeper = Keeper.remote([ref])
        assert get(keeper.read.remote()) == LARGE
        assert held_by(ref) == 1
        key = ref._state.key
        del ref
        assert get(keeper.read.remote()) == LARGE
        assert runtime().reactor.borrowing.lent.keys() == {key}
        get(keeper.drop.remote())

    def test_an_actor_that_hands_on_what_it_was_given(self) -> None:
        first, second = Keeper.remote(), Keeper.remote()
        get(first.keep.remote([large.remote()]))
        get(second.keep.remote(get(first.give.remote())))
        get(first.drop.remote())
        assert get(second.read.remote()) == LARGE
        get(second.drop.remote())

    def test_an_actor_that_owns_what_others_keep(self) -> None:
        owner, keeper = Keeper.remote(), Keeper.remote()
        get(keeper.keep.remote(get(owner.make.remote())))
        assert get(keeper.read.remote()) == LARGE
        get(keeper.drop.remote())

    def test_an_actor_that_is_gone(self) -> None:
        keeper = Keeper.remote([shoal.put(b"x" * LARGE)])
        assert get(keeper.read.remote()) == LARGE
        del keeper

    def test_items_of_a_generator(self) -> None:
        @shoal.remote
        def items() -> Iterator[Any]:
            for letter in b"abc":
                yield {"ref": shoal.put(bytes([letter]) * LARGE)}

        generator = items.remote()
        refs = [get(item)["ref"] for item in generator]
        del generator
        assert [get(ref)[:1] for ref in refs] == [b"a", b"b", b"c"]

    def test_items_that_nobody_took(self) -> None:
        @shoal.remote
        def items() -> Iterator[Any]:
            for _ in range(5):
                yield [shoal.put(b"x" * LARGE)]

        generator = items.remote()
        assert len(get(get(next(generator))[0])) == LARGE
        del generator

    def test_items_of_a_queue(self) -> None:
        queue: Queue[Any] = Queue()
        queue.put([shoal.put(b"x" * LARGE)])
        queue.put([large.remote()])
        gc.collect()
        (first,) = queue.get()
        assert len(get(first)) == LARGE
        (second,) = queue.get()
        assert len(get(second)) == LARGE
        queue.put([first])
        queue.shutdown()

    def test_exceptions(self) -> None:
        @shoal.remote
        def fail(refs: list[Any]) -> NoReturn:
            raise ValueError("look", *refs, shoal.put(b"m" * LARGE))

        @shoal.remote
        def pass_on(value: Any) -> Any:
            return value

        ref = shoal.put(b"g" * LARGE)
        failed = pass_on.remote(fail.remote([ref]))
        del ref
        with pytest.raises(ValueError, match="look") as caught:
            get(failed)
        _, given, made = caught.value.cause.args  # type: ignore[attr-defined]
        del failed, caught
        assert (get(given)[:1], get(made)[:1]) == (b"g", b"m")
        del given, made

    def test_exceptions_of_generators_and_of_calls_that_are_retried(self) -> None:
        @shoal.remote(max_retries=2, retry_exceptions=True)
        def fail() -> NoReturn:
            raise KeyError(shoal.put(b"x" * LARGE))

        @shoal.remote
        def items() -> Iterator[int]:
            yield 1
            raise KeyError(shoal.put(b"x" * LARGE))

        with pytest.raises(KeyError) as caught:
            get(fail.remote())
        assert len(get(caught.value.args[0])) == LARGE
        del caught
        refs = list(items.remote())
        with pytest.raises(KeyError) as caught:
            get(refs[1])
        assert len(get(caught.value.args[0])) == LARGE
        del caught, refs

    def test_an_argument_of_a_task_that_raises_crashes_or_is_cancelled(self) -> None:
        @shoal.remote(max_retries=0)
        def end(how: str, refs: list[Any]) -> None:
            if how == "crash":
                os._exit(1)
            if how == "wait":
                threading.Event().wait()
            raise RuntimeError(how)

        ref = shoal.put(b"x" * LARGE)
        for how, error in (("raise", RuntimeError), ("crash", exceptions.WorkerCrashedError)):
            with pytest.raises(error):
                get(end.remote(how, [ref]))
        waiting = end.remote("wait", [ref])
        shoal.cancel(waiting)
        with pytest.raises(exceptions.TaskCancelledError):
            get(waiting)
        until(lambda: held_by(ref) == 0, "the dead hold nothing")

    def test_threads_that_drop_and_pass_on_the_same_reference(self) -> None:
        ref = shoal.put(b"x" * LARGE)
        failures: list[BaseException] = []

        def use() -> None:
            try:
                for _ in range(20):
                    assert get(length_of_first.remote([ref])) == LARGE
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


class TestDeaths:
    def test_a_borrower_that_dies_holds_nothing(self) -> None:
        ref = shoal.put(b"x" * LARGE)
        keeper = Keeper.remote([ref])
        assert get(keeper.read.remote()) == LARGE
        os.kill(get(keeper.pid.remote()), signal.SIGKILL)
        until(lambda: held_by(ref) == 0, "the dead borrower holds nothing")
        assert len(get(ref)) == LARGE

    def test_the_objects_of_an_owner_that_dies_are_lost_and_say_so(self) -> None:
        owner = Keeper.remote()
        (ref,) = get(owner.make.remote())
        other = Keeper.remote([ref])
        assert get(other.read.remote()) == LARGE
        kept_pid = get(owner.pid.remote())
        container = get(owner.make.remote())
        os.kill(kept_pid, signal.SIGKILL)
        with pytest.raises(exceptions.OwnerDiedError, match="has died"):
            get(container[0])
        with pytest.raises(exceptions.OwnerDiedError):
            get(length.remote(container[0]))
        del container, ref
        get(other.drop.remote())

    def test_what_an_owner_that_died_had_been_lent_goes(self) -> None:
        ref = shoal.put(b"x" * LARGE)
        first, second = Keeper.remote([ref]), Keeper.remote()
        get(second.keep.remote(get(first.give.remote())))
        shoal.kill(first)
        del ref
        assert get(second.read.remote()) == LARGE
        shoal.kill(second)


class TestWhoHoldsWhat:
    def test_a_process_that_is_silent_is_named_and_holds_up_nobody(self) -> None:
        keeper = Keeper.remote([shoal.put(b"x" * LARGE)])
        pid = get(keeper.pid.remote())
        assert get(keeper.read.remote()) == LARGE
        assert pid in {row.pid for row in known()}
        os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: has_stopped(pid), "each of its threads has heard of that: one of them answers")
            with pytest.raises(state.StateUnavailableError, match="did not answer its node in time"):
                state.list_objects(timeout=3)
            others = state.list_objects(timeout=3, raise_on_missing_output=False)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert pid not in {row.pid for row in others if row.reference_type != "PINNED_IN_MEMORY"}
        assert os.getpid() in {row.pid for row in others}
        assert pid in {row.pid for row in known()}
        del keeper

    def test_what_a_task_was_given_is_told_while_it_runs(self) -> None:
        @shoal.remote
        def hold(value: Any, refs: list[Any], gate: Any) -> int:
            get(gate.wait.remote())
            return len(value.data) + len(refs)

        class Gate:
            def __init__(self) -> None:
                self.opened = threading.Event()

            def open(self) -> None:
                self.opened.set()

            def wait(self) -> None:
                self.opened.wait()

        gate: Any = shoal.remote(num_cpus=0, max_concurrency=2)(Gate).remote()
        ref = shoal.put(Buffer(b"x" * LARGE))
        held = hold.remote(ref, [ref], gate)

        def of_worker(reason: str) -> bool:
            rows = [row for row in state.get_objects(ref.hex()) if row.type == "WORKER"]
            return any(reason in row.reasons for row in rows)

        until(lambda: of_worker("PINNED_IN_MEMORY"), "the task has mapped its argument")
        assert of_worker("USED_BY_PENDING_TASK")
        (mine,) = [row for row in state.get_objects(ref.hex()) if row.type == "DRIVER"]
        assert mine.reasons[0] == "USED_BY_PENDING_TASK"
        assert "LOCAL_REFERENCE" in mine.reasons
        get(gate.open.remote())
        assert get(held) == LARGE + 1
        del gate


class TestMappings:
    """Arrays are views of shared memory; they stay what they are for as long as any of them lives."""

    @pytest.fixture
    def make(self) -> Callable[[int], Any]:
        return lambda number: numpy.full(LARGE, number, dtype=numpy.uint8)

    def test_an_array_is_read_only_and_outlives_its_reference_and_its_memory_is_not_reused(
        self, make: Callable[[int], Any]
    ) -> None:
        ref = shoal.put({"array": make(1), "text": "x"})
        array = get(ref)["array"]
        part = array[10:20]
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2
        del ref, array
        until(lambda: [row.object_id for row in known()] == [""], "only the mapping is left")
        assert used_bytes() > LARGE
        for number in range(2, 30):
            assert get(shoal.put(make(number)))[0] == number  # would write into the same pages
        assert bytes(part) == b"\1" * 10
        del part

    def test_freed_pages_are_used_again_only_when_the_last_view_is_gone(self, make: Callable[[int], Any]) -> None:
        @shoal.remote
        def sum_of(array: Any) -> int:
            return int(array.sum())

        views = [get(shoal.put(make(number)))[::1000] for number in range(20)]
        gc.collect()
        assert get([sum_of.remote(make(1)) for _ in range(20)]) == [LARGE] * 20
        assert [set(view.tolist()) for view in views] == [{number} for number in range(20)]
        del views

    def test_an_actor_keeps_a_view_of_an_argument(self, make: Callable[[int], Any]) -> None:
        class Views:
            def keep(self, array: Any) -> None:
                self.view = array[5:10]

            def read(self) -> list[int]:
                return list(self.view.tolist())

        views = shoal.remote(num_cpus=0)(Views).remote()
        get(views.keep.remote(make(7)))
        for number in range(8, 20):
            get(shoal.put(make(number)))
        assert get(views.read.remote()) == [7] * 5
        until(lambda: any(row.reference_type == "PINNED_IN_MEMORY" for row in known()), "the view is told of")
        del views

    def test_buffers_of_classes_that_speak_pickle_5(self) -> None:
        ref = shoal.put([Buffer(b"x" * LARGE), Buffer(b"y" * LARGE)])
        first, second = get(ref)
        del ref
        assert (first.data.readonly, second.data.readonly) == (True, True)
        assert (bytes(first.data[:3]), bytes(second.data[-3:])) == (b"xxx", b"yyy")
        del first
        assert bytes(second.data) == b"y" * LARGE
        del second


class Buffer:
    """Pickles its bytes out of band."""

    def __init__(self, data: Any) -> None:
        self.data = memoryview(data)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Buffer, (pickle.PickleBuffer(self.data),)


BORROWING_DRIVER = """
import os, shoal
shoal.init(os.environ["ADDRESS"], namespace="shared")
keeper = shoal.get_actor("keeper")
(ref,) = shoal.get(keeper.give.remote(), timeout=30)
print(len(shoal.get(ref, timeout=30)), flush=True)
shoal.get(keeper.keep.remote([shoal.put(b"z" * 1_000_000)]), timeout=30)
print(shoal.get(keeper.read.remote(), timeout=30), flush=True)
"""

QUIET_DRIVER = """
import os, time, shoal
shoal.init(os.environ["ADDRESS"], namespace="shared")
(ref,) = shoal.get(shoal.get_actor("keeper").give.remote(), timeout=30)
print(len(shoal.get(ref, timeout=30)), flush=True)
time.sleep(1)  # all is said and heard: nobody finds it silent
"""

KEEPING_DRIVER = """
import gc, os, pickle, shoal
from shoal.util import state

shoal.init(os.environ["ADDRESS"])
captured, pickled = shoal.put(b"c" * 1_000_000), shoal.put(b"p" * 1_000_000)
data = pickle.dumps([pickled])

@shoal.remote
def read_captured():
    return len(shoal.get(captured))

print(shoal.get(read_captured.remote(), timeout=30))
del captured, pickled
gc.collect()
print(shoal.get(read_captured.remote(), timeout=30))
print(len(shoal.get(pickle.loads(data)[0], timeout=30)))
print(sum("KEPT_FOR_JOB" in row.reasons for row in state.list_objects()))
"""


class TestOtherDrivers:
    def test_references_cross_drivers_and_objects_end_with_the_driver_that_owns_them(self) -> None:
        keeper = Keeper.options(name="keeper", namespace="shared").remote([shoal.put(b"x" * LARGE)])
        assert get(keeper.read.remote()) == LARGE
        assert run_driver(BORROWING_DRIVER) == [LARGE, LARGE]
        until(lambda: error_of(keeper.read.remote()) is exceptions.OwnerDiedError, "the keeper has heard of the death")
        shoal.kill(keeper)

    def test_what_a_driver_holds_when_it_shuts_down_is_held_no_more(self) -> None:
        keeper = Keeper.options(name="keeper", namespace="shared").remote([shoal.put(b"x" * LARGE)])
        assert run_driver(QUIET_DRIVER) == [LARGE]
        lent = runtime().reactor.borrowing.lent
        until(lambda: [len(holders) for holders in list(lent.values())] == [1], "only the actor holds it")
        shoal.kill(keeper)

    def test_what_code_captures_and_what_is_pickled_by_hand_is_kept_until_the_job_ends(self) -> None:
        assert run_driver(KEEPING_DRIVER) == [LARGE, LARGE, LARGE, 2]


def error_of(ref: Any) -> type[BaseException] | None:
    """Return the class of the exception that a task ended with."""
    try:
        get(ref)
    except exceptions.TaskError as error:
        return type(error.cause)
    return None


def run_driver(program: str) -> list[int]:
    """Run another driver on this cluster to its end, and return the numbers that it printed."""
    current = runtime()
    host = _membership.host
    assert host is not None
    joining = {"ADDRESS": current.address, "SHOAL_CREDENTIALS": host.credentials_path, "SHOAL_CLUSTER": host.cluster}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | joining, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]
