"""Shoal's objectstore service."""
