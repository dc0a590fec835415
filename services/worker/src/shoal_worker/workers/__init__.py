"""The node's worker processes: how they are forked, kept and ended, and what they print."""
