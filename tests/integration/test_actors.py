"""Actors on a real cluster: state, order, errors, names, lifetimes, deaths and restarts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import io
import os
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from shoal import exceptions
from shoal.actor import ActorClass, ActorClassInheritanceException, ActorHandle
from shoal.util import list_named_actors
from tests.integration.waiting import SECONDS, get, is_gone, until


class CounterClass:
    """Counts, and knows where it runs."""

    def __init__(self, start: int = 0, *, step: int = 1) -> None:
        self.value = start
        self.step = step
        self.seen: list[Any] = []

    def increment(self) -> int:
        self.value += self.step
        return self.value

    def append(self, item: Any) -> None:
        self.seen.append(item)

    def all(self) -> list[Any]:
        return self.seen

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        return shoal.get_runtime_context().get_node_id()

    def restarted(self) -> bool:
        return shoal.get_runtime_context().was_current_actor_reconstructed

    def crash(self) -> None:
        os._exit(7)

    def crash_if_first(self) -> int:
        if not self.restarted():
            os._exit(7)
        return self.value


Counter: Any = shoal.remote(CounterClass)


class EchoClass:
    def echo(self, value: Any) -> Any:
        return value


class AsyncEchoClass:
    async def echo(self, value: Any) -> Any:
        return value


class ExitsClass:
    """Leaves by ``sys.exit`` until a file has so many bytes."""

    def __init__(self, tries: Path) -> None:
        self.tries = tries

    def leave(self, crashes: int) -> int:
        with self.tries.open("a") as file:
            file.write("x")
        if (count := self.tries.stat().st_size) <= crashes:
            sys.exit(count)
        return count

    def stop(self) -> None:
        sys.exit(0)


class AsyncExitsClass(ExitsClass):
    """The same on an event loop."""

    async def loops(self) -> None:
        """Make the class one of async actors."""


class GateClass:
    """An async actor: calls wait at gates until others open them."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.waiting = 0

    def _gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def wait(self, name: str = "") -> str:
        self.waiting += 1
        await self._gate(name).wait()
        return name

    async def open(self, name: str = "") -> None:
        self._gate(name).set()

    async def count(self) -> int:
        return self.waiting


Gate: Any = shoal.remote(GateClass)


def failure_of(refs: Any) -> Exception:
    with pytest.raises(exceptions.RayError) as raised:
        get(refs)
    return raised.value


@shoal.remote
def closed(gate: ActorHandle[GateClass], value: int) -> int:
    """Return a value once the gate is open."""
    shoal.get(gate.wait.remote())
    return value


# ------------------------------------------------------------------------------------ calls


