"""``python -m shoal_objectstore``: run one replica of the durable tier."""

from __future__ import annotations

import sys

from shoal_core.service.main import run
from shoal_objectstore.service import SERVICE

if __name__ == "__main__":
    sys.exit(run(SERVICE))
