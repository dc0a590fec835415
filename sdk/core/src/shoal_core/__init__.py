"""What every process of a Shoal cluster shares: see the floors in ARCHITECTURE.md."""
