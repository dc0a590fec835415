"""``python -m shoal_gcs``: run one replica of the control store."""

from __future__ import annotations

import sys

from shoal_core.service.main import run
from shoal_gcs.service import SERVICE

if __name__ == "__main__":
    sys.exit(run(SERVICE))
