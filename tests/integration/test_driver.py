"""What a driver hears of its job: its workers' output, the end of the job, objects of other nodes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import time
from typing import Any

import pytest

import shoal
from shoal import exceptions
from shoal.cluster_utils import Cluster
from shoal.session import runtime
from shoal.util import state
from shoal_core.bus.requests import ask
from shoal_core.protocol.messages import FinishJob, JobState
from tests.integration.waiting import until

TRACED_DRIVER = """
import shoal
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

def trace_id():
    return trace.get_current_span().get_span_context().trace_id

@shoal.remote
def inner():
    return trace_id()

@shoal.remote
def outer():
    return [trace_id(), shoal.get(inner.remote())]

trace.set_tracer_provider(TracerProvider())
shoal.init(num_cpus=1)
with trace.get_tracer("driver").start_as_current_span("mine"):
    print(trace_id(), *shoal.get(outer.remote()))
"""


@shoal.remote
def speak(word: str) -> int:
    print(word)
    return len(word)


@shoal.remote
def nothing() -> None:
    return None


WAITING_DRIVER = """
import threading
import time
import shoal

shoal.init(num_cpus=1)
ref = shoal.remote(time.sleep).remote(60)
threading.Thread(target=shoal.get, args=(ref,), daemon=True).start()
threading.Thread(target=shoal.wait, args=([ref],), daemon=True).start()
"""


def test_a_daemon_thread_that_waits_ends_with_the_program_without_a_word() -> None:
    done = subprocess.run([sys.executable, "-c", WAITING_DRIVER], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SECOND_DRIVER = """
import sys
import shoal

with shoal.init(sys.argv[1], namespace="shared"):
    basket = shoal.get_actor("basket")
    shoal.get(basket.append.remote("pike"))
    print(shoal.get(basket.copy.remote()))
"""


def test_another_process_of_the_user_joins_the_cluster_of_a_driver_by_its_address() -> None:
    with shoal.init(num_cpus=1, namespace="shared") as context:
        basket: Any = shoal.remote(list).options(name="basket")
        basket = basket.remote(["perch"])
        shoal.get(basket.copy.remote())
        command = [sys.executable, "-c", SECOND_DRIVER, context.address_info["address"]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert done.stdout.split() == ["['perch',", "'pike']"], done.stderr
        assert shoal.get(basket.copy.remote()) == ["perch", "pike"]


@pytest.mark.usefixtures("one_cpu")
class TestOneNode:
    def test_what_workers_print_comes_under_the_name_of_the_task(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = io.StringIO()  # ``capfd`` loses what is printed while it is read
        monkeypatch.setattr(sys, "stdout", shown)
        assert shoal.get([speak.remote("salmon"), speak.options(name="herring").remote("sprat")]) == [6, 5]
        until(lambda: all(word in shown.getvalue() for word in ("salmon\n", "sprat\n")), "what they print is shown")
        node = shoal.get_runtime_context().get_node_id()[:8]
        for name, word in (("speak", "salmon"), ("herring", "sprat")):
            (line,) = [line for line in shown.getvalue().splitlines() if word in line]
            assert line.startswith(f"({name} pid=")
            assert line.endswith(f"node={node}) {word}")

    def test_a_driver_whose_job_was_ended_is_told_so(self) -> None:
        current = runtime()
        ref = speak.options(resources={"unicorn": 1}).remote("never")
        end = FinishJob(job_id=current.job, state=JobState.FAILED, message="ended by a test")
        with contextlib.suppress(exceptions.DeclaredDeadError):  # the end may be told before the answer comes
            current.call(ask(current.bus, current.subjects.gcs("finish_job"), end))
        with pytest.raises(exceptions.DeclaredDeadError, match="ended by a test"):
            shoal.get(ref, timeout=20)
        with pytest.raises(exceptions.DeclaredDeadError, match="ended by a test"):
            nothing.remote()


class SpeakerClass:
    def say(self, words: str) -> None:
        print(words)


Speaker: Any = shoal.remote(SpeakerClass)


@pytest.mark.parametrize(("dedup", "count"), [("1", 2), ("0", 3)])
def test_what_several_workers_print_alike_is_shown_once_and_counted(
    dedup: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_DEDUP_LOGS", dedup)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with shoal.init(num_cpus=1):
        shoal.get([Speaker.options(num_cpus=0).remote().say.remote("ready") for _ in range(3)])
        until(lambda: "ready\n" in shown.getvalue(), "what is printed first is shown at once")
        until(lambda: shown.getvalue().count("ready") == count, "and the others are, too")
    assert ("[repeated 2x across cluster]" in shown.getvalue()) == (dedup == "1")


def test_what_a_driver_has_run_is_told_when_its_job_has_ended() -> None:
    def run() -> None: ...

    def run_for_long() -> None:
        time.sleep(600)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with shoal.init(cluster.address):
            job = shoal.get_runtime_context().get_job_id()
            shoal.get([shoal.remote(run).remote() for _ in range(3)])
            speaker = Speaker.options(num_cpus=0).remote()
            shoal.get(speaker.say.remote("a word"))
            runs = shoal.remote(run_for_long).remote()
            waits = shoal.remote(run_for_long).remote()
            until(lambda: state.list_tasks(filters=[("state", "=", "RUNNING")]) != [], "one of them runs")
        cluster.connect()

        def told() -> list[str]:
            rows = state.list_tasks(filters=[("job_id", "=", job)])
            return sorted(f"{row.func_or_class_name} {row.state} {row.error_type}" for row in rows)

        expected = [
            "SpeakerClass.__init__ FINISHED None",
            "SpeakerClass.say FINISHED None",
            *["run FINISHED None"] * 3,
            *["run_for_long FAILED WORKER_DIED"] * 2,
        ]
        until(lambda: told() == expected, f"all is told, not {told()}")
        del runs, waits, speaker
    finally:
        cluster.shutdown()


def test_a_cluster_of_a_program_keeps_as_much_of_logs_as_its_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ROTATION_MAX_BYTES", "4096")
    monkeypatch.setenv("SHOAL_ROTATION_BACKUP_COUNT", "1")
    with shoal.init(num_cpus=1):
        speaker = Speaker.remote()
        shoal.get(speaker.say.remote("a word" * 5000 + "\nthe last"))

        def kept() -> str:
            return "".join(state.get_log(actor_id=speaker._actor_id.hex()))

        until(lambda: "the last" in kept(), "it is written")
        assert 4096 < len(kept()) <= 2 * 4096


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


def test_a_trace_follows_tasks_within_tasks() -> None:
    environment = os.environ | {"SHOAL_TRACING": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRACED_DRIVER], env=environment, capture_output=True, text=True, timeout=50, check=True
    )
    mine, *others = done.stdout.split()
    assert int(mine)
    assert others == [mine, mine]


FORKING_DRIVER = """
import os, shoal

@shoal.remote
def double(x):
    return 2 * x

shoal.init(num_cpus=1)
if (child := os.fork()) == 0:
    raise SystemExit(0)
os.waitpid(child, 0)
print(shoal.get(double.remote(21), timeout=20))
"""


def test_a_child_that_a_driver_forked_ends_without_its_cluster() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING_DRIVER], capture_output=True, text=True, timeout=50)
    assert done.stdout.split() == ["42"], done.stderr
