"""What holds for all tests."""

from __future__ import annotations

import gc
import os

os.environ["COLUMNS"] = "200"  # else lines are broken as it suits the terminal in which the tests run


def pytest_collection_finish() -> None:
    """Have no collection look again at what importing all tests has made: it took longer than most tests."""
    gc.collect()
    gc.freeze()