@pytest.mark.usefixtures("two_cpus")
class TestCalls:
    def test_state_is_kept_over_calls(self) -> None:
        counter = Counter.remote(10, step=5)
        assert get([counter.increment.remote() for _ in range(3)]) == [15, 20, 25]
        other = Counter.remote()
        assert get(other.increment.remote()) == 1
        assert get(counter.increment.remote()) == 30

    def test_an_actor_may_have_actors_of_its_own_class(self) -> None:
        @shoal.remote(num_cpus=0)
        class Link:
            def __init__(self, below: int, *, name: str = "link") -> None:
                self.name = f"{name} {below}"
                self.next = Link.remote(below - 1, name=name) if below else None  # type: ignore[attr-defined]

            def names(self) -> list[str]:
                return [self.name, *(get(self.next.names.remote()) if self.next else [])]

        links = Link.remote(2)  # type: ignore[attr-defined]
        assert get(links.names.remote()) == ["link 2", "link 1", "link 0"]

    def test_calls_of_one_caller_run_in_their_order(self) -> None:
        counter = Counter.remote()
        for i in range(2_000):
            counter.append.remote(i)
        assert get(counter.all.remote()) == list(range(2_000))

    def test_an_early_call_whose_argument_is_late_still_comes_first(self) -> None:
        gate, counter = Gate.remote(), Counter.remote()
        counter.append.remote(closed.remote(gate, 0))
        counter.append.remote(1)
        seen = counter.all.remote()
        assert shoal.wait([seen], timeout=0.1)[0] == []
        gate.open.remote()
        assert get(seen) == [0, 1]

    def test_out_of_order_execution_lets_later_calls_pass(self) -> None:
        gate = Gate.remote()
        counter = Counter.options(allow_out_of_order_execution=True).remote()
        late = counter.append.remote(closed.remote(gate, 0))
        get(counter.append.remote(1))
        gate.open.remote()
        get(late)
        assert get(counter.all.remote()) == [1, 0]

    @pytest.mark.parametrize("kind", ["async", "threaded"])
    def test_calls_that_run_at_once_do_not_wait_for_the_arguments_of_others(self, kind: str) -> None:
        gate = Gate.remote()
        cls, options = (AsyncEchoClass, {}) if kind == "async" else (EchoClass, {"max_concurrency": 2})
        actor: Any = ActorClass(cls, options).remote()
        late = actor.echo.remote(closed.remote(gate, 0))
        assert get(actor.echo.remote(1)) == 1
        gate.open.remote()
        assert get(late) == 0

    def test_concurrency_groups_alone_keep_the_order_of_calls(self) -> None:
        gate = Gate.remote()
        counter: Any = ActorClass(CounterClass, {"concurrency_groups": {"io": 1}}).remote()
        counter.append.remote(closed.remote(gate, 0))
        counter.append.remote(1)
        seen = counter.all.options(concurrency_group="io").remote()
        assert shoal.wait([seen], timeout=0.1)[0] == []
        gate.open.remote()
        get(seen)
        assert get(counter.all.remote()) == [0, 1]

    def test_calls_that_run_at_once_cannot_be_told_to_keep_their_order(self) -> None:
        for cls, options in ((AsyncEchoClass, {}), (EchoClass, {"max_concurrency": 2})):
            actor_class: Any = ActorClass(cls, {**options, "allow_out_of_order_execution": False})
            with pytest.raises(ValueError, match="allow_out_of_order_execution cannot be False"):
                actor_class.remote()

    def test_an_argument_that_failed_fails_its_call_alone(self) -> None:
        @shoal.remote
        def fail() -> int:
            raise KeyError("no value")

        counter = Counter.remote()
        failed = counter.append.remote(fail.remote())
        following = counter.increment.remote()
        with pytest.raises(KeyError):
            get(failed)
        assert get(following) == 1

    def test_eight_threads_lose_and_double_no_call(self) -> None:
        counter = Counter.remote()

        def call(thread: int) -> Any:
            return [get(counter.increment.remote()) for _ in range(50)] + get(
                [counter.increment.remote() for _ in range(200)]
            )

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(call, range(8)))
        assert all(result == sorted(result) for result in results)
        assert sorted(number for result in results for number in result) == list(range(1, 8 * 250 + 1))

    def test_instances_and_methods_are_not_called_directly(self) -> None:
        with pytest.raises(TypeError, match=r"cannot be instantiated directly.*CounterClass\.remote\(\)"):
            Counter()
        counter = Counter.remote()
        with pytest.raises(TypeError, match=r"increment\.remote\(\)"):
            counter.increment()
        with pytest.raises(AttributeError, match="decrement"):
            counter.decrement  # noqa: B018

    def test_arguments_that_do_not_fit_are_an_error_at_the_call(self) -> None:
        with pytest.raises(TypeError, match="start"):
            Counter.remote(1, start=2)
        counter = Counter.remote()
        with pytest.raises(TypeError, match="item"):
            counter.append.remote()
        with pytest.raises(TypeError, match="cannot be pickled"):
            counter.append.remote(threading.Lock())
        assert get(counter.increment.remote()) == 1

    def test_a_plain_class_is_inherited_and_an_actor_class_is_not(self) -> None:
        class Fast(CounterClass):
            @classmethod
            def named(cls) -> str:
                return cls.__name__

            @staticmethod
            def double(x: int) -> int:
                return 2 * x

            def increment(self) -> int:
                return super().increment() * 100

        fast: Any = shoal.remote(Fast).remote(3)
        assert get([fast.increment.remote(), fast.named.remote(), fast.double.remote(4)]) == [400, "Fast", 8]
        with pytest.raises(ActorClassInheritanceException, match="CounterClass"):
            types.new_class("Sub", (Counter,))

    def test_repr_names_the_actor_in_errors_and_in_what_it_prints(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = io.StringIO()  # ``capfd`` loses what is printed while it is read
        monkeypatch.setattr(sys, "stdout", shown)

        class Named:
            def __init__(self, index: int) -> None:
                print("a first word")
                self.index = index

            def __repr__(self) -> str:
                return f"Named(index={self.index})"

            def fail(self) -> None:
                raise RuntimeError("on purpose")

            def speak(self) -> None:
                print("a word")

        named: Any = shoal.remote(Named).remote(3)
        with pytest.raises(RuntimeError, match=r"(?s)Named\(index=3\)\.fail\(\).*on purpose"):
            get(named.fail.remote())
        get(named.speak.remote())
        until(lambda: "a word\n" in shown.getvalue(), "the word is printed")
        first, then = [line for line in shown.getvalue().splitlines() if "word" in line]
        assert first.startswith("(Named pid=")
        assert then.startswith("(Named(index=3) pid=")

    def test_methods_return_as_many_references_as_they_say(self) -> None:
        class Pair:
            @shoal.method(num_returns=2)
            def both(self) -> tuple[int, int]:
                return 1, 2

            def three(self) -> list[str]:
                return ["a", "b", "c"]

            def name(self) -> str | None:
                return shoal.get_runtime_context().get_task_name()

        pair: Any = shoal.remote(Pair).remote()
        assert get(pair.both.remote()) == [1, 2]
        assert get(pair.three.options(num_returns=3).remote()) == ["a", "b", "c"]
        assert pair.three.options(num_returns=0).remote() is None
        assert get(pair.both.options(num_returns=1).remote()) == (1, 2)
        assert get(pair.name.remote()) == "Pair.name"
        assert get(pair.name.options(name="its own name").remote()) == "its own name"
        with pytest.raises(ValueError, match="num_returns=2"):
            get(pair.three.options(num_returns=2).remote()[0])

    def test_large_values_go_in_and_out(self) -> None:
        class Holder:
            def __init__(self, data: bytes) -> None:
                self.data = data

            def swap(self, data: bytes) -> bytes:
                self.data, data = data, self.data
                return data

        holder: Any = shoal.remote(Holder).remote(b"a" * 3_000_000)
        assert get(holder.swap.remote(b"b" * 2_000_000)) == b"a" * 3_000_000
        assert get(holder.swap.remote(shoal.put(b"c" * 1_000_000))) == b"b" * 2_000_000
        assert get(holder.swap.remote(b"")) == b"c" * 1_000_000

    def test_references_among_what_an_actor_is_made_of(self) -> None:
        class Sum:
            def __init__(self, direct: int, nested: list[shoal.ObjectRef[int]], *, named: int) -> None:
                self.total = direct + named + sum(shoal.get(nested))

            def get(self) -> int:
                return self.total

        @shoal.remote
        def one() -> int:
            return 1

        sum_class: Any = shoal.remote(Sum)
        made = sum_class.remote(one.remote(), [one.remote(), shoal.put(10)], named=shoal.put(100))
        gc.collect()
        assert get(made.get.remote()) == 112

    def test_an_actor_made_of_a_failed_task_dies_of_its_error(self) -> None:
        @shoal.remote
        def fail() -> int:
            raise KeyError("no value")

        counter = Counter.remote(fail.remote())
        error = failure_of(counter.increment.remote())
        assert isinstance(error, exceptions.ActorDiedError)
        assert isinstance(error.cause, KeyError)

    def test_special_methods(self) -> None:
        counter = Counter.remote(5)
        assert get(counter.__ray_ready__.remote()) is True
        assert get(counter.__ray_call__.remote(lambda self, more: self.value + more, 2)) == 7
        pid = get(counter.pid.remote())
        assert isinstance(failure_of(counter.__ray_terminate__.remote()), exceptions.ActorDiedError)
        until(lambda: is_gone(pid), "its process is gone")

    def test_an_actor_class_is_made_remote_once_and_used_anywhere(self) -> None:
        @shoal.remote
        def use(counter_class: Any) -> int:
            return int(shoal.get(counter_class.remote(41).increment.remote()))

        assert get(use.remote(Counter)) == 42


# ------------------------------------------------------------------------------------ errors of making


@pytest.mark.usefixtures("two_cpus")
class TestInitErrors:
    def test_every_call_of_an_actor_whose_init_raised_has_the_cause(self) -> None:
        class Broken:
            def __init__(self) -> None:
                raise ZeroDivisionError("broken from the start")

            def method(self) -> None:
                pass

        broken: Any = shoal.remote(Broken).remote()
        early = broken.method.remote()
        for refs in (early, broken.method.remote(), broken.__ray_ready__.remote()):
            error = failure_of(refs)
            assert isinstance(error, exceptions.ActorDiedError)
            assert "broken from the start" in str(error)
            assert isinstance(error.cause, ZeroDivisionError)
            shown = "".join(traceback.format_exception(error))
            assert shown.count("ZeroDivisionError: broken from the start\n") == 1, "it is printed once, as it was"
            assert error.actor_id == broken._actor_id.hex()
            assert error.actor_init_failed

    def test_init_that_raised_is_not_tried_again(self) -> None:
        tries = Counter.remote()

        class Broken:
            def __init__(self, tries: Any) -> None:
                shoal.get(tries.increment.remote())
                raise ValueError("no")

            def method(self) -> None:
                pass

        broken: Any = shoal.remote(max_restarts=3)(Broken).remote(tries)
        failure_of(broken.method.remote())
        assert get(tries.increment.remote()) == 2


# ------------------------------------------------------------------------------------ concurrency


@pytest.mark.usefixtures("two_cpus")
class TestConcurrency:
    def test_a_threaded_actor_runs_so_many_calls_at_once(self) -> None:
        class Threaded:
            def __init__(self) -> None:
                self.barrier = threading.Barrier(3)

            def meet(self) -> str:
                self.barrier.wait(SECONDS)
                return threading.current_thread().name

            def index(self) -> int:
                return 1

        threaded: Any = shoal.remote(max_concurrency=3)(Threaded).remote()
        assert len(set(get([threaded.meet.remote() for _ in range(3)]))) == 3

        alone: Any = shoal.remote(max_concurrency=2)(Threaded).remote()
        meeting = [alone.meet.remote() for _ in range(2)]
        waiting = alone.index.remote()
        assert shoal.wait([waiting], timeout=0.2)[0] == []
        assert shoal.wait(meeting, timeout=0)[0] == []

    def test_an_async_actor_runs_calls_at_once_on_one_loop(self) -> None:
        gate = Gate.remote()
        waiting = [gate.wait.remote() for _ in range(50)]
        until(lambda: get(gate.count.remote()) == 50, "all of them wait")
        get(gate.open.remote())
        assert get(waiting) == [""] * 50

    def test_an_async_actor_runs_no_more_than_max_concurrency(self) -> None:
        gate: Any = shoal.remote(max_concurrency=2)(GateClass).remote()
        waiting = [gate.wait.remote() for _ in range(2)]
        opening = gate.open.remote()
        assert shoal.wait([opening, *waiting], timeout=0.2)[0] == []

    def test_sync_methods_of_an_async_actor_run_on_its_loop(self) -> None:
        class Mixed:
            def __init__(self) -> None:
                self.loop = asyncio.get_event_loop()

            async def of_async(self) -> tuple[int, bool]:
                return threading.get_ident(), asyncio.get_running_loop() is self.loop

            def of_sync(self) -> tuple[int, bool]:
                return threading.get_ident(), asyncio.get_running_loop() is self.loop

        mixed: Any = shoal.remote(Mixed).remote()
        first, second = get([mixed.of_async.remote(), mixed.of_sync.remote()])
        assert first == second
        assert first[1]

    def test_references_are_awaited_inside(self) -> None:
        class Asks:
            async def both(self, counter: Any) -> tuple[int, list[int]]:
                first = await counter.increment.remote()
                return first, await asyncio.gather(*[counter.increment.remote() for _ in range(3)])

        counter = Counter.remote()
        asks: Any = shoal.remote(Asks).remote()
        assert get(asks.both.remote(counter)) == (1, [2, 3, 4])

    def test_a_sync_method_of_an_async_actor_may_return_something_to_await(self) -> None:
        class Mixed:
            async def loops(self) -> None: ...

            def at_once(self) -> bool:
                return asyncio.current_task() is None

            def later(self, x: int) -> Any:
                async def doubled() -> tuple[int, str]:
                    await asyncio.sleep(0)
                    return 2 * x, shoal.get_runtime_context().get_task_id() or ""

                return doubled()

            def never(self) -> Any:
                async def fail() -> None:
                    await asyncio.sleep(0)
                    raise KeyError("later")

                return fail()

        mixed: Any = shoal.remote(max_concurrency=2)(Mixed).remote()
        calls = [mixed.later.remote(n) for n in range(10)]
        assert get(mixed.at_once.remote()), "it needs no task of its own"
        assert get(calls) == [(2 * n, call.task_id().hex()) for n, call in enumerate(calls)]
        with pytest.raises(KeyError, match="later"):
            get(mixed.never.remote())

    def test_calls_whose_tasks_the_actor_cancels_before_they_begin_are_answered(self) -> None:
        class Sweeper:
            async def never(self) -> None:
                await asyncio.Event().wait()

            def never_of_sync(self) -> Any:
                return asyncio.Event().wait()

            def hold(self) -> None:
                time.sleep(0.2)  # calls that come meanwhile are begun in one turn of the loop

            async def sweep(self) -> None:
                for task in asyncio.all_tasks():
                    if task is not asyncio.current_task():
                        task.cancel()

        sweeper: Any = shoal.remote(Sweeper).remote()
        get(sweeper.sweep.remote())
        held = [sweeper.hold.remote(), sweeper.sweep.remote()]
        for call in (sweeper.never.remote(), sweeper.never_of_sync.remote()):
            with pytest.raises(exceptions.TaskError, match="CancelledError"):
                get(call)
        assert get(held) == [None, None]
        assert get(sweeper.sweep.remote()) is None, "the actor goes on"

    def test_errors_of_async_methods_come_home(self) -> None:
        class Fails:
            async def fail(self) -> None:
                await asyncio.sleep(0)
                raise KeyError("async")

        fails: Any = shoal.remote(Fails).remote()
        with pytest.raises(KeyError, match="async"):
            get(fails.fail.remote())

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_concurrency_groups_do_not_hold_each_other_up(self, asynchronous: bool) -> None:
        class Threads:
            def __init__(self) -> None:
                self.gate = threading.Event()

            @shoal.method(concurrency_group="io")
            def wait(self) -> str:
                assert self.gate.wait(SECONDS)
                return threading.current_thread().name

            @shoal.method(concurrency_group="compute")
            def open(self) -> None:
                self.gate.set()

            def other(self) -> str:
                return "other"

        class Coroutines:
            def __init__(self) -> None:
                self.gate = threading.Event()

            @shoal.method(concurrency_group="io")
            async def wait(self) -> str:
                assert await asyncio.to_thread(self.gate.wait, SECONDS)
                return ""

            @shoal.method(concurrency_group="compute")
            async def open(self) -> None:
                self.gate.set()

            async def other(self) -> str:
                return "other"

        cls: Any = Coroutines if asynchronous else Threads
        actor: Any = shoal.remote(concurrency_groups={"io": 2, "compute": 1})(cls).remote()
        waiting = [actor.wait.remote() for _ in range(2)]
        assert get(actor.other.remote()) == "other"
        stuck = actor.other.options(concurrency_group="io").remote()
        assert shoal.wait([stuck, *waiting], timeout=0.2)[0] == []
        assert get(actor.other.options(concurrency_group="compute").remote()) == "other"
        get(actor.open.remote())
        get([*waiting, stuck])
        with pytest.raises(ValueError, match=r"'disk'.*compute.*io"):
            get(actor.other.options(concurrency_group="disk").remote())

    def test_a_method_that_blocks_its_group_of_an_async_actor_blocks_no_other(self) -> None:
        class Busy:
            def __init__(self) -> None:
                self.gate = threading.Event()
                self.loops: set[asyncio.AbstractEventLoop] = set()

            async def block(self) -> None:
                self.loops.add(asyncio.get_running_loop())
                assert self.gate.wait(SECONDS)

            @shoal.method(concurrency_group="health")
            def open(self) -> None:
                self.loops.add(asyncio.get_running_loop())
                self.gate.set()

            @shoal.method(concurrency_group="health")
            async def last(self) -> int:
                self.loops.add(asyncio.get_running_loop())
                await asyncio.sleep(SECONDS)
                return 0

            @shoal.method(concurrency_group="health")
            async def count(self) -> Any:
                yield len(self.loops)

        busy: Any = shoal.remote(concurrency_groups={"health": 2})(Busy).remote()
        blocked = busy.block.remote()
        get([busy.open.remote(), blocked])
        lasting = busy.last.remote()
        until(lambda: [get(ref) for ref in busy.count.remote()] == [2], "a group has one loop")
        shoal.cancel(lasting)
        assert isinstance(failure_of(lasting), exceptions.TaskCancelledError)

    def test_max_pending_calls_refuses_more(self) -> None:
        gate: Any = shoal.remote(max_pending_calls=3)(GateClass).remote()
        waiting = [gate.wait.remote() for _ in range(3)]
        with pytest.raises(exceptions.PendingCallsLimitExceeded, match="max_pending_calls"):
            gate.open.remote()
        other = shoal.get(shoal.put([gate]))[0]
        get(other.__ray_call__.remote(lambda self: self.gates[""].set()))
        assert get(waiting) == [""] * 3
        until(lambda: get(gate.count.remote()) == 3, "there is room again")


# ------------------------------------------------------------------------------------ names


@pytest.mark.usefixtures("two_cpus")
class TestNames:
    def test_an_actor_is_found_by_its_name(self) -> None:
        counter = Counter.options(name="found").remote(1)
        assert get(shoal.get_actor("found").increment.remote()) == 2
        assert get(counter.increment.remote()) == 3
        with pytest.raises(ValueError, match="'lost'"):
            shoal.get_actor("lost")

    def test_namespaces_keep_names_apart(self) -> None:
        here = Counter.options(name="same").remote(1)
        there = Counter.options(name="same", namespace="there").remote(100)
        assert get(shoal.get_actor("same").increment.remote()) == 2
        assert get(shoal.get_actor("same", namespace="there").increment.remote()) == 101
        assert "same" in list_named_actors()
        everywhere = list_named_actors(all_namespaces=True)
        assert {"name": "same", "namespace": "there"} in everywhere
        assert get([here.increment.remote(), there.increment.remote()]) == [3, 102]

    def test_a_name_that_is_taken_is_an_error_unless_it_is_wanted(self) -> None:
        first = Counter.options(name="taken").remote(1)
        with pytest.raises(ValueError, match="taken"):
            Counter.options(name="taken").remote(2)
        second = Counter.options(name="taken", get_if_exists=True).remote(3)
        assert second == first
        assert get(second.increment.remote()) == 2

    def test_a_name_is_free_again_after_its_actor_was_killed(self) -> None:
        first = Counter.options(name="freed").remote(1)
        get(first.increment.remote())
        shoal.kill(first)
        second = Counter.options(name="freed").remote(10)
        assert get(second.increment.remote()) == 11
        assert second != first

    def test_a_name_goes_with_the_last_handle(self) -> None:
        counter = Counter.options(name="passing").remote(1)
        assert get(counter.increment.remote()) == 2
        del counter
        until(lambda: "passing" not in list_named_actors(), "the name is free")
        with pytest.raises(ValueError, match="'passing'"):
            shoal.get_actor("passing")

    def test_of_twenty_creators_at_once_exactly_one_wins(self) -> None:
        @shoal.remote(num_cpus=0.1)
        def create(keep: Any, number: int) -> bool:
            try:
                mine = Counter.options(name="contested", lifetime="detached").remote(number)
            except ValueError:
                return False
            shoal.get(keep.append.remote([number]))
            assert shoal.get(mine.increment.remote()) == number + 1
            return True

        keep = Counter.remote()
        assert get([create.remote(keep, number) for number in range(20)]).count(True) == 1
        ((number,),) = get(keep.all.remote())
        winner = shoal.get_actor("contested")
        assert get(winner.increment.remote()) == number + 2
        shoal.kill(winner)

    def test_of_twenty_that_get_if_exists_all_have_the_same(self) -> None:
        @shoal.remote(num_cpus=0.1)
        def create() -> Any:
            options = {"name": "shared", "lifetime": "detached", "get_if_exists": True}
            shared = Counter.options(**options).remote()
            shoal.get(shared.increment.remote())
            return shared._actor_id.hex()

        assert len(set(get([create.remote() for _ in range(20)]))) == 1
        shared = shoal.get_actor("shared")
        assert get(shared.increment.remote()) == 21
        shoal.kill(shared)


# ------------------------------------------------------------------------------------ lifetimes


@pytest.mark.usefixtures("two_cpus")
class TestLifetimes:
    def test_an_actor_goes_with_its_last_handle(self) -> None:
        counter = Counter.remote()
        pid = get(counter.pid.remote())
        copy = shoal.get(shoal.put([counter]))[0]
        del counter
        gc.collect()
        assert get(copy.pid.remote()) == pid
        del copy
        until(lambda: is_gone(pid), "its process is gone")

    def test_calls_made_before_the_last_handle_went_are_still_answered(self) -> None:
        refs = [Counter.remote(i).increment.remote() for i in range(5)]
        assert get(refs) == [1, 2, 3, 4, 5]

    def test_handles_are_counted_wherever_they_go(self) -> None:
        class Keeper:
            def keep(self, parts: dict[str, Any]) -> None:
                self.kept = parts

            def ask(self) -> int:
                return int(shoal.get(self.kept["counters"][0].increment.remote()))

            def drop(self) -> None:
                del self.kept

        @shoal.remote
        def call(counter: Any) -> int:
            return int(shoal.get(counter.increment.remote()))

        counter = Counter.remote()
        keeper: Any = shoal.remote(Keeper).remote()
        pid = get(counter.pid.remote())
        assert sorted(get([call.remote(counter) for _ in range(4)])) == [1, 2, 3, 4]
        get(keeper.keep.remote({"counters": [counter]}))
        del counter
        gc.collect()
        assert get(keeper.ask.remote()) == 5
        get(keeper.drop.remote())
        until(lambda: is_gone(pid), "its process is gone")

    def test_an_actor_ends_with_the_process_that_created_it(self) -> None:
        class Creator:
            def create(self) -> Any:
                self.mine = Counter.remote()
                return self.mine

        creator: Any = shoal.remote(Creator).remote()
        mine = get(creator.create.remote())
        pid = get(mine.pid.remote())
        shoal.kill(creator)
        until(lambda: is_gone(pid), "its process is gone")
        assert isinstance(failure_of(mine.increment.remote()), exceptions.ActorDiedError)

    def test_an_actor_that_a_task_created_and_returned_lives_while_it_is_held(self) -> None:
        @shoal.remote
        def make() -> Any:
            return Counter.remote(7)

        made = get(make.remote())
        assert get(made.increment.remote()) == 8
        pid = get(made.pid.remote())
        del made
        until(lambda: is_gone(pid), "its process is gone")

    def test_an_actor_that_a_task_created_for_itself_ends_with_the_task(self) -> None:
        @shoal.remote
        def use() -> int:
            return int(shoal.get(Counter.remote().pid.remote()))

        pid = get(use.remote())
        until(lambda: is_gone(pid), "its process is gone")

    def test_kill_ends_an_actor_and_its_calls(self) -> None:
        gate = Gate.remote()
        pid = get(gate.__ray_call__.remote(lambda self: os.getpid()))
        waiting = gate.wait.remote()
        shoal.kill(gate)
        for refs in (waiting, gate.count.remote()):
            error = failure_of(refs)
            assert isinstance(error, exceptions.ActorDiedError)
            assert "kill" in str(error)
            assert error.actor_id == gate._actor_id.hex()
            assert (error.error_msg, error.actor_init_failed, error.preempted) == (str(error), False, False)
        until(lambda: is_gone(pid), "its process is gone")
        shoal.kill(gate)  # once more does nothing

    def test_kill_with_restart_starts_it_again(self) -> None:
        counter: Any = shoal.remote(max_restarts=1, max_task_retries=-1)(CounterClass).remote(5)
        first = get(counter.pid.remote())
        get(counter.increment.remote())
        shoal.kill(counter, no_restart=False)
        until(lambda: is_gone(first), "the first process is gone")
        assert get(counter.increment.remote()) == 6
        assert get(counter.restarted.remote())
        shoal.kill(counter, no_restart=False)
        assert isinstance(failure_of(counter.increment.remote()), exceptions.ActorDiedError)

    def test_kill_without_restart_is_for_good(self) -> None:
        counter: Any = shoal.remote(max_restarts=-1, max_task_retries=-1)(CounterClass).remote()
        get(counter.increment.remote())
        shoal.kill(counter)
        assert isinstance(failure_of(counter.increment.remote()), exceptions.ActorDiedError)

    def test_an_actor_can_be_killed_before_it_was_created(self) -> None:
        counters = [Counter.remote() for _ in range(10)]
        for counter in counters:
            shoal.kill(counter)
        for counter in counters:
            assert isinstance(failure_of(counter.increment.remote()), exceptions.ActorDiedError)

    def test_only_actors_are_killed(self) -> None:
        with pytest.raises(ValueError, match="only supported for actors"):
            shoal.kill(shoal.put(1))  # type: ignore[arg-type]

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_an_actor_leaves_by_itself(self, asynchronous: bool) -> None:
        class Leaver:
            def pid(self) -> int:
                return os.getpid()

            def leave(self) -> None:
                shoal.actor.exit_actor()

        class AsyncLeaver:
            async def pid(self) -> int:
                return os.getpid()

            async def leave(self) -> None:
                shoal.actor.exit_actor()

        cls: Any = AsyncLeaver if asynchronous else Leaver
        leaver: Any = shoal.remote(max_restarts=5)(cls).remote()
        pid = get(leaver.pid.remote())
        for method in (leaver.leave, leaver.pid):
            error = failure_of(method.remote())
            assert isinstance(error, exceptions.ActorDiedError)
            assert "exit_actor" in str(error)
        until(lambda: is_gone(pid), "its process is gone")

    def test_what_was_called_before_an_actor_leaves_is_answered(self) -> None:
        counter = Counter.remote()
        refs = [counter.increment.remote() for _ in range(500)]
        leaving = counter.__ray_terminate__.remote()
        assert get(refs) == list(range(1, 501))
        failure_of(leaving)

    @pytest.mark.parametrize("concurrency", [1, 4])
    def test_an_actor_that_leaves_among_other_calls_is_not_started_again(self, concurrency: int) -> None:
        class Busy:
            async def leave(self) -> None:
                shoal.actor.exit_actor()

            async def work(self) -> int:
                return os.getpid()

        for _ in range(5):
            busy: Any = shoal.remote(max_restarts=5, max_concurrency=concurrency)(Busy).remote()
            get(busy.work.remote())
            leaving = busy.leave.remote()
            for ref in [busy.work.remote() for _ in range(20)]:
                with contextlib.suppress(exceptions.ActorDiedError):
                    get(ref)
            assert isinstance(failure_of(leaving), exceptions.ActorDiedError)
            assert isinstance(failure_of(busy.work.remote()), exceptions.ActorDiedError)

    def test_exit_actor_is_for_actors(self) -> None:
        with pytest.raises(TypeError, match="outside of an actor"):
            shoal.actor.exit_actor()

    def test_sys_exit_in_a_method_ends_the_actor(self) -> None:
        class Exits:
            def leave(self, status: int) -> None:
                sys.exit(status)

        for status, said in ((0, r"sys.exit\(0\)"), (3, "status 3")):
            exits: Any = shoal.remote(Exits).remote()
            with pytest.raises(exceptions.ActorDiedError, match=said):
                get(exits.leave.remote(status))

    @pytest.mark.parametrize("base", [ExitsClass, AsyncExitsClass])
    def test_sys_exit_with_an_error_is_a_crash_that_is_retried(self, base: type[Any], tmp_path: Path) -> None:
        lasting: Any = shoal.remote(max_restarts=-1, max_task_retries=-1)
        exits = lasting(base).remote(tmp_path / "tries")
        assert get(exits.leave.remote(3)) == 4, "it was started again for each of three crashes"
        with pytest.raises(exceptions.ActorDiedError, match=r"sys.exit\(0\)"):
            get(exits.stop.remote())


# ------------------------------------------------------------------------------------ crashes


@pytest.mark.usefixtures("two_cpus")
class TestCrashes:
    def test_a_crash_without_restarts_is_death(self) -> None:
        counter = Counter.remote()
        for refs in (counter.crash.remote(), counter.increment.remote()):
            assert isinstance(failure_of(refs), exceptions.ActorDiedError)

    def test_a_crash_with_restarts_and_without_retries_makes_calls_unavailable(self) -> None:
        counter: Any = shoal.remote(max_restarts=1)(CounterClass).remote(5)
        crashed = counter.crash.remote()
        assert isinstance(failure_of(crashed), exceptions.ActorUnavailableError)
        until(lambda: self.answers(counter), "it is there again")
        assert get(counter.restarted.remote())
        assert isinstance(failure_of(counter.crash.remote()), exceptions.ActorDiedError)

    @staticmethod
    def answers(counter: Any) -> bool:
        try:
            get(counter.pid.remote())
        except exceptions.ActorUnavailableError:
            return False
        return True

    def test_with_retries_every_call_is_made_at_least_once(self) -> None:
        counter: Any = shoal.remote(max_restarts=2, max_task_retries=2)(CounterClass).remote(5)
        before = counter.increment.remote()
        crashing = counter.crash_if_first.remote()
        after = [counter.increment.remote() for _ in range(100)]
        assert get(before) == 6
        assert get(crashing) >= 5
        assert get(after) == sorted(get(after))
        assert get(counter.restarted.remote())

    def test_retries_end(self) -> None:
        counter: Any = shoal.remote(max_restarts=-1, max_task_retries=1)(CounterClass).remote()
        assert isinstance(failure_of(counter.crash.remote()), exceptions.ActorUnavailableError)

    def test_what_an_actor_was_made_of_is_there_for_its_restart(self) -> None:
        class Holder:
            def __init__(self, data: bytes, ref: list[shoal.ObjectRef[int]]) -> None:
                self.length = len(data) + shoal.get(ref[0])

            def get(self) -> int:
                return self.length

            def crash(self) -> None:
                os._exit(1)

        holder: Any = shoal.remote(max_restarts=1, max_task_retries=-1)(Holder).remote(b"a" * 2_000_000, [shoal.put(5)])
        assert get(holder.get.remote()) == 2_000_005
        with contextlib.suppress(exceptions.ActorError):
            get(holder.crash.options(max_task_retries=0).remote())
        assert get(holder.get.remote()) == 2_000_005

    def test_exceptions_of_methods_are_retried_where_it_was_asked_for(self) -> None:
        class Flaky:
            def __init__(self) -> None:
                self.tries = 0

            @shoal.method(retry_exceptions=True, max_task_retries=3)
            def any(self) -> int:
                self.tries += 1
                if self.tries < 3:
                    raise OSError("not yet")
                return self.tries

            @shoal.method(retry_exceptions=[KeyError], max_task_retries=3)
            def some(self) -> int:
                self.tries += 1
                raise OSError("never")

            def count(self) -> int:
                return self.tries

        flaky: Any = shoal.remote(Flaky).remote()
        assert get(flaky.any.remote()) == 3
        with pytest.raises(OSError, match="never"):
            get(flaky.some.remote())
        assert get(flaky.count.remote()) == 4

    def test_how_often_exceptions_are_retried_may_be_said_of_the_whole_class(self) -> None:
        class Flaky:
            def __init__(self) -> None:
                self.tries = 0

            def never(self) -> None:
                self.tries += 1
                raise OSError("never")

            def count(self) -> int:
                return self.tries

        flaky: Any = shoal.remote(max_task_retries=3)(Flaky).remote()
        with pytest.raises(OSError, match="never"):
            get(flaky.never.options(retry_exceptions=[OSError]).remote())
        assert get(flaky.count.remote()) == 4

    def test_a_killed_broker_costs_no_call_and_no_order(self) -> None:
        counter = Counter.remote()
        for i in range(3_000):
            counter.append.remote(i)
        (broker,) = [one for one in psutil.Process().children(recursive=True) if "nats-server" in one.name()]
        broker.send_signal(signal.SIGKILL)
        for i in range(3_000, 6_000):
            counter.append.remote(i)
        assert get(counter.all.remote()) == list(range(6_000))
        assert get(Counter.remote(1).increment.remote()) == 2


def test_a_class_that_goes_along_takes_no_room_from_what_its_actor_is_given() -> None:
    class Large:
        data = os.urandom(14_000)

        def __init__(self, *given: int) -> None:
            self.given = given

        def total(self) -> int:
            return sum(self.given)

    count = 5_800  # of 44 bytes each, which leaves less than the class has
    actor = shoal.remote(num_cpus=0)(Large).remote(*[shoal.put(1) for _ in range(count)])
    assert get(actor.total.remote()) == count
