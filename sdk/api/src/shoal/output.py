"""What worker processes print, as the driver shows it: each line with ``(name pid=… node=…)`` in front."""

from __future__ import annotations

import sys
from typing import TextIO

from shoal_core.protocol.messages import LogLines


class WorkerOutput:
    """Prints lines of workers to this process's own streams, coloured where that is a terminal."""

    def show(self, lines: LogLines) -> None:
        """Print a batch of lines of one worker."""
        stream: TextIO = sys.stderr if lines.stream == "stderr" else sys.stdout
        name = f"{lines.name} " if lines.name else ""
        prefix = f"({name}pid={lines.pid} node={lines.node_id[:8]})"
        if stream.isatty():
            prefix = f"\033[36m{prefix}\033[0m"
        stream.write("".join(f"{prefix} {line}\n" for line in lines.lines))
        stream.flush()
