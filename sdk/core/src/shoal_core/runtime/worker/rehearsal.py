"""Starting some times as a worker process does, in the process that those are forked from.

What Python finds out about code that runs again and again (where attributes are, of which types values are) it writes
into the code and the types. Who is forked before that has to find it out, and to copy each page that it writes to; that
is an eighth of what it costs a worker process to start. Who is forked afterwards has it.

So that nobody needs to be there for a rehearsal, it has a broker of its own, which says no more than that it is one.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

from shoal_core.protocol.ids import NO_NODE, new_process_id
from shoal_core.runtime.worker.process import WorkerConfig, session_of

TIMES = 10
"""Python looks closer at code that has run eight times."""
_INFO = {"server_id": "rehearsal", "version": "2.12.0", "proto": 1, "headers": True, "max_payload": 1 << 20}


def rehearse(times: int = TIMES) -> None:
    """Start as a worker process does, and end, so often. No thread is left.

    Raises ``OSError`` or a ``ShoalError`` where this machine does not even let a process talk to itself.
    """
    for _ in range(times):
        with _broker() as address, session_of(_config(address), lambda *_: None):
            pass


def _config(address: str) -> WorkerConfig:
    """Return what a worker process is told, of files that are there everywhere."""
    return WorkerConfig(
        process_id=new_process_id(),
        node_id=NO_NODE,
        cluster="rehearsal",
        address=address,
        credentials={},
        shared_memory_path="/dev/null",
        begun_page="/dev/zero",
        environments_path="/dev/null",
    )


@contextlib.contextmanager
def _broker() -> Iterator[str]:
    """Be a broker for one client, in a thread; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=[listener], name="shoal-rehearsal")
        thread.start()
        try:
            yield f"nats://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # nobody may have come
            thread.join()


def _serve(listener: socket.socket) -> None:
    """Shake hands with the first client, and answer its pings until it leaves."""
    with contextlib.suppress(OSError), listener.accept()[0] as connection, connection.makefile("rb") as lines:
        connection.sendall(f"INFO {json.dumps(_INFO)}\r\n".encode())
        for line in lines:
            if line == b"PING\r\n":
                connection.sendall(b"PONG\r\n")
