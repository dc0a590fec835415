"""What the durable tier holds, as a replica sees it in the manifests that it watches: bytes by job, and which jobs.

The view lags a little behind the stream, so a bound that it enforces may be passed by what is being opened just now.
The bound of the stream itself is hard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal_core.protocol.errors import ObjectStoreFullError
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.storage import DurablePut
from shoal_objectstore.manifests import FOR_EVER, Manifest


@dataclass(frozen=True, slots=True)
class Quotas:
    """How many bytes of objects there may be at most; None: as many as the broker takes."""

    total_bytes: int | None = None
    job_bytes: int | None = None


@dataclass(slots=True)
class Holdings:
    """The objects that are there, sealed or being uploaded."""

    quotas: Quotas = field(default_factory=Quotas)
    total_bytes: int = 0
    bytes_by_job: dict[JobId, int] = field(default_factory=dict)
    _objects: dict[str, tuple[JobId, int]] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)
    _by_job: dict[JobId, set[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._objects)

    def jobs(self) -> Iterator[JobId]:
        """Return the jobs that objects belong to."""
        return (job for job in list(self._by_job) if job)

    def of_job(self, job: JobId) -> list[str]:
        """Return the objects of a job."""
        return sorted(self._by_job.get(job, ()))

    def expired(self, now: float) -> list[str]:
        """Return the objects of which a holder's time is over."""
        return sorted(object_id for object_id, until in self._until.items() if until <= now)

    def changed(self, object_id: str, manifest: Manifest | None) -> None:
        """An object's manifest was seen to change; None: it is gone."""
        known = self._objects.pop(object_id, None)
        self._until.pop(object_id, None)
        if known is not None:
            job, size_bytes = known
            self._count(job, -size_bytes)
            self._by_job[job].discard(object_id)
            if not self._by_job[job]:
                del self._by_job[job], self.bytes_by_job[job]
        if manifest is not None:
            self._objects[object_id] = manifest.job_id, manifest.size_bytes
            self._by_job.setdefault(manifest.job_id, set()).add(object_id)
            self._count(manifest.job_id, manifest.size_bytes)
            ends = [until for until in manifest.holders.values() if until != FOR_EVER]
            if ends:
                self._until[object_id] = min(ends)

    def check_room(self, request: DurablePut) -> None:
        """Refuse an object that would pass a bound; one that is there already passes none."""
        if request.object_id in self._objects:
            return
        total, most = self.total_bytes + request.size_bytes, self.quotas.total_bytes
        if most is not None and total > most:
            raise ObjectStoreFullError(
                f"object {request.object_id} of {request.size_bytes:,} bytes does not fit into the durable tier: "
                f"{self.total_bytes:,} of {most:,} bytes are in use ({self._largest()}). Let go of durable objects, or "
                "give the objectstore service a larger --durable-bytes"
            )
        held, most = self.bytes_by_job.get(request.job_id, 0), self.quotas.job_bytes
        if most is not None and request.job_id and held + request.size_bytes > most:
            raise ObjectStoreFullError(
                f"object {request.object_id} of {request.size_bytes:,} bytes is too much: job {request.job_id} holds "
                f"{held:,} of the {most:,} bytes that a job may have in the durable tier. Let go of durable objects, "
                "or give the objectstore service a larger --durable-bytes-per-job"
            )

    def _largest(self) -> str:
        most = sorted(self.bytes_by_job.items(), key=lambda item: (-item[1], item[0]))[:3]
        return ", ".join(f"job {job or 'none'} holds {size:,}" for job, size in most) or "nobody holds any"

    def _count(self, job: JobId, size_bytes: int) -> None:
        self.total_bytes += size_bytes
        self.bytes_by_job[job] = self.bytes_by_job.get(job, 0) + size_bytes

    def sanity_check(self) -> None:
        """State the invariants."""
        assert self.total_bytes == sum(size for _, size in self._objects.values())
        assert self.total_bytes == sum(self.bytes_by_job.values())
        assert set(self._until) <= set(self._objects)
        assert set(self.bytes_by_job) == set(self._by_job) == {job for job, _ in self._objects.values()}
