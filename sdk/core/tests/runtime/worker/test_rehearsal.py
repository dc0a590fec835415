"""Rehearsing how a worker process starts: it leaves nothing but what Python has found out."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading

import pytest

from shoal_core.protocol.errors import AuthenticationError
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.worker.rehearsal import rehearse

COUNT_PAGES = """
import gc, os, resource
from shoal_core.runtime.worker.rehearsal import rehearse

def pages_of_a_copy():
    reader, writer = os.pipe()
    gc.collect()
    gc.freeze()  # as a template does: a collection in the copy would touch every page
    if os.fork() == 0:
        rehearse(times=1)
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reader, 100))

first = pages_of_a_copy()
rehearse()
print(first, pages_of_a_copy())
"""


def test_who_is_forked_after_a_rehearsal_needs_fewer_pages_of_its_own() -> None:
    ran = subprocess.run([sys.executable, "-c", COUNT_PAGES], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(int, ran.stdout.split())
    assert after < 0.95 * before


def test_it_leaves_no_thread_no_descriptor_and_no_runtime() -> None:
    gc.collect()  # what tests before left for it, descriptors among it
    threads, descriptors, runtime = threading.enumerate(), os.listdir("/proc/self/fd"), Runtime.current
    rehearse(times=2)
    gc.collect()
    assert (threading.enumerate(), os.listdir("/proc/self/fd"), Runtime.current) == (threads, descriptors, runtime)


def test_a_rehearsal_that_fails_says_why_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(listener: socket.socket) -> None:
        with listener.accept()[0] as connection, connection.makefile("rb") as lines:
            connection.sendall(b'INFO {"server_id": "strict", "auth_required": true, "max_payload": 1}\r\n')
            assert lines.readline().startswith(b"CONNECT")
            connection.sendall(b"-ERR 'Authorization Violation'\r\n")

    threads = threading.enumerate()
    monkeypatch.setattr("shoal_core.runtime.worker.rehearsal._serve", refuse)
    with pytest.raises(AuthenticationError):
        rehearse()
    assert threading.enumerate() == threads
