"""Who is left of a worker process that has ended."""

from __future__ import annotations

import os
import subprocess
import time

from shoal_worker.workers import remnants
from shoal_worker.workers.remnants import GRACE_SECONDS, LAST_SECONDS, Remnants


def test_who_is_dead_but_not_reaped_is_not_waited_for() -> None:
    with subprocess.Popen(["true"], start_new_session=True) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        began = time.monotonic()
        remnants.end([child.pid])
        assert time.monotonic() - began < LAST_SECONDS


def test_a_group_without_members_is_nobodys() -> None:
    with subprocess.Popen(["true"], start_new_session=True) as child:
        child.wait()
    left = Remnants()
    left.ended(child.pid, 0.0)
    assert len(left) == 0


def test_a_group_is_forgotten_when_its_time_is_over() -> None:
    with subprocess.Popen(["true"], start_new_session=True) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        left = Remnants()
        left.ended(child.pid, 0.0)
        left.look(GRACE_SECONDS / 2)
        assert len(left) == 1
        left.look(GRACE_SECONDS)
        assert len(left) == 0, "also where nobody reaps orphans"
