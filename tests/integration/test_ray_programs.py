"""Programs as people write them for Ray: each runs unchanged but for its first line."""

from __future__ import annotations

import asyncio
import collections
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shoal as ray
from shoal.util import ActorPool

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray.init(num_cpus=4, ignore_reinit_error=True, include_dashboard=False, log_to_driver=False):
        yield


def test_parameter_server() -> None:
    @ray.remote
    class ParameterServer:
        def __init__(self, size: int, learning_rate: float) -> None:
            self.weights = np.zeros(size)
            self.learning_rate = learning_rate

        def apply_gradients(self, *gradients: Any) -> Any:
            self.weights -= self.learning_rate * np.mean(np.stack(gradients), axis=0)
            return self.weights

        def get_weights(self) -> Any:
            return self.weights

    @ray.remote
    class DataWorker:
        def __init__(self, seed: int) -> None:
            self.random = np.random.default_rng(seed)
            self.target = np.linspace(0.0, 1.0, 100_000)

        def compute_gradients(self, weights: Any) -> Any:
            assert not weights.flags.writeable
            return weights - self.target + self.random.normal(0, 0.001, len(self.target))

    iterations, num_workers = 30, 2
    ps = ParameterServer.remote(100_000, 0.5)  # type: ignore[attr-defined]
    workers = [DataWorker.remote(seed) for seed in range(num_workers)]  # type: ignore[attr-defined]
    # Synchronously: a barrier in each round.
    current_weights = ps.get_weights.remote()
    for _ in range(iterations):
        gradients = [worker.compute_gradients.remote(current_weights) for worker in workers]
        current_weights = ps.apply_gradients.remote(*gradients)
    assert abs(ray.get(current_weights) - np.linspace(0.0, 1.0, 100_000)).max() < 0.01
    # Asynchronously: whoever is ready first.
    current_weights = ps.get_weights.remote()
    gradients_by = {worker.compute_gradients.remote(current_weights): worker for worker in workers}
    for _ in range(iterations):
        ready_gradient_list, _ = ray.wait(list(gradients_by))
        ready_gradient_id = ready_gradient_list[0]
        worker = gradients_by.pop(ready_gradient_id)
        current_weights = ps.apply_gradients.remote(ready_gradient_id)
        gradients_by[worker.compute_gradients.remote(current_weights)] = worker
    assert abs(ray.get(ps.get_weights.remote()) - np.linspace(0.0, 1.0, 100_000)).max() < 0.01


def test_map_reduce_word_count() -> None:
    corpus = [f"the quick brown fox {number % 7} jumps over the lazy dog" for number in range(300)]
    num_reducers = 3

    def apply_map(partition: list[str]) -> list[dict[str, int]]:
        counts = collections.Counter(word for line in partition for word in line.split())
        outputs: list[dict[str, int]] = [{} for _ in range(num_reducers)]
        for word, count in counts.items():
            outputs[ord(word[0]) % num_reducers][word] = count
        return outputs

    map_task = ray.remote(num_returns=num_reducers)(apply_map)

    @ray.remote
    def apply_reduce(*results: dict[str, int]) -> dict[str, int]:
        total: collections.Counter[str] = collections.Counter()
        for result in results:
            total.update(result)
        return dict(total)

    partitions = [corpus[start : start + 100] for start in range(0, len(corpus), 100)]
    map_results: list[Any] = [map_task.remote(partition) for partition in partitions]
    outputs = [apply_reduce.remote(*[outputs[reducer] for outputs in map_results]) for reducer in range(num_reducers)]
    counts = {word: count for output in ray.get(outputs) for word, count in output.items()}
    assert counts == dict(collections.Counter(word for line in corpus for word in line.split()))
    assert counts["the"] == 600


