"""Functions travel once per job: the driver exports the pickle, workers fetch it at first use and keep it.

A function's id is the digest of its pickle, so that exporting twice costs nothing, and any process of the
job may export.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.ids import FunctionId, JobId
from shoal_core.protocol.messages import FunctionPart, GetFunctionPart, PutFunctionPart
from shoal_core.protocol.subjects import Subjects
from shoal_core.runtime.data.serialization import dumps

PART_BYTES = 512 * 1024
MOST_BYTES = 95 * 1024 * 1024
LARGE_BYTES = 10 * 1024 * 1024
REQUEST_SECONDS = 30.0

logger = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True)
class Exported:
    """A function as bytes, the digest that names it, and its name for people ("": it is none)."""

    function_id: FunctionId
    data: bytes
    name: str = ""


@dataclass(frozen=True, slots=True)
class Definition:
    """What a worker needs to know of a function beside its code."""

    function: Callable[..., Any]
    max_calls: int = 0


def export(definition: Definition) -> Exported:
    """Pickle a function; ``TypeError`` that names what cannot be pickled, ``ValueError`` where it is too large."""
    kind = "class" if isinstance(definition.function, type) else "function"
    name = f"{kind} {getattr(definition.function, '__qualname__', repr(definition.function))}"
    try:
        data = dumps((definition.function, definition.max_calls))
    except (TypeError, pickle.PicklingError, AttributeError, RuntimeError) as error:
        raise TypeError(
            f"The {name} cannot be sent to a worker, because something it refers to cannot be pickled: {error}. Create "
            f"that object inside the {kind}, or pass it as an argument that can be pickled."
        ) from error
    if len(data) > MOST_BYTES:
        raise ValueError(
            f"The {name} is {len(data):,} bytes when pickled; at most {MOST_BYTES:,} are sent. It probably captures a "
            "large object: put() that and pass the reference as an argument."
        )
    if len(data) > LARGE_BYTES:
        logger.warning(
            "The %s is %s bytes when pickled, which each of its worker processes fetches. It probably captures a large "
            "object: put() that and pass the reference as an argument.",
            name,
            f"{len(data):,}",
        )
    return Exported(digest(data), data, getattr(definition.function, "__name__", ""))


def digest(data: bytes) -> FunctionId:
    """Return what names bytes that are stored by their contents."""
    return FunctionId(hashlib.blake2b(data, digest_size=16).hexdigest())


class FunctionStore:
    """The functions of one job, as this process knows them."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects
        self._uploaded: dict[tuple[JobId, FunctionId], str] = {}
        self._loaded: dict[tuple[JobId, FunctionId], Definition] = {}
        self._lock = threading.Lock()

    def known(self, job: JobId, function_id: FunctionId) -> Definition | None:
        """Return a function that was loaded before (any thread)."""
        return self._loaded.get((job, function_id))

    def name_of(self, job: JobId, function_id: FunctionId) -> str:
        """Return the name of a function that this process has loaded or exported; "" for another."""
        if (known := self.known(job, function_id)) is not None:
            return getattr(known.function, "__name__", "")
        return self._uploaded.get((job, function_id), "")

    def is_uploaded(self, job: JobId, function_id: FunctionId) -> bool:
        """Tell whether this process has exported the function already (any thread)."""
        return (job, function_id) in self._uploaded

    async def upload(self, job: JobId, exported: Exported) -> None:
        """Store a function in the control store."""
        parts = max(1, -(-len(exported.data) // PART_BYTES))
        for part in range(parts):
            message = PutFunctionPart(
                job_id=job,
                function_id=exported.function_id,
                part=part,
                parts=parts,
                data=exported.data[part * PART_BYTES : (part + 1) * PART_BYTES],
            )
            await ask(self._bus, self._subjects.gcs("put_function"), message, timeout_seconds=REQUEST_SECONDS)
        self._uploaded[job, exported.function_id] = exported.name

    async def download(self, job: JobId, function_id: FunctionId) -> bytes:
        """Fetch a function's pickle from the control store."""
        data, part, parts = bytearray(), 0, 1
        while part < parts:
            request = GetFunctionPart(job_id=job, function_id=function_id, part=part)
            answer = await ask(self._bus, self._subjects.gcs("get_function"), request, timeout_seconds=REQUEST_SECONDS)
            assert isinstance(answer, FunctionPart)
            data += answer.data
            parts = answer.parts
            part += 1
        return bytes(data)

    async def copy(self, function_id: FunctionId, source: JobId, target: JobId) -> None:
        """Store what one job has for another job as well."""
        await self.upload(target, Exported(function_id, await self.download(source, function_id)))

    def load(self, job: JobId, function_id: FunctionId, data: bytes) -> Definition:
        """Unpickle a fetched function, once (user threads only: this runs user code)."""
        with self._lock:
            known = self._loaded.get((job, function_id))
            if known is None:
                function, max_calls = pickle.loads(data)
                known = self._loaded[(job, function_id)] = Definition(function, max_calls)
            return known
