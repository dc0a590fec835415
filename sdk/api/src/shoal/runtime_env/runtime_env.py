"""``RuntimeEnv`` and what its keys may hold.

=============================  =====================================================================================
key                            value
=============================  =====================================================================================
``env_vars``                   variables of the processes; ``${NAME}`` in a value is what NAME was there before
``working_dir``                a folder or a zip file: its contents are the folder in which the processes run
``excludes``                   patterns, as in a ``.gitignore``, of what of ``working_dir`` and ``py_modules`` stays
``py_modules``                 folders, files ``*.py``, wheels and imported modules that the processes can import
``worker_process_setup_hook``  a function without parameters, or the name of one, that each process calls at first
``config``                     a ``RuntimeEnvConfig``
=============================  =====================================================================================

What would install something (``pip``, ``conda``, ``uv``, a container) is refused: the processes are forked from the
node's own interpreter, so what they import has to be installed there.
"""

from __future__ import annotations

import json
import os
import types
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from shoal_core.runtime.environments import HOOK, PACKAGE, SETUP_SECONDS

REFUSED = frozenset(
    {"pip", "conda", "uv", "container", "image_uri", "py_executable", "java_jars", "nsight", "rocprof_sys", "mpi"}
)
_NOT_SUPPORTED = (
    "is not supported: worker processes are forked from the node's own interpreter. Install what is needed on the "
    "nodes (or build it into their image), and use 'py_modules' or 'working_dir' for code of your own."
)


class RuntimeEnvConfig(dict[str, Any]):
    """How an environment is set up.

    ``setup_timeout_seconds``: how long a process may take to fetch a package, -1 for any time. ``eager_install`` and
    ``log_files`` are accepted and mean nothing here: nothing is installed.
    """

    def __init__(
        self,
        setup_timeout_seconds: int = int(SETUP_SECONDS),
        eager_install: bool = True,
        log_files: list[str] | None = None,
    ) -> None:
        if isinstance(setup_timeout_seconds, bool) or not isinstance(setup_timeout_seconds, int):
            raise TypeError(f"setup_timeout_seconds must be an int, got {type(setup_timeout_seconds).__name__}.")
        if setup_timeout_seconds < 1 and setup_timeout_seconds != -1:
            raise ValueError(
                f"setup_timeout_seconds must be greater than zero, or -1 for no limit, got {setup_timeout_seconds}."
            )
        if not isinstance(eager_install, bool):
            raise TypeError(f"eager_install must be a bool, got {type(eager_install).__name__}.")
        if log_files is not None and not _are_texts(log_files):
            raise TypeError(f"log_files must be a list of str, got {log_files!r}.")
        super().__init__(setup_timeout_seconds=setup_timeout_seconds, eager_install=eager_install)
        if log_files is not None:
            self["log_files"] = log_files

    @classmethod
    def of(cls, given: Any) -> RuntimeEnvConfig:
        """Return what was given as the key ``config``, checked."""
        if isinstance(given, RuntimeEnvConfig):
            return given
        if not isinstance(given, Mapping):
            raise TypeError(f"runtime_env['config'] must be a dict or a RuntimeEnvConfig, got {type(given).__name__}.")
        unknown = set(given) - {"setup_timeout_seconds", "eager_install", "log_files"}
        if unknown:
            raise ValueError(f"runtime_env['config'] has unknown keys: {sorted(map(str, unknown))}.")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a plain dictionary."""
        return dict(self)


class RuntimeEnv(dict[str, Any]):
    """A runtime environment: a dictionary of the keys above, each checked as it is set.

    Raises ``TypeError`` for a value of a wrong type, ``ValueError`` for one that is impossible, for an unknown key and
    for one that is refused. A key that is None is left out.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        for name, value in fields.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if value is None:
            _known(name)
            self.pop(name, None)
        else:
            super().__setitem__(name, _known(name)(value))

    def set(self, name: str, value: Any) -> None:
        """Set a key; None removes it."""
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        """Return the environment as a plain dictionary."""
        return dict(self)

    def serialize(self) -> str:
        """Return the environment as JSON; ``TypeError`` where it holds modules or functions."""
        return json.dumps(self, sort_keys=True)

    @classmethod
    def deserialize(cls, serialized_runtime_env: str) -> RuntimeEnv:
        """Return the environment that JSON describes."""
        return cls(**json.loads(serialized_runtime_env))

    def env_vars(self) -> dict[str, str]:
        """Return the variables."""
        return dict(self.get("env_vars", {}))

    def has_working_dir(self) -> bool:
        """Tell whether there is a working directory."""
        return "working_dir" in self

    def working_dir(self) -> str | None:
        """Return the working directory, or the name of its package."""
        return self.get("working_dir")

    def py_modules(self) -> list[Any]:
        """Return what is to be importable."""
        return list(self.get("py_modules", ()))

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (dict(self),)


