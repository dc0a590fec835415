"""``RayBackend``: joblib's calls, made by a pool of actors."""

from __future__ import annotations

from typing import Any

from joblib._parallel_backends import FallbackToBackend, SequentialBackend
from joblib.parallel import ParallelBackendBase

from shoal.state import cluster_resources
from shoal.util.multiprocessing import Pool
from shoal.util.multiprocessing.results import AsyncResult


class RayBackend(ParallelBackendBase):  # type: ignore[misc]
    """A backend of joblib. ``n_jobs=-1`` means all CPUs of the cluster, -2 all but one, and so on.

    ``ray_remote_args`` are options of the actors.
    """

    supports_retrieve_callback = True
    supports_sharedmem = False
    uses_threads = False

    def __init__(self, *args: Any, ray_remote_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._remote_args = ray_remote_args
        self._pool: Pool | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many actors a number of jobs means; ``ValueError`` for 0."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        return max(1, int(cluster_resources().get("CPU", 1)) + 1 + n_jobs)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Make the pool, and return how many actors it has; one job runs in this process."""
        count = self.effective_n_jobs(n_jobs)
        if count == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self._pool = Pool(count, ray_remote_args=self._remote_args)
        self.parallel = parallel
        return count

    def submit(self, func: Any, callback: Any = None) -> AsyncResult:
        """Have a batch run in the pool; the callback gets its results, or the error."""
        assert self._pool is not None
        return self._pool.apply_async(func, callback=callback, error_callback=callback)

    def retrieve_result_callback(self, out: Any) -> Any:
        """Return what a callback got, or raise it."""
        if isinstance(out, BaseException):
            raise out
        return out

    def terminate(self) -> None:
        """End the pool."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End the pool with all that it does, and make another one where more is to follow."""
        self.terminate()
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)
