"""What worker processes print, as their node keeps it: found by whose it is, and there when they are dead."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import shoal
from shoal import cli
from shoal.cluster import running_at
from shoal.exceptions import ShoalError
from shoal.job_submission import JobSubmissionClient
from shoal.session import runtime
from shoal.util.state import StateUnavailableError, get_log, list_logs
from tests.integration.waiting import get, until

pytestmark = pytest.mark.usefixtures("two_cpus")


@shoal.remote
def say(*words: str, to: str = "stdout") -> int:
    print(*words, file=getattr(sys, to))
    return os.getpid()


class SpeakerClass:
    def say(self, words: str) -> int:
        print(words)
        return os.getpid()

    def die(self, words: str) -> None:
        print(words)
        os.write(1, b"not a whole line")
        os.kill(os.getpid(), signal.SIGKILL)


Speaker = shoal.remote(SpeakerClass)


def node() -> str:
    return str(shoal.get_runtime_context().get_node_id())


def text(**wanted: Any) -> str:
    return "".join(get_log(**wanted))


def command(*words: str) -> str:
    """Return what a command prints to an observer."""
    host = running_at(runtime().address)
    assert host is not None
    target = ["--address", host.address, "--credentials", host.credentials_path]
    done = CliRunner().invoke(cli.app, [*words, *target])
    assert done.exit_code == 0, f"{words}: {done.output} {done.exception!r}"
    return done.stdout


def test_what_a_process_prints_is_found_by_its_pid_and_by_its_name() -> None:
    pid = get(say.remote("one"))
    assert text(node_id=node(), pid=pid).endswith("one\n")
    while get(say.remote("to", "err", to="stderr")) != pid:
        pass
    assert text(node_id=node(), pid=pid, suffix="err").endswith("to err\n")
    found = list_logs(node_id=node(), glob_filter=f"*-{pid}.*")
    [out], [err] = found["worker_out"], found["worker_err"]
    assert text(node_id=node(), filename=err, tail=1) == "to err\n"
    assert text(node_ip=shoal.nodes()[0]["NodeManagerAddress"], filename=out) == text(node_id=node(), pid=pid)
    assert b"".join(get_log(node_id=node(), filename=out, encoding=None)).endswith(b"one\n")
    assert command("logs", out) == text(node_id=node(), pid=pid)
    assert command("logs", "worker", "--pid", str(pid), "--node-id", node(), "--err", "--tail", "1") == "to err\n"
    assert out in command("logs")


def test_the_last_words_of_an_actor_that_was_killed_are_kept() -> None:
    speaker = Speaker.remote()
    actor = speaker._actor_id.hex()
    pid = get(speaker.say.remote("first words"))
    with pytest.raises(ShoalError):
        get(speaker.die.remote("last words"))
    assert text(actor_id=actor, follow=True) == "first words\nlast words\nnot a whole line\n", "and it has an end"
    assert text(actor_id=actor, suffix="err") == ""
    assert text(node_id=node(), pid=pid, tail=2) == "last words\nnot a whole line\n"
    assert command("logs", "actor", "--id", actor, "--follow", "--tail", "2") == "last words\nnot a whole line\n"


def test_of_a_task_there_is_what_it_has_printed_itself() -> None:
    refs = [say.remote("of a task", f"\033[31m{number}\033[0m\nmore") for number in range(10)]
    get([*refs, say.remote("of another")])
    for number, ref in enumerate(refs):
        task = ref.task_id().hex()
        assert text(task_id=task) == f"of a task \033[31m{number}\033[0m\nmore\n"
        assert text(task_id=task, filter_ansi_code=True, tail=2) == f"of a task {number}\nmore\n"
        assert text(task_id=task, suffix="err") == ""
    assert command("logs", "task", "--id", task, "--tail", "1") == text(task_id=task, tail=1) == "more\n"
    with pytest.raises(StateUnavailableError, match="attempt 1 of task"):
        text(task_id=task, attempt_number=1)


def test_the_last_words_of_a_task_whose_process_died_are_found_by_its_id() -> None:
    @shoal.remote(max_retries=1)
    def die() -> None:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)

    ref = die.remote()
    with pytest.raises(ShoalError):
        get(ref)
    for attempt in (0, 1):
        assert text(task_id=ref.task_id().hex(), attempt_number=attempt) == "last words\n"


def test_calls_that_print_by_turns_have_each_its_own_lines() -> None:
    class Singer:
        def __init__(self) -> None:
            print("of no call")
            self.turns = asyncio.Condition()
            self.line = 0

        async def sing(self, voice: int) -> None:
            for line in range(voice, 10, 2):
                async with self.turns:
                    await self.turns.wait_for(lambda line=line: self.line == line)  # type: ignore[misc]
                    print("line", line)
                    self.line += 1
                    self.turns.notify_all()

    singer = shoal.remote(Singer).remote()
    refs = [singer.sing.remote(voice) for voice in range(2)]
    get(refs)
    for voice, ref in enumerate(refs):
        assert text(task_id=ref.task_id().hex()) == "".join(f"line {line}\n" for line in range(voice, 10, 2))
        assert text(task_id=ref.task_id().hex(), tail=2) == f"line {6 + voice}\nline {8 + voice}\n"
    assert text(task_id=singer._actor_id.hex()) == "of no call\n"


def test_who_follows_a_task_sees_all_of_it_until_it_has_ended(tmp_path: Path) -> None:
    @shoal.remote
    def wait_for(path: Path) -> None:
        print("before")
        while not path.exists():
            time.sleep(0.01)
        print("after")

    ref = wait_for.remote(tmp_path / "go")
    read = get_log(task_id=ref.task_id().hex(), follow=True, _interval=0.01)
    assert next(read) == "before\n"
    (tmp_path / "go").touch()
    assert "".join(read) == "after\n"


def test_who_follows_sees_what_is_printed_later() -> None:
    speaker = Speaker.remote()
    get(speaker.say.remote("now"))
    seen: list[str] = []

    def follow() -> None:
        seen.extend(get_log(actor_id=speaker._actor_id.hex(), follow=True, _interval=0.01))

    reader = threading.Thread(target=follow)
    reader.start()
    until(lambda: bool(seen), "it reads")
    get(speaker.say.remote("later"))
    shoal.kill(speaker)
    reader.join(30)
    assert "".join(seen) == "now\nlater\n"


def test_what_a_submitted_job_prints_is_found_by_its_id() -> None:
    job = JobSubmissionClient().submit_job(entrypoint="echo one; echo two")
    assert text(submission_id=job, follow=True) == "one\ntwo\n"
    assert text(submission_id=job, tail=1) == "two\n"
    assert command("logs", "job", "--id", job, "--follow") == "one\ntwo\n"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"filename": "nope.out"}, "keeps no log called 'nope.out'"),
        ({"filename": "../lock"}, "keeps no log called"),
        ({"pid": 1}, "keeps no log of a worker process 1"),
        ({"actor_id": "ab" * 16}, "no actor"),
        ({"task_id": "ab" * 20}, "not known"),
        ({"submission_id": "nope"}, "does not exist"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_so(wanted: dict[str, Any], says: str) -> None:
    where = {"node_id": node()} if wanted.keys() & {"filename", "pid"} else {}
    with pytest.raises(StateUnavailableError, match=says):
        text(**where, **wanted)


def test_an_unknown_node_is_an_error() -> None:
    with pytest.raises(StateUnavailableError, match="There is no node"):
        list_logs(node_id="0" * 16)
    with pytest.raises(ValueError, match="node_id or node_ip"):
        list_logs()
