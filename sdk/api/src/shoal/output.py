"""What worker processes print, as the driver shows it: each line with ``(name pid=… node=…)`` in front."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TextIO

from shoal.repeats import RepeatRules, Repeats
from shoal_core.protocol.messages import LogLines


class WorkerOutput:
    """Prints lines of workers to this process's own streams, coloured where that is a terminal.

    What several print alike it prints as the rules say; without any, all of it.
    """

    def __init__(self, rules: RepeatRules | None = None) -> None:
        self._repeats = None if rules is None else Repeats(rules)
        self._timer: asyncio.TimerHandle | None = None

    def show(self, lines: LogLines) -> None:
        """Print a batch of lines of one worker."""
        if self._repeats is None:
            _print(lines)
            return
        for shown in self._repeats.take(lines, time.monotonic()):
            _print(shown)
        self._wait()

    def close(self) -> None:
        """Print what is left, unless nobody reads it any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._repeats is not None:
            with contextlib.suppress(OSError, ValueError):  # a pipe without an end, or a closed file
                for shown in self._repeats.end():
                    _print(shown)

    def _wait(self) -> None:
        """See to it that what is counted is printed, though nothing else comes."""
        if self._repeats is not None and self._repeats.waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._repeats.window_seconds, self._show_due)

    def _show_due(self) -> None:
        assert self._repeats is not None
        self._timer = None
        for shown in self._repeats.due(time.monotonic()):
            _print(shown)
        self._wait()


def _print(lines: LogLines) -> None:
    stream: TextIO = sys.stderr if lines.stream == "stderr" else sys.stdout
    name = f"{lines.name} " if lines.name else ""
    prefix = f"({name}pid={lines.pid} node={lines.node_id[:8]})"
    if stream.isatty():
        prefix = f"\033[36m{prefix}\033[0m"
    stream.write("".join(f"{prefix} {line}\n" for line in lines.lines))
    stream.flush()
