"""The private folder of an embedded broker: gone when its owner leaves, also when the owner could not tidy up.

A folder belongs to whoever holds the lock on the file ``lock`` in it. The kernel drops the lock when its holder dies,
so whoever starts a broker can tell what dead ones left behind, and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "shoal-broker-"


@contextmanager
def private_directory() -> Iterator[Path]:
    """Make a folder that only this user can read; leaving removes it with all that is in it."""
    sweep()
    directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    with open(directory / "lock.new", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, directory / "lock")  # only now is it seen, and it is locked already
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def sweep() -> None:
    """Remove the folders whose owners are dead."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # A folder without its lock file is being made at this moment, and another user's is none of our business.
        with contextlib.suppress(OSError):
            if directory.stat().st_uid == os.getuid():
                with open(directory / "lock", "r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory, ignore_errors=True)
