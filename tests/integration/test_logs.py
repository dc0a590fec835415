"""What worker processes print, as their node keeps it: found by whose it is, and there when they are dead."""

from __future__ import annotations

import os
import signal
import sys
import threading
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


def test_a_task_is_found_by_its_process() -> None:
    ref = say.remote("of a task", "\033[31mred\033[0m")
    get(ref)
    task = ref.task_id().hex()
    assert text(task_id=task).endswith("of a task \033[31mred\033[0m\n")
    assert text(task_id=task, filter_ansi_code=True).endswith("of a task red\n")
    assert command("logs", "task", "--id", task, "--tail", "1") == text(task_id=task, tail=1)


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
