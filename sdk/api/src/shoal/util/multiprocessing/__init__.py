"""``multiprocessing`` with a pool whose processes are actors, on all nodes of the cluster.

``from shoal.util.multiprocessing import Pool`` in place of ``from multiprocessing import Pool``. Everything else of
``multiprocessing`` is there under its own name, and is what it always was: of this machine.
"""

import multiprocessing
from multiprocessing import TimeoutError
from typing import Any

from shoal.util.multiprocessing.pool import Pool

__all__ = ["Pool", "TimeoutError"]
__all__ += [name for name in multiprocessing.__all__ if name not in __all__]


def __getattr__(name: str) -> Any:
    return getattr(multiprocessing, name)
