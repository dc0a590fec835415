"""Waiting: the event loop of a process, which thread runs it, and threads and loops of the user's that wait."""
