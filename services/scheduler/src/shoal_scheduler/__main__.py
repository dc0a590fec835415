"""``python -m shoal_scheduler``: run one replica of the scheduler."""

from __future__ import annotations

import sys

from shoal_core.service.main import run
from shoal_scheduler.service import SERVICE

if __name__ == "__main__":
    sys.exit(run(SERVICE))
