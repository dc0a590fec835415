"""How a node comes by its template: forked from a process that has not begun anything, or a new one."""

from __future__ import annotations

import subprocess
import sys

# The parent is a program of its own: a test's process has threads, and descriptors that are none of a template's.
PROGRAM = """
import os, sys, tempfile, threading
import psutil
from shoal_worker.workers.templates import launch, prepare

def describe(launched):
    (child,) = psutil.Process().children()
    launched.socket.setblocking(True)
    assert launched.socket.recv(100) == b'{"warm": true}\\n'
    opened = [os.readlink(f"/proc/{child.pid}/fd/{name}") for name in os.listdir(f"/proc/{child.pid}/fd")]
    assert not any(kept.name in path for path in opened), opened
    print(child.cmdline()[0].strip(), os.getsid(child.pid) == child.pid, os.readlink(f"/proc/{child.pid}/fd/0"))

kept = tempfile.NamedTemporaryFile()  # none of a template's
if sys.argv[1] == "threads":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
prepare()
print(len(psutil.Process().children()))
first = launch()
describe(first)
if sys.argv[1] == "kill":
    first.process.kill()
    print(first.process.wait())
    second = launch()
    describe(second)
    first = second
first.socket.close()
print(first.process.wait())
first.process.kill()
"""


def run(what: str) -> list[str]:
    """Run the program, and return what it says."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


TEMPLATE = "shoal: template True /dev/null"


def test_the_first_template_is_a_copy_of_its_node_and_ends_with_the_socket() -> None:
    assert run("close") == ["1", TEMPLATE, "0"]


def test_another_template_is_a_new_interpreter() -> None:
    assert run("kill") == ["1", TEMPLATE, "-9", TEMPLATE, "0"]


def test_a_process_with_threads_is_not_copied() -> None:
    assert run("threads") == ["0", TEMPLATE, "0"]
