"""Shoal's gcs service."""
