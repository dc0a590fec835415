"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Have no collection look again at what importing all tests has made: it took longer than most tests."""
    gc.collect()
    gc.freeze()
