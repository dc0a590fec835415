"""What users get wrong, and what they are told: at the call that was wrong, within seconds, and nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from shoal import exceptions
from shoal_core.bus.broker import EmbeddedBroker, free_port, launch_broker
from shoal_core.bus.credentials import Credentials
from shoal_core.protocol.messages import PROTOCOL_VERSION
from shoal_core.protocol.subjects import Role
from shoal_core.runtime import session as runtime_session

SECONDS = 10.0


@contextlib.contextmanager
def broker(folder: Path, *, jetstream: bool = True) -> Iterator[EmbeddedBroker]:
    """Run a broker without any service, with a file of credentials for each role in ``folder``."""
    with asyncio.Runner() as runner:
        launching = launch_broker("default", jetstream=jetstream)
        one = runner.run(launching.__aenter__())
        try:
            for role, credentials in one.credentials.items():
                credentials.to_file(folder / f"{role}.json")
            yield one
        finally:
            runner.run(launching.__aexit__(None, None, None))


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Start from a process that has not joined, and hold that it has not joined afterwards."""
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    assert not shoal.is_initialized()
    threads = threading.active_count()
    yield monkeypatch
    assert not shoal.is_initialized()
    assert threading.active_count() == threads


class TestJoining:
    def test_an_address_where_nobody_answers_is_said_within_seconds(self, clean: pytest.MonkeyPatch) -> None:
        address = f"nats://127.0.0.1:{free_port()}"
        began = time.monotonic()
        with pytest.raises(exceptions.ClusterUnreachableError) as caught:
            shoal.init(address)
        assert time.monotonic() - began < SECONDS
        assert address in str(caught.value)
        assert "nobody answered" in str(caught.value)
        assert isinstance(caught.value, ConnectionError)

    @pytest.mark.parametrize("address", ["ray://localhost:10001", "nats://localhost:4222,http://u:secret@localhost"])
    def test_an_address_of_another_kind_is_refused_at_once(self, clean: pytest.MonkeyPatch, address: str) -> None:
        with pytest.raises(ValueError, match=r"nats://, tls://, ws://, wss://") as caught:
            shoal.init(address)
        assert "secret" not in str(caught.value)
        assert not shoal.is_initialized()

    def test_a_wrong_credential_is_said_at_once(self, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
        Credentials(user="process", password="wrong").to_file(tmp_path / "wrong.json")
        clean.setenv("SHOAL_CREDENTIALS", str(tmp_path / "wrong.json"))
        with broker(tmp_path) as one:
            for address in (one.address, one.address.replace("nats://", "")):
                with pytest.raises(exceptions.AuthenticationError, match="refused the credential") as caught:
                    shoal.init(address)
                assert one.address in str(caught.value)
                assert "wrong" not in str(caught.value).replace("credentials", "")

    @pytest.mark.parametrize("text", ["{", '{"user": 1, "nonsense": 2}', ""])
    def test_a_file_without_credentials_is_named(self, clean: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
        path = tmp_path / "credentials.json"
        path.write_text(text)
        clean.setenv("SHOAL_CREDENTIALS", str(path))
        with pytest.raises(ValueError, match=r"credentials\.json holds no credentials"):
            shoal.init("nats://127.0.0.1:1")

    def test_an_address_without_a_control_store_is_said(self, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
        clean.setattr(runtime_session, "JOIN_SECONDS", 0.5)
        with broker(tmp_path) as one:
            clean.setenv("SHOAL_CREDENTIALS", str(tmp_path / "process.json"))
            with pytest.raises(exceptions.ClusterUnreachableError, match=r"no control store \(gcs\)") as caught:
                shoal.init(one.address)
        assert one.address in str(caught.value)
        assert "'default'" in str(caught.value)

    def test_a_password_in_an_address_is_not_shown(self, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
        clean.setattr(runtime_session, "JOIN_SECONDS", 0.5)
        with broker(tmp_path) as one:
            proof = one.credentials[Role.PROCESS]
            address = one.address.replace("nats://", f"nats://{proof.user}:{proof.password}@")
            with pytest.raises(exceptions.ClusterUnreachableError, match="no control store") as caught:
                shoal.init(address)
        assert one.address in str(caught.value)
        assert str(proof.password) not in str(caught.value)

    def test_another_clusters_name_is_said(self, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
        clean.setattr(runtime_session, "JOIN_SECONDS", 0.5)
        clean.setenv("SHOAL_CLUSTER", "elsewhere")
        with broker(tmp_path) as one:
            clean.setenv("SHOAL_CREDENTIALS", str(tmp_path / "process.json"))
            with pytest.raises(exceptions.ConnectionFailedError, match="elsewhere"):
                shoal.init(one.address)

    def test_a_broker_without_jetstream_is_said_by_the_control_store(self, tmp_path: Path) -> None:
        with broker(tmp_path, jetstream=False) as one:
            command = [sys.executable, "-m", "shoal_gcs", "--address", one.address]
            done = subprocess.run(
                [*command, "--credentials", str(tmp_path / "gcs.json")],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        assert done.returncode == 3, done.stderr
        assert "JetStream" in done.stderr

    def test_a_broker_without_jetstream_is_said_at_once(self, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
        clean.setattr(runtime_session, "JOIN_SECONDS", 1000.0)
        with broker(tmp_path, jetstream=False) as one:
            clean.setenv("SHOAL_CREDENTIALS", str(tmp_path / "process.json"))
            with pytest.raises(
                exceptions.JetStreamUnavailableError, match=r"without JetStream(.|\n)*--jetstream"
            ) as caught:
                shoal.init(one.address)
        assert one.address in str(caught.value)

    def test_versions_that_do_not_fit_are_both_said(self, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
        program = (
            "import runpy, shoal_core.protocol.messages as messages\n"
            "messages.PROTOCOL_VERSION = 999\n"
            "runpy.run_module('shoal_gcs', run_name='__main__', alter_sys=True)\n"
        )
        with broker(tmp_path) as one:
            command = [sys.executable, "-c", program, "--address", one.address]
            command += ["--credentials", str(tmp_path / "gcs.json")]
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as gcs:
                clean.setenv("SHOAL_CREDENTIALS", str(tmp_path / "process.json"))
                with pytest.raises(exceptions.VersionMismatchError) as caught:
                    shoal.init(one.address)
                gcs.terminate()
                assert gcs.wait(timeout=30) == 0
        assert "999" in str(caught.value)
        assert f"protocol {PROTOCOL_VERSION}" in str(caught.value)

    def test_auto_without_a_cluster_says_what_to_do(self, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
        clean.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        with pytest.raises(exceptions.ClusterUnreachableError, match="shoal up"):
            shoal.init("auto")

    def test_a_new_cluster_cannot_be_described_where_one_is_joined(self, clean: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="num_cpus"):
            shoal.init("nats://127.0.0.1:1", num_cpus=2)


class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()


def iter_of_nothing() -> Iterator[int]:
    yield from ()


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("what it says")
        self.lock = threading.Lock()


class Fatal(BaseException):
    pass


@shoal.remote
def length(value: Any) -> int:
    return len(value)


@shoal.remote
def repeat(byte: bytes, times: int) -> bytes:
    return byte * times


@shoal.remote(max_retries=0)
def call(function: Callable[[], Any]) -> Any:
    return function()


class Caller:
    def call(self, function: Callable[[], Any]) -> Any:
        return function()


def forking(last_act: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that forks, and returns the exit status of the child; that acts and then comes back, too."""

    def fork() -> Any:
        pid = os.fork()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else last_act()

    return fork


@pytest.mark.usefixtures("two_cpus")
class TestCalling:
    @pytest.mark.parametrize(
        ("value", "culprit"),
        [
            (threading.Lock(), "lock"),
            ([{"deep": threading.Lock()}], "lock"),
            (Locked(), "lock"),
            (iter_of_nothing(), "generator"),
        ],
    )
    def test_an_argument_that_cannot_be_pickled_is_named_at_the_call(self, value: Any, culprit: str) -> None:
        with pytest.raises(TypeError, match=culprit):
            length.remote(value)
        with pytest.raises(TypeError, match=culprit):
            length.remote(value=value)
        with pytest.raises(TypeError, match=culprit):
            shoal.put(value)

    def test_a_function_that_cannot_be_pickled_is_named_at_the_call(self) -> None:
        lock = threading.Lock()

        @shoal.remote
        def holds() -> bool:
            return lock.locked()

        with pytest.raises(TypeError, match=r"The function .*holds(.|\n)*lock"):
            holds.remote()

        class Holds:
            def locked(self) -> bool:
                return lock.locked()

        with pytest.raises(TypeError, match=r"The class .*Holds(.|\n)*inside the class"):
            shoal.remote(Holds).remote()

    def test_large_arguments_travel_and_large_functions_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        assert shoal.get(length.remote(b"x" * 5_000_000), timeout=30) == 5_000_000
        assert shoal.get(length.remote(value=["x" * 5_000_000]), timeout=30) == 1
        captured = os.urandom(20_000_000)

        @shoal.remote
        def large() -> int:
            return len(captured)

        with caplog.at_level("WARNING", "shoal"):
            assert shoal.get(large.remote(), timeout=30) == 20_000_000
        assert "large is 20,000," in caplog.text
        assert "put() that" in caplog.text

    def test_a_function_that_is_too_large_says_what_to_do(self) -> None:
        captured = bytes(100_000_000)

        @shoal.remote
        def huge() -> int:
            return len(captured)

        with pytest.raises(ValueError, match=r"huge(.|\n)*put\(\)"):
            huge.remote()

    def test_many_large_results_travel(self) -> None:
        refs = [repeat.remote(bytes([i]), 3_000_000) for i in range(20)]
        assert [value[0] for value in shoal.get(refs, timeout=30)] == list(range(20))

    def test_arguments_that_do_not_fit_the_function_are_named_at_the_call(self) -> None:
        with pytest.raises(TypeError, match=r"length.*'value'"):
            length.remote()  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"length.*'size'"):
            length.remote("abc", size=3)  # type: ignore[call-overload]


@pytest.mark.usefixtures("two_cpus")
class TestTasksThatMisbehave:
    @pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), Fatal("all over"), GeneratorExit()])
    def test_what_is_no_exception_is_still_an_error_of_the_task(self, error: BaseException) -> None:
        def misbehave() -> None:
            raise error

        with pytest.raises(exceptions.TaskError) as caught:
            shoal.get(call.remote(misbehave), timeout=30)
        assert type(error).__name__ in str(caught.value)
        assert shoal.get(length.remote("after"), timeout=30) == 5

    @pytest.mark.parametrize(("code", "status"), [("enough", 1), (0, 1), (7, 7)])
    def test_leaving_by_sys_exit_is_a_crash(self, code: str | int, status: int) -> None:
        with pytest.raises(exceptions.WorkerCrashedError, match=f"status {status}"):
            shoal.get(call.options(max_retries=0).remote(lambda: sys.exit(code)), timeout=30)
        assert shoal.get(length.remote("after"), timeout=30) == 5

    def test_leaving_by_sys_exit_without_output_is_a_crash_too(self) -> None:
        def leave() -> None:
            sys.stdout.close()
            sys.stderr.close()
            sys.exit(7)

        with pytest.raises(exceptions.WorkerCrashedError, match="status 7"):
            shoal.get(call.options(max_retries=0).remote(leave), timeout=30)

    def test_a_task_that_leaves_by_sys_exit_is_tried_again_and_takes_no_other_with_it(self, tmp_path: Path) -> None:
        def leave_twice() -> str:
            with open(tmp_path / "runs", "a") as runs:
                runs.write("x")
            if (tmp_path / "runs").stat().st_size < 3:
                sys.exit(1)
            return "third time"

        lengths = [length.remote("x" * size) for size in range(50)]
        assert shoal.get(call.options(max_retries=2).remote(leave_twice), timeout=30) == "third time"
        lengths += [length.remote("x" * size) for size in range(50)]
        assert shoal.get(lengths, timeout=30) == [*range(50), *range(50)]

    def test_a_result_that_cannot_be_pickled_is_an_error_that_names_it(self) -> None:
        with pytest.raises(TypeError, match=r"lock(.|\n)*What call\(\) returned cannot be pickled: a lock"):
            shoal.get(call.remote(threading.Lock), timeout=30)
        with pytest.raises(exceptions.TaskError, match="lock"):
            shoal.get(call.remote(Locked), timeout=30)

    def test_an_exception_that_cannot_be_pickled_comes_with_its_text(self) -> None:
        def misbehave() -> None:
            raise Unpicklable

        with pytest.raises(exceptions.TaskError, match="what it says") as caught:
            shoal.get(call.remote(misbehave), timeout=30)
        assert "Unpicklable" in str(caught.value)
        assert isinstance(caught.value.cause, exceptions.UnserializableException)

    def test_an_exception_group_comes_whole(self) -> None:
        def misbehave() -> None:
            raise ExceptionGroup("both", [ValueError("one"), KeyError("two")])

        with pytest.raises(exceptions.TaskError) as caught:
            shoal.get(call.remote(misbehave), timeout=30)
        cause = caught.value.cause
        assert isinstance(cause, ExceptionGroup)
        assert [type(one) for one in cause.exceptions] == [ValueError, KeyError]

    def test_an_error_while_unpickling_an_argument_is_an_error_of_the_task(self) -> None:
        class Poisoned:
            def __reduce__(self) -> tuple[Any, ...]:
                return eval, ("1 / 0",)

        with pytest.raises(ZeroDivisionError):
            shoal.get(length.remote(Poisoned()), timeout=30)

    @pytest.mark.parametrize("descriptors", [False, True])
    def test_a_task_may_close_its_output(self, descriptors: bool) -> None:
        @shoal.remote(max_calls=1, max_retries=0)  # the process ends with the task: its output stays closed
        def misbehave() -> int:
            print("still here")
            if descriptors:
                os.close(1)
                os.close(2)
            else:
                sys.stdout.close()
                sys.stderr.close()
            return os.getpid()

        pids = shoal.get([misbehave.remote() for _ in range(3)], timeout=30)
        assert len(set(pids)) == 3
        assert shoal.get([length.remote("abc") for _ in range(100)], timeout=30) == [3] * 100

    def test_a_task_may_fork(self) -> None:
        def misbehave() -> tuple[int, int]:
            pid = os.fork()
            if pid == 0:
                os._exit(7)
            return pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        pid, status = shoal.get(call.remote(misbehave), timeout=30)
        assert pid > 0
        assert status == 7
        assert shoal.get(length.remote("after"), timeout=30) == 5

    @pytest.mark.parametrize(
        ("last_act", "status"),
        [
            (lambda: None, 0),
            (lambda: bytes(10_000_000), 0),
            (lambda: 1 / 0, 1),
            (sys.exit, 0),
            (lambda: sys.exit(7), 7),
            (lambda: shoal.get(length.remote("abc")), 1),
        ],
    )
    def test_a_process_that_a_task_forked_ends_where_it_comes_back(
        self, last_act: Callable[[], Any], status: int
    ) -> None:
        assert shoal.get(call.remote(forking(last_act)), timeout=30) == status
        assert shoal.get(length.remote("after"), timeout=30) == 5

    @pytest.mark.parametrize(("last_act", "status"), [(lambda: None, 0), (lambda: 1 / 0, 1)])
    def test_a_process_that_an_actor_forked_ends_where_it_comes_back(
        self, last_act: Callable[[], Any], status: int
    ) -> None:
        caller: Any = shoal.remote(Caller).remote()
        assert shoal.get(caller.call.remote(forking(last_act)), timeout=30) == status
        assert shoal.get(caller.call.remote(os.getpid), timeout=30) > 0

    def test_a_process_that_a_task_forked_does_not_outlive_the_worker(self) -> None:
        def misbehave() -> tuple[int, int]:
            worker, pid = os.getpid(), os.fork()
            while pid == 0:
                signal.pause()
            return worker, pid

        worker, pid = shoal.get(call.remote(misbehave), timeout=30)
        child = psutil.Process(pid)
        os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 30
        with contextlib.suppress(psutil.NoSuchProcess):
            while child.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline, "the child lives on"
                time.sleep(0.01)

    def test_a_task_may_run_a_program(self) -> None:
        def misbehave() -> str:
            return subprocess.run(["echo", "hello"], capture_output=True, text=True, check=True).stdout

        assert shoal.get(call.remote(misbehave), timeout=30) == "hello\n"


PRINTING = """
import logging, sys, shoal

@shoal.remote
def speak() -> None:
    print("to stdout, with ümlauts")
    print("to stderr", file=sys.stderr)
    logging.getLogger("mine").warning("to the log")
    print("in two ", end="")
    print("parts")

@shoal.remote(name="loud")
def shout(size: int) -> None:
    print("x" * size)
    print("last")

with shoal.init(num_cpus=1):
    shoal.get(speak.remote())
    shoal.get(shout.remote(300_000))
    sys.stdin.read()
"""


def test_what_tasks_print_comes_to_the_driver_with_its_origin() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINTING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        lines = [driver.stdout.readline()]
        while not lines[-1].endswith("last\n"):
            assert driver.poll() is None
            lines.append(driver.stdout.readline())
        rest, errors = driver.communicate(timeout=30)
        assert driver.returncode == 0
    assert rest == ""
    patterns = [r"\(speak pid=\d+ node=[0-9a-f]+\) (.*)\n"] * 2 + [r"\(loud pid=\d+ node=[0-9a-f]+\) (.*)\n"] * len(
        lines[2:]
    )
    found = [re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True)]
    texts = [match[1] for match in found if match is not None]
    assert len(texts) == len(lines), [line[:200] for line in lines]
    assert texts[:2] == ["to stdout, with ümlauts", "in two parts"]
    assert "".join(texts[2:-1]) == "x" * 300_000
    assert texts[-1] == "last"
    assert re.search(r"\(speak pid=\d+ node=[0-9a-f]+\) to stderr\n", errors)
    assert re.search(r"\(speak pid=\d+ node=[0-9a-f]+\) WARNING mine: to the log\n", errors)
