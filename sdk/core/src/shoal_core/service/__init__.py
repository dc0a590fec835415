"""The one engine under every service, and what each service has beside its core: settings, logs, health, metrics."""

from __future__ import annotations

from shoal_core.service.engine import Core, Engine
from shoal_core.service.metrics import Metrics
from shoal_core.service.routes import Route

__all__ = ["Core", "Engine", "Metrics", "Route"]
