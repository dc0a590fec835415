"""Transfers of large objects between nodes, through the broker, in chunks that all who pull an object share.

Start at ``sending`` and ``pulling``, the two ends of the protocol as pure cores; ``mover`` performs what they decide,
in a thread of its own.
"""
