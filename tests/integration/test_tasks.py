"""Tasks on an embedded cluster: calls, arguments, results, errors, retries."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import ObjectRef, exceptions
from shoal_core.machine import PAST_CACHES, TUNABLES
from tests.integration import waiting
from tests.integration.waiting import get, is_gone

pytestmark = pytest.mark.usefixtures("two_cpus")


@shoal.remote
def add(x: int, y: int = 1) -> int:
    return x + y


@shoal.remote
def fail(text: str) -> None:
    raise KeyError(text)


@shoal.remote
def identity(value: Any) -> Any:
    return value


class Strange(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(code)
        self.detail = detail


def test_a_call_returns_a_reference_whose_value_get_returns() -> None:
    ref = add.remote(1, y=2)
    assert isinstance(ref, ObjectRef)
    assert shoal.get(ref) == 3


def test_tasks_run_in_processes_that_copy_past_the_caches() -> None:
    tunables = shoal.remote(lambda: os.environ.get(TUNABLES, ""))
    assert PAST_CACHES in shoal.get(tunables.remote())


def test_many_calls_come_back_in_order() -> None:
    assert shoal.get([add.remote(i) for i in range(2_000)]) == [i + 1 for i in range(2_000)]


def test_a_reference_as_an_argument_becomes_its_value() -> None:
    assert shoal.get(add.remote(add.remote(1), y=add.remote(2))) == 5


def test_a_reference_inside_a_container_stays_a_reference() -> None:
    @shoal.remote
    def inside(box: list[ObjectRef[int]]) -> int:
        assert isinstance(box[0], ObjectRef)
        return shoal.get(box[0])

    assert shoal.get(inside.remote([add.remote(1)])) == 2


def test_a_chain_of_dependencies_runs_in_order() -> None:
    ref = add.remote(0)
    for _ in range(100):
        ref = add.remote(ref)
    assert shoal.get(ref) == 101


def test_several_return_values() -> None:
    @shoal.remote(num_returns=3)
    def three() -> tuple[int, int, int]:
        return 1, 2, 3

    refs: Any = three.remote()
    assert shoal.get(list(reversed(refs))) == [3, 2, 1]


def test_a_wrong_number_of_return_values_is_an_error_of_each() -> None:
    @shoal.remote(num_returns=2)
    def three() -> tuple[int, int, int]:
        return 1, 2, 3

    for ref in three.remote():  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="num_returns=2 but returned 3 values"):
            shoal.get(ref)
    one: Any = three.options(num_returns=1).remote()
    several: Any = shoal.remote(num_returns=2)(len).remote(one)
    with pytest.raises(TypeError, match="num_returns=2 but returned an object of type int"):
        shoal.get(several)


def test_a_parameter_may_have_any_name() -> None:
    @shoal.remote
    def names(**options: int) -> list[str]:
        return sorted(options)

    given = {"args": 1, "kwargs": 2, "name": 3, "self": 4}
    assert shoal.get(names.remote(**given)) == sorted(given)


def test_only_references_are_got() -> None:
    mixed: Any = [shoal.put(0), 1]
    with pytest.raises(TypeError, match="holds 1 of type int"):
        shoal.get(mixed)
    with pytest.raises(ValueError, match="Invalid type of object refs, int"):
        shoal.get(1)  # type: ignore[call-overload]


def test_no_return_value(tmp_path: Path) -> None:
    @shoal.remote(num_returns=0)
    def touch(path: str) -> None:
        Path(path).touch()

    assert touch.remote(str(tmp_path / "there")) is None
    deadline = time.monotonic() + 10
    while not (tmp_path / "there").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_is_an_instance_of_its_cause_and_a_task_error() -> None:
    with pytest.raises(KeyError) as caught:
        shoal.get(fail.remote("lost"))
    assert isinstance(caught.value, exceptions.RayTaskError)
    assert "in fail" in str(caught.value)
    assert "raise KeyError(text)" in str(caught.value)


def test_an_error_with_an_odd_constructor_survives() -> None:
    @shoal.remote
    def strange() -> None:
        raise Strange(3, detail="x")

    with pytest.raises(exceptions.TaskError, match="Strange"):
        shoal.get(strange.remote())


def test_an_error_whose_text_is_no_unicode_arrives() -> None:
    def complain() -> None:
        raise ValueError("no \udcff file")

    with pytest.raises(ValueError, match=r"ValueError: no \\udcff file") as caught:
        shoal.get(shoal.remote(complain).remote(), timeout=30)
    assert isinstance(caught.value, exceptions.TaskError)
    assert str(caught.value.cause) == "no \udcff file"


def test_an_error_passes_through_dependent_tasks() -> None:
    with pytest.raises(KeyError):
        shoal.get(add.remote(fail.remote("first")))


@shoal.remote
def until(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.01)


def test_the_first_error_wins_without_waiting_for_the_rest(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = until.remote(str(gate))
    with pytest.raises(KeyError):
        shoal.get([slow, fail.remote("now")])
    assert shoal.wait([slow], timeout=0) == ([], [slow])
    gate.touch()
    assert shoal.get(slow) is None


def test_get_times_out() -> None:
    @shoal.remote
    def slow() -> int:
        time.sleep(0.5)
        return 1

    ref = slow.remote()
    with pytest.raises(exceptions.GetTimeoutError):
        shoal.get(ref, timeout=0)
    with pytest.raises(TimeoutError):
        shoal.get(ref, timeout=0.01)
    assert shoal.get(ref) == 1
    assert shoal.get(ref, timeout=0) == 1


def test_wait_keeps_order_and_returns_what_was_asked_for() -> None:
    refs = [add.remote(i) for i in range(10)]
    shoal.get(refs)
    ready, rest = shoal.wait(refs, num_returns=3)
    assert (ready, rest) == (refs[:3], refs[3:])


def test_wait_times_out_with_what_is_ready(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow, quick = until.remote(str(gate)), add.remote(1)
    ready, rest = shoal.wait([slow, quick], num_returns=2, timeout=1)
    assert (ready, rest) == ([quick], [slow])
    gate.touch()
    ready, rest = shoal.wait([slow, quick], num_returns=2)
    assert (ready, rest) == ([slow, quick], [])


def test_a_timeout_of_get_is_not_negative_but_for_minus_one_which_is_none() -> None:
    assert shoal.get(add.remote(1), timeout=-1) == shoal.get(add.remote(1))
    with pytest.raises(ValueError, match="must not be negative, got -2"):
        shoal.get(shoal.put(1), timeout=-2)


def test_wait_refuses_what_it_cannot_do() -> None:
    ref = shoal.put(1)
    with pytest.raises(ValueError, match="unique"):
        shoal.wait([ref, ref])
    with pytest.raises(TypeError, match="single"):
        shoal.wait(ref)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than"):
        shoal.wait([ref], num_returns=2)


def test_put_and_get() -> None:
    for value in (1, "text", None, {"a": [1, 2]}, b"x" * 1000, lambda: 7):
        got = shoal.get(shoal.put(value))
        assert got() == 7 if callable(got) else got == value
    with pytest.raises(TypeError, match="put"):
        shoal.put(shoal.put(1))


def test_large_values_travel_through_shared_memory_and_are_read_only() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(1_000_000, dtype="int64")
    for ref in (shoal.put(array), identity.remote(array), identity.remote(shoal.put(array))):
        got = shoal.get(ref)
        assert (got == array).all()
        assert not got.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            got[0] = 1
    assert shoal.get(identity.remote(b"y" * 3_000_000)) == b"y" * 3_000_000


def test_an_array_outlives_its_reference() -> None:
    numpy = pytest.importorskip("numpy")
    got = [shoal.get(shoal.put(numpy.full(200_000, i))) for i in range(20)]
    assert [int(array[0]) for array in got] == list(range(20))
    assert all((array == i).all() for i, array in enumerate(got))


def test_tasks_within_tasks() -> None:
    @shoal.remote
    def fib(n: int) -> int:
        if n < 2:
            return n
        return sum(shoal.get([fib.remote(n - 1), fib.remote(n - 2)]))

    assert shoal.get(fib.remote(8)) == 21


def test_the_traceback_of_a_task_that_read_a_failed_one_shows_the_code_of_both_alone() -> None:
    @shoal.remote
    def read_failed() -> None:
        shoal.get(fail.remote("inner"))

    with pytest.raises(KeyError) as caught:
        shoal.get(read_failed.remote())
    frames = [line.rpartition(" in ")[2] for line in str(caught.value).splitlines() if line.startswith("  File ")]
    assert frames == ["read_failed", "fail"]


def test_a_function_whose_name_is_no_unicode_runs() -> None:
    def named() -> int:
        return 1

    named.__name__ = "\udc80"
    assert get(shoal.remote(named).remote()) == 1


@pytest.mark.parametrize("read", [shoal.get, lambda ref: shoal.get([ref, ref]), lambda ref: ref.future().result()])
def test_an_error_is_raised_with_little_of_how_it_was_read(read: Callable[[ObjectRef[Any]], Any]) -> None:
    ref = fail.remote("no such")
    with pytest.raises(KeyError) as caught:
        read(ref)
    assert len([entry for entry in caught.traceback if "shoal_core" in str(entry.path)]) <= 2


def test_the_list_of_processes_shows_what_a_worker_process_runs() -> None:
    @shoal.remote
    def named() -> tuple[int, str]:
        return os.getpid(), process_name(os.getpid())

    def process_name(pid: int) -> str:
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0")

    pid, shown = shoal.get(named.remote())
    assert shown == "shoal: named"
    assert shoal.get(named.options(name="a\0 name").remote())[1] == "shoal: a  name"
    waiting.until(lambda: process_name(pid) == "shoal: worker", "it shows that it idles")


def test_a_function_that_calls_itself_may_leave_out_arguments() -> None:
    @shoal.remote
    def depth(n: int, counted: int = 0, *, step: int = 1) -> int:
        return counted if n == 0 else shoal.get(depth.remote(n - 1, counted + step))

    assert shoal.get(depth.remote(3)) == 3


def test_a_reference_made_in_a_task_is_usable_outside() -> None:
    @shoal.remote
    def make() -> list[ObjectRef[int]]:
        return [shoal.put(41), add.remote(41)]

    first, second = shoal.get(make.remote())
    assert shoal.get([first, second]) == [41, 42]
    assert shoal.get(add.remote(first)) == 42


def test_exceptions_are_retried_where_asked_for(tmp_path: Path) -> None:
    @shoal.remote(max_retries=5, retry_exceptions=[OSError])
    def flaky(path: str, wrong: type[Exception]) -> int:
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            raise wrong("not yet")
        return os.path.getsize(path)

    assert shoal.get(flaky.remote(str(tmp_path / "a"), OSError)) == 3
    with pytest.raises(ValueError, match="not yet"):
        shoal.get(flaky.remote(str(tmp_path / "b"), ValueError))


def test_a_crash_is_retried(tmp_path: Path) -> None:
    @shoal.remote(max_retries=2)
    def crash_once(path: str) -> str:
        if not os.path.exists(path):
            Path(path).touch()
            os._exit(1)
        return "alive"

    assert shoal.get(crash_once.remote(str(tmp_path / "crashed"))) == "alive"


@shoal.remote(max_retries=0)
def crash() -> None:
    os.kill(os.getpid(), 9)


def test_a_crash_without_retries_is_an_error() -> None:
    with pytest.raises(exceptions.WorkerCrashedError, match="SIGKILL"):
        shoal.get(crash.remote())


def test_a_task_whose_argument_was_lost_fails_as_a_task_and_as_what_it_lost() -> None:
    for call in (identity.remote(crash.remote()), identity.remote(identity.remote(crash.remote()))):
        with pytest.raises(exceptions.TaskError, match=r"identity\(\) was not run(.|\n)*SIGKILL") as caught:
            shoal.get(call)
        assert isinstance(caught.value, exceptions.WorkerCrashedError)
        assert type(caught.value.cause) is exceptions.WorkerCrashedError


def test_tasks_not_begun_survive_a_crash_without_retries() -> None:
    @shoal.remote(max_retries=0)
    def die_at(number: int) -> int:
        if number == 50:
            os._exit(1)
        return number

    refs = [die_at.remote(number) for number in range(100)]
    done = lost = 0
    for ref in refs:
        try:
            shoal.get(ref)
            done += 1
        except exceptions.WorkerCrashedError:
            lost += 1
    assert lost >= 1
    assert done >= 50


def test_max_calls_ends_a_process_only_when_nobody_refers_to_what_it_owns() -> None:
    @shoal.remote(max_calls=1)
    def make() -> tuple[int, list[ObjectRef[int]]]:
        return os.getpid(), [shoal.put(41), add.options(num_cpus=2).remote(41)]

    pid, refs = get(make.remote())
    assert get(make.remote())[0] != pid
    assert get(refs) == [41, 42]
    assert not is_gone(pid)
    del refs
    waiting.until(lambda: is_gone(pid), "the process has ended")


def test_max_calls_ends_the_process() -> None:
    @shoal.remote(max_calls=1)
    def pid() -> int:
        return os.getpid()

    assert len(set(shoal.get([pid.remote() for _ in range(5)]))) == 5


def test_await_and_futures() -> None:
    async def main() -> list[int]:
        refs = [add.remote(i) for i in range(10)]
        return list(await asyncio.gather(*refs))

    assert asyncio.run(main()) == list(range(1, 11))
    assert add.remote(4).future().result(timeout=10) == 5
    with pytest.raises(KeyError):
        fail.remote("x").future().result(timeout=10)


def test_submission_from_many_threads() -> None:
    results: list[int] = []

    def submit() -> None:
        results.append(sum(shoal.get([add.remote(i) for i in range(100)])))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [5050] * 8


def test_the_runtime_context() -> None:
    @shoal.remote(num_cpus=1)
    def about() -> tuple[str, str | None, dict[str, float], shoal.TaskID | None]:
        context = shoal.get_runtime_context()
        return context.get_node_id(), context.get_task_id(), context.get_assigned_resources(), context.task_id

    ref = about.remote()
    node, task, resources, task_id = shoal.get(ref)
    context = shoal.get_runtime_context()
    assert node == context.get_node_id()
    assert task == ref.task_id().hex()
    assert task_id == ref.task_id()
    assert (context.job_id, context.task_id, context.actor_id) == (ref.job_id(), None, None)
    assert (context.node_id.hex(), context.worker_id.hex()) == (node, context.get_worker_id())
    assert {name: one.hex() for name, one in context.get().items() if name != "namespace"} == {
        "job_id": context.get_job_id(),
        "node_id": node,
    }
    assert context.get_resource_ids() == {"GPU": []}
    assert context.get_session_name()
    assert os.path.isdir(context.get_temp_dir())
    assert resources == {"CPU": 1.0}
    assert context.get_task_id() is None
    assert shoal.get_gpu_ids() == []


def test_direct_calls_and_wrong_options_are_refused() -> None:
    with pytest.raises(TypeError, match=r"add\.remote"):
        add(1)
    with pytest.raises(ValueError, match="nonsense"):
        add.options(nonsense=1)
    with pytest.raises(TypeError, match="lock"):
        add.remote(threading.Lock())  # type: ignore[call-overload]


def test_nodes_and_resources() -> None:
    (node,) = [node for node in shoal.nodes() if node["Alive"]]
    assert node["Resources"]["CPU"] == 2
    assert shoal.cluster_resources()["CPU"] == 2


def test_unpicklable_functions_name_the_culprit() -> None:
    lock = threading.Lock()

    @shoal.remote
    def holds() -> bool:
        return lock.locked()

    with pytest.raises(TypeError, match="lock"):
        holds.remote()
