"""What holds for all tests."""

from __future__ import annotations

import gc
import os

from hypothesis import Phase, settings

# `make test` sees the same histories each time; `--hypothesis-profile=explore` draws others. Neither makes what it has
# found shorter, which takes longer than a test may: `--hypothesis-profile=default --timeout=0` does.
FINDING = (Phase.explicit, Phase.reuse, Phase.generate)
settings.register_profile("same", phases=FINDING, derandomize=True)
settings.register_profile("explore", phases=FINDING, print_blob=True)
settings.load_profile("same")

os.environ["COLUMNS"] = "200"  # else lines are broken as it suits the terminal in which the tests run


def pytest_collection_finish() -> None:
    """Have no collection look again at what importing all tests has made: it took longer than most tests."""
    gc.collect()
    gc.freeze()
