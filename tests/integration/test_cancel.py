"""Cancellation on a real cluster: wherever a task is and whatever it does, it ends once and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import exceptions
from shoal_core.runtime.runtime import Runtime
from tests.integration.waiting import get, until

FOREVER = 3600.0

pytestmark = pytest.mark.usefixtures("two_cpus")


def note(path: Path, text: object) -> None:
    """Tell the driver something by way of a file."""
    with path.open("a") as file:
        print(text, file=file)


def noted(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def cancelled(ref: Any) -> bool:
    """Tell whether a task ends as one that was cancelled."""
    try:
        get(ref)
    except exceptions.TaskCancelledError:
        return True
    return False


def nothing_left() -> bool:
    """Tell whether this process knows of no task, stream, object and lease, and all CPUs are free."""
    gc.collect()
    runtime = Runtime.current
    assert runtime is not None
    reactor = runtime.reactor
    known = [*reactor.tasks, *reactor.streams, *runtime.objects.owned]
    leases = [lease for key in reactor.submission.keys.values() for lease in key.leases]
    return not known and not leases and shoal.available_resources().get("CPU") == 2


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    until(nothing_left, "no task, stream, object, lease or used CPU is left")
    assert get([double.remote(index) for index in range(4)]) == [0, 2, 4, 6], "what comes next runs"


@shoal.remote
def double(x: int) -> int:
    return 2 * x


@shoal.remote
def sleeper(log: Path) -> None:
    note(log, "begun")
    time.sleep(FOREVER)


@shoal.remote
def occupy(log: Path, gate: Path) -> None:
    note(log, "occupied")
    while not gate.exists():
        time.sleep(0.005)


@shoal.remote
def endless(log: Path) -> Iterator[int]:
    try:
        for number in range(1 << 60):
            note(log, number)
            yield number
            time.sleep(0.01)
    finally:
        note(log, "stopped")


class TestTasks:
    def test_what_waits_never_starts(self, tmp_path: Path) -> None:
        log, gate = tmp_path / "log", tmp_path / "gate"
        occupied = [occupy.remote(tmp_path / "occupied", gate) for _ in range(2)]
        until(lambda: len(noted(tmp_path / "occupied")) == 2, "both CPUs are taken")
        refs = [sleeper.remote(log) for _ in range(20)]
        for ref in refs:
            shoal.cancel(ref)
        assert all(cancelled(ref) for ref in refs)
        gate.touch()
        get(occupied)
        assert noted(log) == []

    def test_what_waits_for_arguments_never_starts(self, tmp_path: Path) -> None:
        log, gate = tmp_path / "log", tmp_path / "gate"
        first = occupy.remote(tmp_path / "occupied", gate)

        @shoal.remote
        def second(first: None, log: Path) -> None:
            note(log, "begun")

        ref = second.remote(first, log)
        shoal.cancel(ref)
        assert cancelled(ref)
        gate.touch()
        get(first)
        assert noted(log) == []

    def test_a_sleep_is_interrupted(self, tmp_path: Path) -> None:
        ref = sleeper.remote(tmp_path / "log")
        until(lambda: noted(tmp_path / "log") != [], "it runs")
        shoal.cancel(ref)
        assert cancelled(ref)

    def test_a_busy_loop_is_interrupted(self, tmp_path: Path) -> None:
        @shoal.remote
        def busy(log: Path) -> None:
            note(log, "begun")
            while True:
                pass

        ref = busy.remote(tmp_path / "log")
        until(lambda: noted(tmp_path / "log") != [], "it runs")
        shoal.cancel(ref)
        assert cancelled(ref)

    def test_a_blocking_get_and_a_wait_are_interrupted(self, tmp_path: Path) -> None:
        never = sleeper.options(num_cpus=0).remote(tmp_path / "never")

        @shoal.remote
        def blocked(how: str, box: list[Any], log: Path) -> None:
            note(log, "begun")
            if how == "get":
                shoal.get(box[0])
            else:
                shoal.wait(box)

        refs = [blocked.remote(how, [never], tmp_path / how) for how in ("get", "wait")]
        until(lambda: all(noted(tmp_path / how) for how in ("get", "wait")), "both run")
        for ref in refs:
            shoal.cancel(ref)
        assert all(cancelled(ref) for ref in refs)
        shoal.cancel(never)

    def test_what_was_interrupted_is_a_failed_task_as_well_and_what_never_ran_is_not(self, tmp_path: Path) -> None:
        running = sleeper.remote(tmp_path / "log")
        until(lambda: noted(tmp_path / "log") != [], "it runs")
        waiting = sleeper.options(num_cpus=2).remote(tmp_path / "never")
        actor = AsyncActor.remote(str(tmp_path / "calls"))
        call = actor.sleep.remote()
        until(lambda: noted(tmp_path / "calls") != [], "the call runs")
        for ref in (running, waiting, call):
            shoal.cancel(ref)
        for ref in (running, call):
            with pytest.raises(exceptions.TaskError) as raised:
                get(ref)
            assert isinstance(raised.value, exceptions.TaskCancelledError)
        with pytest.raises(exceptions.TaskCancelledError) as called_off:
            get(waiting)
        assert not isinstance(called_off.value, exceptions.TaskError)

    def test_user_code_may_tidy_up(self, tmp_path: Path) -> None:
        log = tmp_path / "log"

        @shoal.remote
        def tidy(log: Path) -> None:
            note(log, "begun")
            try:
                time.sleep(FOREVER)
            finally:
                note(log, "tidied")

        ref = tidy.remote(log)
        until(lambda: noted(log) != [], "it runs")
        shoal.cancel(ref)
        assert cancelled(ref)
        assert noted(log) == ["begun", "tidied"]

    def test_user_code_may_catch_the_interruption_and_is_told_once(self, tmp_path: Path) -> None:
        log = tmp_path / "log"

        @shoal.remote
        def stubborn(log: Path) -> tuple[str, bool]:
            note(log, "begun")
            try:
                time.sleep(FOREVER)
            except KeyboardInterrupt:
                return "caught", shoal.get_runtime_context().is_canceled()
            return "slept", False

        ref = stubborn.remote(log)
        until(lambda: noted(log) != [], "it runs")
        shoal.cancel(ref)
        assert get(ref) == ("caught", True)

    def test_what_puts_and_gets_all_the_time_is_interrupted_and_loses_no_memory(self, tmp_path: Path) -> None:
        @shoal.remote
        def busy(log: Path) -> None:
            note(log, "begun")
            while True:
                ref = shoal.put(b"x" * 1_000_000)
                shoal.get(ref)
                del ref

        free = shoal.available_resources()["object_store_memory"]
        for turn in range(30):
            ref, log = busy.remote(tmp_path / str(turn)), tmp_path / str(turn)
            until(lambda log=log: noted(log) != [], "it runs")  # type: ignore[misc]
            shoal.cancel(ref)
            assert cancelled(ref)
        del ref
        until(lambda: shoal.available_resources()["object_store_memory"] == free, "all memory is free")

    def test_what_has_ended_stays_as_it_is(self) -> None:
        ref = double.remote(4)
        get(ref)
        shoal.cancel(ref)
        shoal.cancel(ref, force=True)
        assert get(ref) == 8
        put = shoal.put(1)
        shoal.cancel(put)
        assert get(put) == 1

    def test_a_cancelled_task_is_not_tried_again(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        ref = sleeper.options(max_retries=-1, retry_exceptions=True).remote(log)
        until(lambda: noted(log) != [], "it runs")
        shoal.cancel(ref)
        assert cancelled(ref)
        assert noted(log) == ["begun"]

    def test_force_kills_the_process(self, tmp_path: Path) -> None:
        log = tmp_path / "log"

        @shoal.remote(max_retries=-1)
        def stubborn(log: Path) -> None:
            note(log, "begun")
            while True:
                try:
                    time.sleep(FOREVER)
                except KeyboardInterrupt:
                    note(log, "caught")

        ref = stubborn.remote(log)
        until(lambda: noted(log) != [], "it runs")
        shoal.cancel(ref)
        until(lambda: noted(log) == ["begun", "caught"], "it will not have it")
        shoal.cancel(ref, force=True)
        with pytest.raises(exceptions.TaskCancelledError, match="not retried, since it was cancelled") as raised:
            get(ref)
        assert isinstance(raised.value, exceptions.WorkerCrashedError), "as Ray's documentation has it"
        assert noted(log) == ["begun", "caught"]

    def test_force_spares_what_waits_behind(self, tmp_path: Path) -> None:
        refs = [double.remote(index) for index in range(50)]
        victim = sleeper.remote(tmp_path / "log")
        refs += [double.remote(index) for index in range(50)]
        until(lambda: noted(tmp_path / "log") != [], "it runs")
        shoal.cancel(victim, force=True)
        assert get(refs) == [2 * index for index in range(50)] * 2
        with pytest.raises(exceptions.TaskKilledError):
            get(victim)

    def test_the_wrong_thing_is_named(self) -> None:
        with pytest.raises(TypeError, match=r"kill\(\)"):
            shoal.cancel("a task")  # type: ignore[arg-type]
        actor = Actor.remote()
        with pytest.raises(TypeError, match=r"kill\(\)"):
            shoal.cancel(actor)
        ref = actor.add.remote(1)
        with pytest.raises(ValueError, match="force=True"):
            shoal.cancel(ref, force=True)
        assert get(ref) == 1

    def test_several_returns_end_together(self, tmp_path: Path) -> None:
        refs: Any = sleeper.options(num_returns=3).remote(tmp_path / "log")
        shoal.cancel(refs[1])
        assert [cancelled(ref) for ref in refs] == [True, True, True]


class TestChildren:
    @pytest.mark.parametrize("recursive", [True, False])
    def test_children_are_cancelled_where_that_is_asked(self, recursive: bool, tmp_path: Path) -> None:
        log, gate = tmp_path / "log", tmp_path / "gate"

        @shoal.remote
        def grandchild(log: Path, gate: Path) -> None:
            note(log, "grandchild")
            try:
                while not gate.exists():
                    time.sleep(0.005)
                note(log, "finished")
            except KeyboardInterrupt:
                note(log, "interrupted")
                raise

        @shoal.remote
        def child(log: Path, gate: Path) -> None:
            shoal.get(grandchild.remote(log, gate))

        @shoal.remote
        def parent(log: Path, gate: Path) -> None:
            shoal.get(child.remote(log, gate))

        ref = parent.remote(log, gate)
        until(lambda: noted(log) == ["grandchild"], "all run")
        shoal.cancel(ref, recursive=recursive)
        assert cancelled(ref)
        if recursive:
            until(lambda: noted(log) == ["grandchild", "interrupted"], "the grandchild was interrupted")
        else:
            gate.touch()
            until(lambda: noted(log) == ["grandchild", "finished"], "the grandchild came to its end")

    def test_a_borrower_may_cancel(self, tmp_path: Path) -> None:
        ref = sleeper.remote(tmp_path / "log")
        until(lambda: noted(tmp_path / "log") != [], "it runs")

        @shoal.remote
        def canceller(box: list[Any]) -> None:
            shoal.cancel(box[0])

        get(canceller.remote([ref]))
        assert cancelled(ref)

    def test_the_calls_that_a_task_made_of_actors_are_cancelled_too(self, tmp_path: Path) -> None:
        actor = AsyncActor.remote(str(tmp_path / "log"))

        @shoal.remote
        def caller(actor: Any) -> None:
            shoal.get(actor.sleep.remote())

        ref = caller.remote(actor)
        until(lambda: noted(tmp_path / "log") == ["begun"], "the call runs")
        shoal.cancel(ref)
        assert cancelled(ref)
        until(lambda: noted(tmp_path / "log") == ["begun", "interrupted"], "the call was cancelled")


class ActorClass:
    def __init__(self) -> None:
        self.total = 0
        self.opened = threading.Event()

    def add(self, amount: int) -> int:
        self.total += amount
        return self.total

    def until_cancelled(self, log: str) -> str:
        note(Path(log), "begun")
        while not shoal.get_runtime_context().is_canceled():
            time.sleep(0.005)
        note(Path(log), "seen")
        return "saw it"

    def endless(self, log: str) -> Iterator[int]:
        try:
            yield from range(1 << 60)
        finally:
            note(Path(log), "stopped")


class AsyncActorClass:
    def __init__(self, log: str) -> None:
        self.log = Path(log)

    async def sleep(self) -> None:
        note(self.log, "begun")
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            note(self.log, "interrupted")
            raise

    async def double(self, x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    async def count(self) -> AsyncIterator[int]:
        try:
            for number in range(1 << 60):
                await asyncio.sleep(0)
                yield number
        finally:
            note(self.log, "stopped")


Actor: Any = shoal.remote(ActorClass)
AsyncActor: Any = shoal.remote(AsyncActorClass)


class TestCalls:
    @pytest.mark.parametrize("options", [{}, {"max_concurrency": 2}], ids=["plain", "threaded"])
    def test_a_call_that_runs_sees_it_and_what_it_returns_is_dropped(
        self, options: dict[str, Any], tmp_path: Path
    ) -> None:
        actor = Actor.options(**options).remote()
        ref = actor.until_cancelled.remote(str(tmp_path / "log"))
        until(lambda: noted(tmp_path / "log") != [], "it runs")
        shoal.cancel(ref)
        until(lambda: noted(tmp_path / "log") == ["begun", "seen"], "it ends in its own time")
        assert cancelled(ref)
        assert get(actor.add.remote(1)) == 1

    def test_calls_that_wait_are_never_made_and_the_others_are(self, tmp_path: Path) -> None:
        actor = Actor.remote()
        running = actor.until_cancelled.remote(str(tmp_path / "log"))
        until(lambda: noted(tmp_path / "log") != [], "it runs")
        refs = [actor.add.remote(10**index) for index in range(6)]
        for ref in refs[::2]:
            shoal.cancel(ref)
        assert all(cancelled(ref) for ref in refs[::2])
        shoal.cancel(running)
        assert get(refs[1::2]) == [10, 1_010, 101_010]

    def test_calls_of_an_async_actor_are_cancelled_where_they_await(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        actor = AsyncActor.remote(str(log))
        refs = [actor.sleep.remote() for _ in range(3)]
        until(lambda: noted(log) == ["begun"] * 3, "they run")
        shoal.cancel(refs[1])
        assert cancelled(refs[1])
        assert noted(log) == ["begun"] * 3 + ["interrupted"]
        assert get(actor.double.remote(2)) == 4
        for ref in refs:
            shoal.cancel(ref)
        assert all(cancelled(ref) for ref in refs)

    def test_calls_that_wait_for_their_turn_in_an_async_actor(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        actor = AsyncActor.options(max_concurrency=1).remote(str(log))
        running, waiting, last = actor.sleep.remote(), actor.sleep.remote(), actor.double.remote(3)
        until(lambda: noted(log) == ["begun"], "the first runs")
        shoal.cancel(waiting)
        assert cancelled(waiting)
        shoal.cancel(running)
        assert cancelled(running)
        assert get(last) == 6
        assert noted(log) == ["begun", "interrupted"]

    def test_a_call_of_an_actor_that_is_not_there_yet(self, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        occupied = [occupy.remote(tmp_path / "occupied", gate) for _ in range(2)]
        until(lambda: len(noted(tmp_path / "occupied")) == 2, "both CPUs are taken")
        actor = Actor.options(num_cpus=1).remote()
        first, second = actor.add.remote(1), actor.add.remote(2)
        shoal.cancel(first)
        assert cancelled(first)
        gate.touch()
        assert get(second) == 2
        get(occupied)

    def test_a_call_in_flight_when_its_actor_dies_ends_once(self, tmp_path: Path) -> None:
        actor = Actor.options(max_restarts=1, max_task_retries=1).remote()
        ref = actor.until_cancelled.remote(str(tmp_path / "log"))
        until(lambda: noted(tmp_path / "log") != [], "it runs")
        shoal.kill(actor, no_restart=False)
        shoal.cancel(ref)
        with pytest.raises((exceptions.TaskCancelledError, exceptions.ActorUnavailableError)):
            get(ref)
        until(lambda: _answers(actor), "the actor is back")


def _answers(actor: Any) -> bool:
    try:
        return bool(get(actor.add.remote(1)))
    except exceptions.ActorUnavailableError:
        return False


class TestGenerators:
    def test_the_last_item_is_the_cancellation(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        gen = endless.remote(log)
        assert get(next(gen)) == 0
        shoal.cancel(gen)
        *_, last = gen
        assert cancelled(last)
        assert list(gen) == []
        assert gen.is_finished()
        assert cancelled(gen.completed())
        until(lambda: noted(log)[-1] == "stopped", "it stopped")

    def test_one_that_is_not_begun(self, tmp_path: Path) -> None:
        gate, log = tmp_path / "gate", tmp_path / "log"
        occupied = [occupy.remote(tmp_path / "occupied", gate) for _ in range(2)]
        until(lambda: len(noted(tmp_path / "occupied")) == 2, "both CPUs are taken")
        gen = endless.remote(log)
        shoal.cancel(gen)
        assert cancelled(next(gen))
        assert list(gen) == []
        gate.touch()
        get(occupied)
        assert noted(log) == []

    def test_one_that_waits_for_its_user(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        gen = endless.options(_generator_backpressure_num_objects=1).remote(log)
        until(lambda: noted(log) == ["0"], "it waits")
        shoal.cancel(gen)
        assert get(next(gen)) == 0, "what was there is still there"
        assert cancelled(next(gen))

    @pytest.mark.parametrize("ahead", [-1, 1])
    def test_those_of_actors(self, ahead: int, tmp_path: Path) -> None:
        log = tmp_path / "log"
        actors = [(Actor.remote(), "endless", (str(log),)), (AsyncActor.remote(str(log)), "count", ())]
        for stopped, (actor, method, args) in enumerate(actors, 1):
            gen = getattr(actor, method).options(_generator_backpressure_num_objects=ahead).remote(*args)
            assert get(next(gen)) == 0
            shoal.cancel(gen)
            *_, last = gen
            assert cancelled(last)
            until(lambda stopped=stopped: noted(log) == ["stopped"] * stopped, "it stopped")  # type: ignore[misc]

    def test_in_an_asynchronous_loop(self, tmp_path: Path) -> None:
        async def main() -> str:
            gen = endless.remote(tmp_path / "log")
            try:
                async for ref in gen:
                    await ref
                    shoal.cancel(gen)
            except exceptions.TaskCancelledError:
                return "cancelled"
            return "ended"

        assert asyncio.run(main()) == "cancelled"

    def test_by_force(self, tmp_path: Path) -> None:
        gen = endless.remote(tmp_path / "log")
        get(next(gen))
        shoal.cancel(gen, force=True)
        *_, last = gen
        with pytest.raises(exceptions.TaskKilledError):
            get(last)


@shoal.remote
def quick(x: int) -> int:
    return x


@shoal.remote
def nap(x: int) -> int:
    time.sleep(0.002)
    return x


@shoal.remote
def parent(x: int) -> int:
    return sum(shoal.get([quick.remote(x), nap.remote(0)]))


@shoal.remote
def few(x: int) -> Iterator[int]:
    for _ in range(3):
        time.sleep(0.0005)
        yield x


@pytest.mark.timeout(170)
def test_ten_thousand_random_cancellations_leave_nothing_behind(tmp_path: Path) -> None:
    chance = random.Random(4)
    actor, async_actor = Actor.options(max_concurrency=2).remote(), AsyncActor.remote(str(tmp_path / "log"))
    outcomes: Counter[str] = Counter()
    rounds, size = 50, 200

    def start(index: int) -> Any:
        kind = chance.choices(["quick", "nap", "parent", "few", "chain", "call", "async"], [6, 4, 1, 1, 2, 3, 3])[0]
        match kind:
            case "quick":
                return quick.remote(index)
            case "nap":
                return nap.remote(index)
            case "parent":
                return parent.remote(index)
            case "few":
                return few.remote(index)
            case "chain":
                return quick.remote(nap.remote(index))
            case "call":
                return actor.add.remote(0)
            case _:
                return async_actor.double.remote(index)

    def outcome(one: Any) -> str:
        try:
            if isinstance(one, shoal.ObjectRef):
                get(one)
            else:
                for ref in one:
                    get(ref)
        except exceptions.TaskKilledError:
            return "killed"
        except exceptions.TaskCancelledError:
            return "cancelled"
        return "done"

    for turn in range(rounds):
        started = [start(index) for index in range(size)]
        order = started.copy()
        chance.shuffle(order)
        for index, one in enumerate(order):
            shoal.cancel(one, recursive=chance.random() < 0.5)
            if index % 10 == 0:
                time.sleep(chance.random() * 0.004)  # some come to run, some to their end
        if turn % 10 == 0:
            victim = sleeper.remote(tmp_path / "sleeper")
            shoal.cancel(victim, force=chance.random() < 0.5)
            outcomes[outcome(victim)] += 1
        outcomes.update(outcome(one) for one in started)
        del started, order, one
    assert outcomes.total() == rounds * size + 5
    assert outcomes["cancelled"] > 1_000
    assert outcomes["done"] > 100
    assert get(actor.add.remote(1)) == 1
    assert get(async_actor.double.remote(2)) == 4
