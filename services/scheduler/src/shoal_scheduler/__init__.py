"""Shoal's scheduler service."""
