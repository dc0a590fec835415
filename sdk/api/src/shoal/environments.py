"""Runtime environments on their way to worker processes: packed where they are given, stored once in each job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.packages import pack_folder, pack_module
from shoal.runtime_env.runtime_env import checked, restored
from shoal_core.protocol.errors import BusError, RequestRefusedError, RuntimeEnvSetupError, ServiceError
from shoal_core.protocol.ids import FunctionId, JobId
from shoal_core.runtime.environments import (
    HOOK,
    PACKAGE,
    Fields,
    encoded,
    merged,
    package_name,
    parts_of,
)
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.tasks.functions import Definition, Exported, export


@dataclass(frozen=True)
class Packed:
    """An environment in which everything can travel, and what of it was packed here."""

    fields: Fields
    exports: Sequence[Exported] = ()


def pack(given: Mapping[str, Any] | None) -> Packed:
    """Pack what a ``runtime_env`` names on this machine.

    Raises as ``RuntimeEnv`` does for what is wrong, and ``RuntimeEnvSetupError`` for what cannot be packed.
    """
    fields: Fields = dict(checked(given)) if given is not None else {}
    excludes = fields.pop("excludes", [])
    exports: list[Exported] = []

    def packed(part: Exported) -> FunctionId:
        exports.append(part)
        return part.function_id

    if (folder := fields.get("working_dir")) and not PACKAGE.fullmatch(folder):
        fields["working_dir"] = package_name(packed(pack_folder(folder, excludes)))
    if "py_modules" in fields:
        fields["py_modules"] = [
            item
            if isinstance(item, str) and PACKAGE.fullmatch(item)
            else package_name(packed(pack_module(item, excludes)))
            for item in fields["py_modules"]
        ]
    hook = fields.get("worker_process_setup_hook")
    if callable(hook):
        fields["worker_process_setup_hook"] = HOOK + packed(export(Definition(hook)))
    return Packed(fields, exports)


def environment_of(current: Runtime, job: JobId, packed: Packed) -> str:
    """Return the digest of this process's environment with ``packed`` merged in; it is stored in ``job`` then."""
    fields = merged(current.environment, packed.fields)
    own = encoded(fields)
    if own is None:
        return ""
    if not current.functions.is_uploaded(job, own.function_id):
        store_parts(current, job, fields, [*packed.exports, own])
    return own.function_id


def store_parts(current: Runtime, job: JobId, fields: Fields, exports: Sequence[Exported]) -> None:
    """Store all that an environment refers to in a job; what was not packed here, this process's job has.

    Raises ``RuntimeEnvSetupError`` where the control store does not take or have it.
    """
    try:
        for part in exports:
            current.export(job, part)
        for name in parts_of(fields):
            if job != current.job and not current.functions.is_uploaded(job, name):
                current.call(current.functions.copy(name, current.job, job))
    except (BusError, RequestRefusedError, ServiceError) as error:
        raise RuntimeEnvSetupError(f"The runtime environment could not be stored in job {job}: {error}") from error


def take_parts(current: Runtime, job: JobId, packed: Packed) -> None:
    """Store in this process's job what its environment refers to and another job has.

    Raises ``RuntimeEnvSetupError`` where the control store does not take or have it.
    """
    packed_here = {part.function_id for part in packed.exports}
    try:
        for name in set(parts_of(packed.fields)) - packed_here:
            current.call(current.functions.copy(name, job, current.job))
    except (BusError, RequestRefusedError, ServiceError) as error:
        raise RuntimeEnvSetupError(f"The runtime environment could not be taken from job {job}: {error}") from error


def travelling(options: dict[str, Any]) -> dict[str, Any]:
    """Return options for another process to read: what a ``runtime_env`` names on this machine is stored in the job."""
    packed = pack(options.get("runtime_env"))
    current = Runtime.current
    if not packed.exports or current is None:
        return options
    store_parts(current, current.job, packed.fields, packed.exports)
    return {**options, "runtime_env": restored(packed.fields)}