def test_monte_carlo_pi_with_a_progress_actor() -> None:
    @ray.remote
    class ProgressActor:
        def __init__(self, total_num_samples: int) -> None:
            self.total_num_samples = total_num_samples
            self.num_samples_completed_per_task: dict[int, int] = {}

        def report_progress(self, task_id: int, num_samples_completed: int) -> None:
            self.num_samples_completed_per_task[task_id] = num_samples_completed

        def get_progress(self) -> float:
            return sum(self.num_samples_completed_per_task.values()) / self.total_num_samples

    @ray.remote
    def sampling_task(num_samples: int, task_id: int, progress_actor: Any) -> int:
        generator = random.Random(task_id)
        num_inside = 0
        for i in range(num_samples):
            x, y = generator.uniform(-1, 1), generator.uniform(-1, 1)
            if x * x + y * y <= 1:
                num_inside += 1
            if (i + 1) % 5_000 == 0:
                progress_actor.report_progress.remote(task_id, i + 1)
        return num_inside

    num_tasks, num_samples_per_task = 4, 20_000
    total = num_tasks * num_samples_per_task
    progress_actor = ProgressActor.remote(total)  # type: ignore[attr-defined]
    results = [sampling_task.remote(num_samples_per_task, i, progress_actor) for i in range(num_tasks)]
    seen = [0.0]
    while seen[-1] < 1:
        seen.append(ray.get(progress_actor.get_progress.remote()))
        time.sleep(0.01)
    assert seen == sorted(seen)
    assert abs(4 * sum(ray.get(results)) / total - 3.14159) < 0.05


def test_a_tree_of_actors() -> None:
    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self, name: str) -> None:
            self.name = name
            self.done: list[str] = []

        def work(self, item: int) -> str:
            self.done.append(f"{self.name}:{item}")
            return self.done[-1]

    @ray.remote(num_cpus=0)
    class Supervisor:
        def __init__(self, name: str, fan_out: int) -> None:
            self.workers = [Worker.remote(f"{name}.{i}") for i in range(fan_out)]  # type: ignore[attr-defined]

        def work(self, items: list[int]) -> list[str]:
            pairs = zip(self.workers * len(items), items, strict=False)
            return ray.get([worker.work.remote(item) for worker, item in pairs])

        def terminate(self) -> int:
            for worker in self.workers:
                ray.kill(worker)
            return len(self.workers)

    supervisors = [Supervisor.remote(f"s{i}", 2) for i in range(3)]  # type: ignore[attr-defined]
    results = ray.get([supervisor.work.remote([1, 2, 3]) for supervisor in supervisors])
    assert results[2] == ["s2.0:1", "s2.1:2", "s2.0:3"]
    assert ray.get([supervisor.terminate.remote() for supervisor in supervisors]) == [2, 2, 2]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(supervisors[0].work.remote([1]))


def test_batch_inference_with_an_actor_pool() -> None:
    class Model:
        def __init__(self, weights: Any) -> None:
            self.weights = weights

        def __call__(self, batch: Any) -> Any:
            return batch @ self.weights

    @ray.remote
    class BatchPredictor:
        def __init__(self, model_ref: Any) -> None:
            self.model = ray.get(model_ref[0]) if isinstance(model_ref, list) else model_ref

        def predict(self, batch: Any) -> Any:
            return self.model(batch)

    weights = np.arange(200_000, dtype=np.float64).reshape(1000, 200)
    model_ref = ray.put(Model(weights))
    predictors = [BatchPredictor.remote(model_ref), BatchPredictor.remote([model_ref])]  # type: ignore[attr-defined]
    pool: ActorPool[Any] = ActorPool(predictors)
    batches = [np.full((2, 1000), i, dtype=np.float64) for i in range(8)]
    for i, result in enumerate(pool.map(lambda actor, batch: actor.predict.remote(batch), batches)):
        assert np.array_equal(result, batches[i] @ weights)
    for batch in batches:
        pool.submit(lambda actor, value: actor.predict.remote(value), batch)
    count = 0
    while pool.has_next():
        assert pool.get_next_unordered().shape == (2, 200)
        count += 1
    assert count == len(batches)


