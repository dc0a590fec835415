"""Actors that add up their gradients, as data-parallel training does. Run: ``python examples/collective.py``."""

# mypy: disable-error-code="attr-defined"
# (mypy does not see what a decorator makes of a class.)

from __future__ import annotations

import numpy

import shoal
from shoal.util import collective


@shoal.remote
class Worker:
    """One rank of the group."""

    def __init__(self, rank: int, size: int) -> None:
        collective.init_collective_group(size, rank, backend="gloo", group_name="workers")
        self.rank = rank

    def step(self) -> list[float]:
        """Return the sum of all workers' gradients."""
        gradient = numpy.full(4, float(self.rank))
        collective.allreduce(gradient, group_name="workers")
        return [float(one) for one in gradient]

    def settings(self) -> list[float]:
        """Return what the first worker has."""
        rates = numpy.array([0.1, 0.01]) if self.rank == 0 else numpy.zeros(2)
        collective.broadcast(rates, src_rank=0, group_name="workers")
        return [float(one) for one in rates]


def main() -> None:
    """Run all of it on a cluster of its own."""
    with shoal.init(num_cpus=3):
        workers = [Worker.remote(rank, 3) for rank in range(3)]
        print("summed:", shoal.get([worker.step.remote() for worker in workers])[2])
        print("told by the first:", shoal.get([worker.settings.remote() for worker in workers])[2])


if __name__ == "__main__":
    main()
