"""Shoal's worker service."""
