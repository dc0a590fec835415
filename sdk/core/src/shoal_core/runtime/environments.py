"""Runtime environments: what a worker process has beside its job's, and how it comes by that.

An environment is a dictionary of Ray's keys, in which everything can travel: variables are texts, a folder is the name
of a *package* (a zip file), and a hook that is a function the name of its pickle. Packages, pickles and the dictionary
itself (as JSON) are named by their digests, stored in the control store like a job's functions, and go with the job.

A process serves one environment in its life: that of its first lease, named in it by digest. Every task and actor names
the whole environment that it wants, in which that of the process that submits it is merged. So children have their
parent's, and the job's environment is simply that of its driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_core.protocol.errors import RuntimeEnvSetupError
from shoal_core.protocol.ids import FunctionId, JobId
from shoal_core.runtime.data.failures import said
from shoal_core.runtime.tasks.functions import PART_BYTES, Exported, digest

if TYPE_CHECKING:
    from shoal_core.runtime.runtime import Runtime

Fields = dict[str, Any]
"""An environment as it travels: JSON values only."""

PACKAGE = re.compile(r"gcs://([0-9a-f]{32})\.zip")
"""The name of a package; the digits are its digest."""
HOOK = "function:"
"""What the name of a pickled hook begins with; other hooks are names of functions in modules."""
SETUP_SECONDS = 600.0
MOST_TEXT_BYTES = PART_BYTES
MOST_SHOWN_BYTES = 4096
_LEFT_OUT = re.compile(r"\$\{[A-Za-z0-9_]+\}")


def package_name(package: FunctionId) -> str:
    """Return what a package is called in an environment."""
    return f"gcs://{package}.zip"


def merged(parent: Mapping[str, Any], child: Mapping[str, Any]) -> Fields:
    """Return a child's environment within its parent's: variables are added to each other, other keys are replaced."""
    fields = {**parent, **child}
    if "env_vars" in parent and "env_vars" in child:
        fields["env_vars"] = {**parent["env_vars"], **child["env_vars"]}
    return fields


def encoded(fields: Fields) -> Exported | None:
    """Return an environment as it is stored, None for the empty one; ``ValueError`` where it is too large."""
    if not fields:
        return None
    data = to_text(fields).encode()
    if len(data) > MOST_TEXT_BYTES:
        raise ValueError(f"The runtime_env has {len(data):,} bytes as JSON; at most {MOST_TEXT_BYTES:,} are kept.")
    return Exported(digest(data), data)


def to_text(fields: Fields) -> str:
    """Return an environment as JSON, the same for equal ones."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def shown(fields: Fields) -> str:
    """Return an environment as JSON for a job's record; where that is long, the names of its keys alone."""
    text = to_text(fields)
    return text if len(text) <= MOST_SHOWN_BYTES else to_text(dict.fromkeys(fields, "(long)"))


def parts_of(fields: Fields) -> list[FunctionId]:
    """Return the digests of all that an environment refers to."""
    packages = [PACKAGE.fullmatch(name) for name in [fields.get("working_dir", ""), *fields.get("py_modules", ())]]
    parts = [FunctionId(match[1]) for match in packages if match]
    hook = fields.get("worker_process_setup_hook", "")
    return [*parts, FunctionId(hook.removeprefix(HOOK))] if hook.startswith(HOOK) else parts


# ------------------------------------------------------------------------------------ in a worker process


def set_up(runtime: Runtime, job: JobId, environment: str, folder: Path) -> None:
    """Make this process one of an environment, "" being none (main thread, before any user code).

    Packages are unpacked in ``folder``, once for all processes of the node. Raises ``RuntimeEnvSetupError``.
    """
    if not environment:
        return
    doing = "its description could not be read"
    try:
        fields = runtime.environment = json.loads(_fetch(runtime, job, FunctionId(environment), SETUP_SECONDS))
        seconds = fields.get("config", {}).get("setup_timeout_seconds", SETUP_SECONDS)
        doing = "a variable of env_vars could not be set"
        set_variables(fields.get("env_vars", {}))
        for key in ("py_modules", "working_dir"):
            doing = f"{key} could not be unpacked"
            names = fields.get(key, [])
            for name in reversed([names] if isinstance(names, str) else names):
                path = str(_unpacked(runtime, job, name, folder, seconds if seconds > 0 else None))
                sys.path.insert(0, path)
                if key == "working_dir":
                    os.chdir(path)
        importlib.invalidate_caches()
        doing = "worker_process_setup_hook failed"
        if hook := fields.get("worker_process_setup_hook"):
            _call_hook(runtime, hook)
    except Exception as error:
        raise RuntimeEnvSetupError(
            f"The runtime environment could not be set up on node {runtime.node}: {doing}: {said(error)}"
        ) from error


def set_variables(variables: Mapping[str, str]) -> None:
    """Set variables of this process; ``${NAME}`` stands for what NAME has been so far, nothing where it was not set."""
    for name, value in variables.items():
        os.environ[name] = _LEFT_OUT.sub("", os.path.expandvars(value))
    if "PYTHONPATH" in variables:  # the interpreter looked at it long ago
        sys.path[:0] = [entry for entry in os.environ["PYTHONPATH"].split(os.pathsep) if entry not in sys.path]


def _fetch(runtime: Runtime, job: JobId, part: FunctionId, seconds: float | None) -> bytes:
    async def fetch() -> bytes:
        async with asyncio.timeout(seconds):
            return await runtime.functions.download(job, part)

    return runtime.call(fetch())


def _call_hook(runtime: Runtime, hook: str) -> None:
    if hook.startswith(HOOK):
        runtime.function(FunctionId(hook.removeprefix(HOOK))).function()
        return
    module, _, name = hook.rpartition(".")
    getattr(importlib.import_module(module), name)()


def _unpacked(runtime: Runtime, job: JobId, name: str, folder: Path, seconds: float | None) -> Path:
    """Return where a package lies unpacked on this node."""
    match = PACKAGE.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no package")
    place = folder / job / match[1]
    with _alone(place.with_suffix(".lock")):
        if not place.is_dir():
            unpack(_fetch(runtime, job, FunctionId(match[1]), seconds), place)
    return place


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is between these lines with the same file."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def unpack(data: bytes, place: Path) -> None:
    """Unpack a zip file into a folder that is not there yet: it appears when it is whole."""
    new = place.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            path = archive.extract(entry, new)
            mode = entry.external_attr >> 16 & 0o777
            if mode and not entry.is_dir():
                os.chmod(path, mode | 0o600)
    new.mkdir(exist_ok=True)
    os.rename(new, place)
