"""A template whose workers do what their ``address`` says instead of joining a cluster.

Run with a folder before the arguments of a template; while the file ``no-forks`` lies there, nothing can be forked.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shoal_core.protocol.ids import LeaseId
from shoal_core.runtime.worker.execution import BegunPage
from shoal_core.runtime.worker.process import WorkerConfig
from shoal_worker.workers import template

real_fork = os.fork


def behave(config: WorkerConfig) -> None:
    """Do what a test wants of a worker."""
    what, *arguments = config.address.split()
    if what == "begin":
        BegunPage(Path(config.begun_page)).note(LeaseId(int(arguments[0])), int(arguments[1]))
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(int(arguments[0]))
    elif what == "raise":
        raise RuntimeError("this worker cannot go on")
    elif what == "print":
        print("to output")
        print("to error", file=sys.stderr)
    elif what == "start":
        sleeper = subprocess.Popen(["sleep", "3600"])
        stubborn = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; while :; do sleep 0.1; done"], stdout=-1)
        apart = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        assert stubborn.stdout is not None
        stubborn.stdout.readline()  # it is deaf by now
        (folder / "started").write_text(f"{sleeper.pid} {stubborn.pid} {apart.pid}")
        time.sleep(float(arguments[0]))
    elif what == "descriptors":
        print([descriptor for descriptor in range(5000) if _is_open(descriptor)])
    elif what == "break-output":
        sys.stdout.write("a line that is not whole")
        os.close(1)
    else:
        print("asleep")
        time.sleep(3600)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def fork() -> int:
    """Fork, unless the test forbids it."""
    if (folder / "no-forks").exists():
        raise BlockingIOError(errno.EAGAIN, "no more processes")
    return real_fork()


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    template.main = behave  # type: ignore[attr-defined]
    os.fork = fork
    template.run()
