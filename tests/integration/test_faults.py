"""What dies under load, and what is left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import shoal
from tests.integration.waiting import until


@shoal.remote
def double(x: int) -> int:
    return 2 * x


@shoal.remote
def where() -> int:
    return os.getpid()


def family(name: str) -> list[psutil.Process]:
    """Return the processes below this one whose command line mentions ``name``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.usefixtures("two_cpus")
class TestUnderLoad:
    def test_a_killed_worker_process_costs_no_task(self) -> None:
        victim = shoal.get(where.remote())
        refs = [double.remote(i) for i in range(10_000)]
        os.kill(victim, signal.SIGKILL)
        assert shoal.get(refs, timeout=50) == [2 * i for i in range(10_000)]

    def test_a_killed_broker_costs_no_task(self) -> None:
        shoal.get(double.remote(1))
        refs = [double.remote(i) for i in range(10_000)]
        (broker,) = family("nats-server")
        broker.kill()
        refs += [double.remote(i) for i in range(10_000)]
        assert shoal.get(refs, timeout=50) == 2 * [2 * i for i in range(10_000)]

    def test_a_killed_template_costs_no_task(self) -> None:
        refs = [double.remote(i) for i in range(10_000)]
        (template, *_) = family("shoal: template")
        template.kill()
        assert shoal.get(refs, timeout=50) == [2 * i for i in range(10_000)]


DRIVER = """
import os, signal, sys, time, shoal
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it comes ignored
shoal.init(num_cpus=2)

@shoal.remote
def pid():
    time.sleep(0.05)
    return os.getpid()

print(*set(shoal.get([pid.remote() for _ in range(8)])), flush=True)
refs = [pid.remote() for _ in range(10_000)]
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_driver(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert driver.stdout is not None
    assert driver.stdin is not None
    with driver:
        assert driver.stdout.readline().split()
        below = psutil.Process(driver.pid).children(recursive=True)
        assert len(below) >= 4
        driver.send_signal(number)
        try:
            driver.wait(timeout=30)
        finally:
            driver.kill()
    until(lambda: not any(process.is_running() for process in below), "all processes of the cluster are gone")
