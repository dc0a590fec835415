"""Shoal's global control store: nodes, jobs, functions and the internal key-value store, in JetStream."""
