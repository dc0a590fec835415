"""Runtime environments: what the worker processes of a job, a task or an actor are to have beside the cluster's own."""

from shoal.runtime_env.runtime_env import RuntimeEnv, RuntimeEnvConfig

__all__ = ["RuntimeEnv", "RuntimeEnvConfig"]
