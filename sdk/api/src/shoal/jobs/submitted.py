"""What a driver has of the submitted job that it runs in: its metadata and its runtime environment.

The supervisor writes it to a file, which a variable names in the environment of the program.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal_core.protocol.errors import ClusterUnreachableError
from shoal_core.protocol.ids import JobId
from shoal_core.runtime.environments import Fields

VARIABLE = "SHOAL_SUBMISSION"
SUBMISSION_ID = "job_submission_id"
"""The entry in a job's metadata that says of which submitted job it is a part; Ray's name for it."""
SUPERVISORS = "shoal.submissions"
"""The namespace of supervisors."""


@dataclass(frozen=True)
class Submitted:
    """The submitted job: its cluster's address, the job that has its packages, and what was said with it."""

    address: str
    job_id: JobId
    metadata: dict[str, str]
    environment: Fields

    def to_file(self, path: Path) -> None:
        """Write it down."""
        path.write_text(json.dumps(asdict(self)))


def submitted(address: str | None, variables: Mapping[str, str] = os.environ) -> Submitted | None:
    """Return the submitted job that this process is a part of, if ``init`` with this address joins its cluster.

    Raises ``ClusterUnreachableError`` where that job has ended, and nothing says which other cluster is meant.
    """
    path = variables.get(VARIABLE)
    if not path:
        return None
    is_open = address in (None, "", "auto")
    try:
        fields: dict[str, Any] = json.loads(Path(path).read_text())
    except FileNotFoundError:
        if not is_open:
            return None
        raise ClusterUnreachableError(
            "This process was started in a submitted job that has ended since, and its way into the cluster with it. "
            "Say which cluster it is to join: init(address=...)."
        ) from None
    found = Submitted(**fields)
    return found if is_open or address == found.address else None
