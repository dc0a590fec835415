"""``util.multiprocessing.Pool`` and ``util.actor_group.ActorGroup``."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

import joblib
import pytest

import shoal
from shoal.exceptions import ActorDiedError, ActorError
from shoal.util import multiprocessing as pooled
from shoal.util.actor_group import ActorGroup
from shoal.util.joblib import register_ray
from shoal.util.multiprocessing import Pool
from tests.integration.waiting import SECONDS, get, is_gone, until

pytestmark = pytest.mark.usefixtures("two_cpus")


@pytest.fixture(scope="module")
def pool(two_cpus: None) -> Iterator[Pool]:
    with Pool(2) as one:
        yield one


def double(number: int) -> int:
    return 2 * number


def add(first: int, second: int = 0) -> int:
    return first + second


def fail_at_three(number: int) -> int:
    if number == 3:
        raise KeyError(number)
    return number


class UnpicklableError(Exception):
    def __init__(self, lock: Any) -> None:
        super().__init__("it has a lock", lock)


def test_calls(pool: Pool) -> None:
    assert pool.apply(add, (1,), {"second": 2}) == 3
    assert pool.map(double, range(100)) == [2 * number for number in range(100)]
    assert pool.map(double, range(10), chunksize=3) == pool.map(double, iter(range(10)))
    assert pool.map(double, []) == pool.starmap(add, []) == []
    assert pool.starmap(add, [(1, 2), (3, 4)]) == [3, 7]
    assert pool.map(lambda number: number + 1, [1]) == [2]
    assert len(set(pool.map(lambda _: os.getpid(), range(64), chunksize=1))) <= 2


def test_results_come_later(pool: Pool) -> None:
    results = [pool.apply_async(add, (number, number)) for number in range(10)]
    assert [result.get(SECONDS) for result in results] == list(range(0, 20, 2))
    result = pool.starmap_async(add, [(1,), (2,)])
    result.wait(SECONDS)
    assert result.ready()
    assert result.successful()
    with _Sleeper() as asleep:
        late = pool.apply_async(asleep.wait)
        assert not late.ready()
        with pytest.raises(ValueError, match="not ready"):
            late.successful()
        with pytest.raises(multiprocessing.TimeoutError):
            late.get(timeout=0.01)


def test_callbacks(pool: Pool) -> None:
    told: list[Any] = []
    tell = told.append
    pool.apply_async(add, (1, 2), callback=tell, error_callback=tell).wait(SECONDS)
    pool.map_async(double, [1, 2], callback=tell, error_callback=tell).wait(SECONDS)
    pool.apply_async(fail_at_three, (3,), callback=tell, error_callback=tell).wait(SECONDS)
    pool.map_async(fail_at_three, [1, 3], callback=tell, error_callback=tell).wait(SECONDS)
    assert told[:2] == [3, [2, 4]]
    assert [type(error) for error in told[2:]] == [KeyError, KeyError]


def test_errors_are_those_of_the_function(pool: Pool) -> None:
    with pytest.raises(KeyError):
        pool.apply(fail_at_three, (3,))
    with pytest.raises(KeyError):
        pool.map(fail_at_three, range(10))
    assert not _waited(pool.map_async(fail_at_three, [3])).successful()

    def raise_what_cannot_travel() -> None:
        raise UnpicklableError(threading.Lock())

    with pytest.raises(multiprocessing.pool.MaybeEncodingError):  # type: ignore[attr-defined]
        pool.apply(raise_what_cannot_travel)
    with pytest.raises(TypeError):
        pool.apply(lambda lock: lock, (threading.Lock(),))
    lock = threading.Lock()
    with pytest.raises(TypeError):
        pool.map(lambda _: lock, range(1000), chunksize=1)
    assert pool.apply(add, (1,)) == 1


def _waited(result: pooled.pool.AsyncResult) -> pooled.pool.AsyncResult:
    result.wait(SECONDS)
    return result


def test_lazy_iterators(pool: Pool) -> None:
    assert list(pool.imap(double, range(20))) == [2 * number for number in range(20)]
    assert sorted(pool.imap_unordered(double, range(20), chunksize=3)) == [2 * number for number in range(20)]
    assert list(pool.imap(double, [])) == []
    endless = pool.imap(double, itertools.count())
    assert [next(endless) for _ in range(10)] == [2 * number for number in range(10)]
    some = pool.imap(fail_at_three, range(2, 5))
    assert next(some) == 2
    with pytest.raises(KeyError):
        next(some)
    assert (next(some), list(some)) == (4, [])
    with _Sleeper() as asleep:
        late = pool.imap(lambda _: asleep.wait(), [1])
        with pytest.raises(multiprocessing.TimeoutError):
            late.next(timeout=0.01)


def test_a_process_that_dies_fails_its_chunk_and_is_replaced(pool: Pool) -> None:
    with pytest.raises(ActorDiedError):
        pool.apply(os._exit, (1,))
    assert pool.map(double, range(10)) == [2 * number for number in range(10)]


def test_a_pool_ends() -> None:
    pool = Pool(1)
    pids = pool.map(lambda _: os.getpid(), [1])
    result = pool.map_async(double, range(10))
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    pool.close()
    for refused in (pool.apply, pool.map, pool.imap, pool.apply_async):
        with pytest.raises(ValueError, match="not running"):
            refused(double, [1])
    pool.join()
    assert result.get(SECONDS) == [2 * number for number in range(10)]
    until(lambda: is_gone(pids[0]), "the process of the pool is gone")


def test_a_terminated_pool_fails_what_it_has_not_done() -> None:
    pool = Pool(1)
    with _Sleeper() as asleep:
        results = [pool.apply_async(asleep.wait) for _ in range(3)]
        pool.terminate()
        pool.join()
    for result in results:
        with pytest.raises(ActorError):
            result.get(SECONDS)


def test_an_initializer_runs_in_each_process() -> None:
    def prepare(value: str) -> None:
        os.environ["SHOAL_T_PREPARED"] = value

    with Pool(2, prepare, ["yes"]) as pool:
        assert pool.map(lambda _: os.environ["SHOAL_T_PREPARED"], range(4)) == ["yes"] * 4
    with pytest.raises(ActorDiedError, match="no such luck"):
        Pool(1, _fail, ())


def _fail() -> None:
    raise ValueError("no such luck")


def test_processes_are_replaced_after_so_many_chunks() -> None:
    with Pool(1, maxtasksperchild=2) as pool:
        pids = pool.map(lambda _: os.getpid(), range(6), chunksize=1)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 2]


def test_wrong_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="must be >0"):
        Pool(0)
    with pytest.raises(ValueError, match="2 CPUs"):
        Pool(3)
    with pytest.raises(TypeError, match="callable"):
        Pool(1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="maxtasksperchild"):
        Pool(1, maxtasksperchild=0)


def test_a_pool_works_in_a_task() -> None:
    @shoal.remote
    def sum_of_doubles() -> int:
        with Pool(2, ray_remote_args={"num_cpus": 1}) as pool:
            return sum(pool.map(double, range(10)))

    assert get(sum_of_doubles.remote()) == 90


def test_the_rest_of_multiprocessing_is_there() -> None:
    assert pooled.Pool is Pool is pooled.pool.Pool
    assert pooled.TimeoutError is multiprocessing.TimeoutError
    assert pooled.cpu_count() == multiprocessing.cpu_count()
    assert set(multiprocessing.__all__) <= set(pooled.__all__)


class GateClass:
    def __init__(self) -> None:
        self.open = threading.Event()

    def wait(self) -> None:
        self.open.wait()

    def let(self) -> None:
        self.open.set()


class _Sleeper:
    """A call that lasts until the block ends."""

    def __enter__(self) -> Any:
        self.gate = shoal.remote(num_cpus=0, max_concurrency=4)(GateClass).remote()
        return _Waiter(self.gate)

    def __exit__(self, *exception: object) -> None:
        get(self.gate.let.remote())


class _Waiter:
    def __init__(self, gate: Any) -> None:
        self.gate = gate

    def wait(self) -> None:
        shoal.get(self.gate.wait.remote())


def test_joblib_runs_on_the_cluster() -> None:
    register_ray()
    with joblib.parallel_backend("ray", n_jobs=2):
        pids = joblib.Parallel(batch_size=1)(joblib.delayed(os.getpid)() for _ in range(8))
        assert os.getpid() not in pids
        assert joblib.Parallel()(joblib.delayed(add)(number, 1) for number in range(20)) == list(range(1, 21))
        with pytest.raises(KeyError):
            joblib.Parallel()(joblib.delayed(fail_at_three)(number) for number in range(5))
    with joblib.parallel_backend("ray", n_jobs=1):
        assert joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2
    with joblib.parallel_backend("ray"):
        assert joblib.effective_n_jobs(-1) == 2


class CounterClass:
    def __init__(self, start: int, step: int = 1) -> None:
        self.value, self.step = start, step

    def add(self, count: int) -> int:
        self.value += count * self.step
        return self.value

    def pid(self) -> int:
        return os.getpid()


def test_a_group_of_actors_is_called_at_once() -> None:
    group = ActorGroup(CounterClass, num_actors=2, num_cpus_per_actor=0, init_args=[1], init_kwargs={"step": 2})
    assert (len(group), get(group.add.remote(3))) == (2, [7, 7])
    assert get(group[0].actor.add.remote(1)) == 9
    pids = get(group.pid.remote())
    with pytest.raises(TypeError, match=r"object\.add\.remote\(\)"):
        group.add(1)
    group.add_actors(1)
    assert get(group.add.remote(0)) == [9, 7, 1]
    group.remove_actors([1])
    assert get(group.add.remote(0)) == [9, 1]
    group.shutdown()
    until(lambda: all(map(is_gone, pids)), "the actors of the group are gone")
    with pytest.raises(RuntimeError, match="start it again"):
        group.add.remote(1)
    group.start()
    assert get(group.add.remote(0)) == [1, 1]
    group.shutdown(patience_s=0)


@pytest.mark.parametrize("wrong", [{"num_actors": 0}, {"num_cpus_per_actor": -1}, {"num_gpus_per_actor": -1}])
def test_wrong_groups_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="actor"):
        ActorGroup(CounterClass, init_args=[1], **wrong)