def restored(fields: dict[str, Any]) -> RuntimeEnv:
    """Return an environment that was checked before, perhaps in another process, whose files need not be here."""
    environment = RuntimeEnv()
    dict.update(environment, fields)
    return environment


def checked(given: Any) -> RuntimeEnv:
    """Return what was given as a ``runtime_env``: a dictionary, or an environment that was checked when it was made."""
    if isinstance(given, RuntimeEnv):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"runtime_env must be a dict or a RuntimeEnv, got {type(given).__name__}.")
    return RuntimeEnv(**_named(given))


def check_option(name: str, value: Any) -> None:
    """Check the option ``runtime_env`` of a task or an actor."""
    checked(value)


def _named(given: Mapping[Any, Any]) -> dict[str, Any]:
    for name in given:
        if not isinstance(name, str) or (name not in _CHECKS and name not in REFUSED):
            raise ValueError(f"There is no key {name!r} of a runtime_env; there are {sorted(_CHECKS)}.")
    return dict(given)


def _known(name: str) -> Callable[[Any], Any]:
    if name in REFUSED:
        raise ValueError(f"runtime_env[{name!r}] {_NOT_SUPPORTED}")
    return _CHECKS[_named({name: None}).popitem()[0]]


# ------------------------------------------------------------------------------------ the keys


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _variables(given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise TypeError(f"runtime_env['env_vars'] must be a dict of str to str, got {type(given).__name__}.")
    for name, value in given.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(f"runtime_env['env_vars'] must be a dict of str to str, got {name!r}: {value!r}.")
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"runtime_env['env_vars'] holds what no environment can: {name!r}: {value!r}.")
    return dict(given)


def _folder(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"runtime_env['working_dir'] must be a str, got {type(given).__name__}.")
    if PACKAGE.fullmatch(given) or os.path.isdir(given) or (given.endswith(".zip") and zipfile.is_zipfile(given)):
        return given
    raise ValueError(f"runtime_env['working_dir'] must be an existing folder or zip file, got {given!r}.")


def _modules(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise TypeError(f"runtime_env['py_modules'] must be a list, got {type(given).__name__}.")
    for item in given:
        if isinstance(item, types.ModuleType):
            if not getattr(item, "__file__", None) and not getattr(item, "__path__", None):
                raise ValueError(f"runtime_env['py_modules']: the module {item.__name__} has no files to send.")
        elif not isinstance(item, str):
            raise TypeError(f"runtime_env['py_modules'] must hold paths (str) and modules, got {item!r}.")
        elif not (PACKAGE.fullmatch(item) or os.path.isdir(item) or _is_module_file(item)):
            raise ValueError(
                f"runtime_env['py_modules'] must hold existing folders, .py files and wheels, got {item!r}."
            )
    return list(given)


def _is_module_file(path: str) -> bool:
    return (path.endswith(".py") and os.path.isfile(path)) or (path.endswith(".whl") and zipfile.is_zipfile(path))


def _excludes(given: Any) -> list[str]:
    if not _are_texts(given):
        raise TypeError(f"runtime_env['excludes'] must be a list of str, got {given!r}.")
    return list(given)


def _hook(given: Any) -> Any:
    if not isinstance(given, str) and not callable(given):
        raise TypeError(
            f"runtime_env['worker_process_setup_hook'] must be a function or a str, got {type(given).__name__}."
        )
    if isinstance(given, str) and not given.startswith(HOOK) and "." not in given.strip("."):
        raise ValueError(
            f"runtime_env['worker_process_setup_hook'] must be 'module.function' where it is a str, got {given!r}."
        )
    return given


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "env_vars": _variables,
    "working_dir": _folder,
    "excludes": _excludes,
    "py_modules": _modules,
    "worker_process_setup_hook": _hook,
    "config": RuntimeEnvConfig.of,
}
