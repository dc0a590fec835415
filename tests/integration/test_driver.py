"""What a driver hears of its job: its workers' output, the end of the job, objects of other nodes."""

from __future__ import annotations

import asyncio
import time

import pytest

import shoal
from shoal import exceptions
from shoal.cluster_utils import Cluster
from shoal.session import runtime
from shoal_core.bus.requests import ask
from shoal_core.protocol.messages import FinishJob, JobState


@shoal.remote
def speak(word: str) -> int:
    print(word)
    return len(word)


@shoal.remote
def nothing() -> None:
    return None


@pytest.mark.usefixtures("one_cpu")
class TestOneNode:
    def test_what_workers_print_comes_under_the_name_of_the_task(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert shoal.get([speak.remote("salmon"), speak.options(name="herring").remote("sprat")]) == [6, 5]
        printed = ""
        deadline = time.monotonic() + 20
        while not ("salmon" in printed and "sprat" in printed):
            assert time.monotonic() < deadline
            printed += capfd.readouterr().out
            time.sleep(0.01)
        node = shoal.get_runtime_context().get_node_id()[:8]
        for name, word in (("speak", "salmon"), ("herring", "sprat")):
            (line,) = [line for line in printed.splitlines() if word in line]
            assert line.startswith(f"({name} pid=")
            assert line.endswith(f"node={node}) {word}")

    def test_a_driver_whose_job_was_ended_is_told_so(self) -> None:
        current = runtime()
        ref = speak.options(resources={"unicorn": 1}).remote("never")
        end = FinishJob(job_id=current.job, state=JobState.FAILED, message="ended by a test")
        current.call(ask(current.bus, current.subjects.gcs("finish_job"), end))
        with pytest.raises(exceptions.DeclaredDeadError, match="ended by a test"):
            shoal.get(ref, timeout=20)
        with pytest.raises(exceptions.DeclaredDeadError, match="ended by a test"):
            nothing.remote()


def test_an_object_of_another_node_can_be_awaited() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1, resources={"far": 1})
        cluster.connect()

        @shoal.remote(resources={"far": 1})
        def far() -> bytes:
            return b"z" * 3_000_000

        async def main() -> list[int]:
            first, second = await asyncio.gather(far.remote(), far.remote())
            return [len(first), len(second)]

        assert asyncio.run(main()) == [3_000_000, 3_000_000]
    finally:
        cluster.shutdown()
