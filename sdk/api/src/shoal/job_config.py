"""``JobConfig``: what a driver says of its job in one object, for ``init(job_config=...)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.runtime_env.runtime_env import RuntimeEnv, checked

NON_DETACHED = "non_detached"
_OF_JSON = frozenset({"runtime_env", "metadata", "ray_namespace", "default_actor_lifetime"})


class JobConfig:
    """The namespace, the runtime environment and the metadata of a job.

    Parameters of ``init`` itself come first. ``metadata`` is a dictionary of texts that ``shoal.util.state.list_jobs``
    shows. Raises ``TypeError`` and ``ValueError`` for what is wrong.
    """

    def __init__(
        self,
        runtime_env: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        ray_namespace: str | None = None,
        default_actor_lifetime: str = NON_DETACHED,
    ) -> None:
        self.runtime_env: RuntimeEnv | None = None
        self.metadata: dict[str, str] = {}
        self.ray_namespace: str | None = None
        self.set_runtime_env(runtime_env)
        for key, value in (metadata or {}).items():
            self.set_metadata(key, value)
        if ray_namespace is not None:
            self.set_ray_namespace(ray_namespace)
        self.set_default_actor_lifetime(default_actor_lifetime)

    @classmethod
    def from_json(cls, job_config_json: Mapping[str, Any]) -> JobConfig:
        """Return what a dictionary says, under the names of the parameters; ``ValueError`` for any other name."""
        if unknown := sorted({*job_config_json} - _OF_JSON):
            raise ValueError(f"A job configuration has no {unknown[0]!r} here; it may have {sorted(_OF_JSON)}.")
        return cls(**job_config_json)

    def set_metadata(self, key: str, value: str) -> None:
        """Add an entry to the metadata."""
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must be a dict of str to str, got {key!r}: {value!r}.")
        self.metadata[key] = value

    def set_runtime_env(self, runtime_env: Mapping[str, Any] | None) -> None:
        """Set the runtime environment, or (None) remove it."""
        self.runtime_env = None if runtime_env is None else checked(runtime_env)

    def set_ray_namespace(self, ray_namespace: str) -> None:
        """Set the namespace."""
        if not isinstance(ray_namespace, str):
            raise TypeError(f"ray_namespace must be a str, got {type(ray_namespace).__name__}.")
        if not ray_namespace:
            raise ValueError("ray_namespace must not be empty; leave it out for an anonymous one.")
        self.ray_namespace = ray_namespace

    def set_default_actor_lifetime(self, default_actor_lifetime: str) -> None:
        """Say how long actors live of which nothing is said; "detached" is not supported: say so of each actor."""
        if default_actor_lifetime == "detached":
            raise ValueError(
                "default_actor_lifetime='detached' is not supported; pass lifetime='detached' to each actor that is to "
                "outlive its creator."
            )
        if default_actor_lifetime != NON_DETACHED:
            raise ValueError(f"default_actor_lifetime must be {NON_DETACHED!r}, got {default_actor_lifetime!r}.")
        self.default_actor_lifetime = default_actor_lifetime


def job_config_of(given: Any) -> JobConfig:
    """Return the parameter ``job_config`` of ``init``, checked."""
    if given is None:
        return JobConfig()
    if not isinstance(given, JobConfig):
        raise TypeError(f"job_config must be a JobConfig, got {type(given).__name__}.")
    return given
