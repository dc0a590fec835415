"""What every process of a Shoal cluster shares: see the floors in ARCHITECTURE.md."""

__version__ = "0.1.0"
