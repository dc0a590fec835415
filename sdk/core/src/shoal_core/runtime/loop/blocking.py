"""A warning where user code blocks a thread on which an event loop runs, once for each line that does."""

from __future__ import annotations

import asyncio
import linecache
import sys
import warnings
from types import FrameType

_OURS = ("shoal.", "shoal_core.")


def warn_if_a_loop_runs() -> None:
    """Name the line of user code that is about to hold up the event loop of this thread, if there is one."""
    if asyncio._get_running_loop() is None or "ipykernel" in sys.modules:  # in a notebook every cell runs on a loop
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(_OURS):
        frame = frame.f_back
    if frame is None:
        return
    name, number = frame.f_code.co_filename, frame.f_lineno
    line = linecache.getline(name, number, frame.f_globals).strip()
    warnings.warn_explicit(
        f"this call waits while an event loop runs on its thread, and holds up everything else that runs there"
        f"{f': {line}' if line else ''}. Write `await ref` or `await asyncio.gather(*refs)` for get, `async for` for "
        "next of a generator, and `await asyncio.wait(...)` for wait.",
        RuntimeWarning,
        name,
        number,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