def test_a_pipeline_of_streaming_generators() -> None:
    @ray.remote(num_returns="streaming")
    def load(files: int) -> Iterator[Any]:
        for i in range(files):
            yield np.full(50_000, i)

    @ray.remote
    def transform(block: Any) -> Any:
        return block * 2

    @ray.remote
    class Sink:
        def __init__(self) -> None:
            self.total = 0

        def write(self, block: Any) -> int:
            self.total += int(block.sum())
            return self.total

    sink = Sink.remote()  # type: ignore[attr-defined]
    written = [sink.write.remote(transform.remote(ref)) for ref in load.remote(10)]
    assert ray.get(written[-1]) == sum(2 * i * 50_000 for i in range(10))

    async def consume() -> list[int]:
        return [int((await ref)[0]) async for ref in load.remote(5)]

    assert asyncio.run(consume()) == list(range(5))


def test_async_actors_that_crawl() -> None:
    pages = {f"/{i}": [f"/{2 * i + 1}", f"/{2 * i + 2}"] for i in range(31)}

    @ray.remote
    class Fetcher:
        def __init__(self) -> None:
            self.running = self.most = 0

        async def fetch(self, url: str) -> list[str]:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.001)
            self.running -= 1
            return pages.get(url, [])

        async def statistics(self) -> int:
            return self.most

    @ray.remote
    class Crawler:
        def __init__(self, fetcher: Any, limit: int) -> None:
            self.fetcher = fetcher
            self.seen: set[str] = set()
            self.limit = asyncio.Semaphore(limit)

        async def crawl(self, url: str) -> None:
            if url in self.seen:
                return
            self.seen.add(url)
            async with self.limit:
                links = await self.fetcher.fetch.remote(url)
            await asyncio.gather(*(self.crawl(link) for link in links))

        async def result(self) -> list[str]:
            return sorted(self.seen)

    fetcher = Fetcher.options(max_concurrency=100).remote()  # type: ignore[attr-defined]
    crawler = Crawler.remote(fetcher, 8)  # type: ignore[attr-defined]
    ray.get(crawler.crawl.remote("/0"))
    assert ray.get(crawler.result.remote()) == sorted(f"/{i}" for i in range(63))
    assert 1 < ray.get(fetcher.statistics.remote()) <= 8


def test_retries_and_error_handling(tmp_path: Any) -> None:
    class FlakyError(Exception):
        pass

    @ray.remote(max_retries=3, retry_exceptions=[FlakyError])
    def flaky(path: str) -> int:
        with open(path, "a") as file:
            file.write("x")
        attempts = os.path.getsize(path)
        if attempts < 3:
            raise FlakyError(attempts)
        return attempts

    @ray.remote(max_retries=2)
    def crash(path: str) -> int:
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            os._exit(1)
        return os.path.getsize(path)

    @ray.remote
    def fail() -> int:
        return int("not a number")

    @ray.remote
    def depends(value: int) -> int:
        return value

    assert ray.get(flaky.remote(str(tmp_path / "flaky"))) == 3
    assert ray.get(crash.remote(str(tmp_path / "crash"))) == 3
    for ref in (fail.remote(), depends.remote(fail.remote())):
        with pytest.raises(ValueError, match="not a number") as caught:
            ray.get(ref)
        assert isinstance(caught.value, ray.exceptions.RayTaskError)
        assert isinstance(caught.value.as_instanceof_cause(), ValueError)
        assert "fail" in str(caught.value)

    @ray.remote
    def sleep() -> None:
        time.sleep(600)

    asleep = sleep.remote()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(asleep, timeout=0.1)
    assert ray.wait([asleep], timeout=0) == ([], [asleep])
    ray.cancel(asleep)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(asleep)

    @ray.remote(max_restarts=1, max_task_retries=1)
    class Fragile:
        def __init__(self) -> None:
            self.calls = 0

        def call(self) -> int:
            self.calls += 1
            return self.calls

        def die(self) -> None:
            os._exit(1)

    fragile = Fragile.remote()  # type: ignore[attr-defined]
    assert [ray.get(fragile.call.remote()) for _ in range(2)] == [1, 2]
    fragile.die.options(max_task_retries=0).remote()
    assert ray.get(fragile.call.remote()) == 1
    ray.kill(fragile)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(fragile.call.remote())
