"""Distributed Python with Ray Core's programming model, over NATS."""
