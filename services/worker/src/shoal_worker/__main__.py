"""``python -m shoal_worker``: run one node."""

from __future__ import annotations

import sys

from shoal_core.service.main import run
from shoal_worker.service import SERVICE

if __name__ == "__main__":
    sys.exit(run(SERVICE))
