"""The cluster as a backend of joblib, and so of what uses joblib, such as scikit-learn.

::

    from shoal.util.joblib import register_ray

    register_ray()
    with joblib.parallel_backend("ray"):
        search.fit(x, y)
"""

from __future__ import annotations


def register_ray() -> None:
    """Make "ray" (and "shoal") the name of a backend of joblib; ``ImportError`` where joblib is not installed."""
    try:
        from joblib.parallel import register_parallel_backend
    except ImportError as error:
        raise ImportError("To use the cluster as a backend of joblib, install joblib: pip install joblib") from error
    from shoal.util.joblib.ray_backend import RayBackend

    for name in ("ray", "shoal"):
        register_parallel_backend(name, RayBackend)


__all__ = ["register_ray"]
