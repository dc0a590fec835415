"""What tests of every package share: virtual time, a seeded bad network, builders of records.

Ships with ``shoal_core`` so that tests of all six packages import it like any other code; nothing else imports it.
"""

from __future__ import annotations

from shoal_core.testing.clock import NothingWillHappenError, VirtualClock, VirtualTimeLoop, run_virtual
from shoal_core.testing.network import BadNetwork, Fate

__all__ = ["BadNetwork", "Fate", "NothingWillHappenError", "VirtualClock", "VirtualTimeLoop", "run_virtual"]
