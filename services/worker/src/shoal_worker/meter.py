"""What the GPUs of a node do, as metrics: how busy they are, how full their memory is, and how much energy they took.

They are looked at every ``LOOK_SECONDS``, in a thread, since a driver may take its time; who reads the metrics gets the
last look. Two labels tell the devices apart: ``index``, by which leases know them, and ``uuid``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from shoal_core.protocol.measures import Labels, labels
from shoal_core.protocol.metrics import GPU_ENERGY, GPU_LEASED, GPU_MEMORY, GPU_MEMORY_USED, GPU_UTILIZATION
from shoal_core.protocol.resources import UNIT
from shoal_core.service.metrics import Metrics
from shoal_worker.accelerators import Accelerators, Reading
from shoal_worker.gpus import Device, GpuTable

LOOK_SECONDS = 5.0


@asynccontextmanager
async def metered(accelerators: Accelerators, table: GpuTable, metrics: Metrics) -> AsyncIterator[None]:
    """Keep looking at the devices, if there are any; leaving ends it."""
    if not accelerators.devices:
        yield
        return
    meter = Meter(accelerators)
    meter.show(table, metrics)
    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(meter.keep_looking())
        try:
            yield
        finally:
            looking.cancel()


class Meter:
    """The last look at the devices of a node."""

    def __init__(self, accelerators: Accelerators) -> None:
        self.readings: list[Reading] = []
        self._accelerators = accelerators

    async def keep_looking(self) -> None:
        """Look at the devices now and then, for ever."""
        while True:
            self.readings = await asyncio.to_thread(self._accelerators.read)
            await asyncio.sleep(LOOK_SECONDS)

    def show(self, table: GpuTable, metrics: Metrics) -> None:
        """Have the metrics read the last look."""
        by_name = {device.name: device for device in self._accelerators.devices}

        def leased() -> dict[Labels, float]:
            return {
                _labels(by_name[name]): 1 - free / UNIT
                for name, free in zip(table.names, table.free, strict=True)
                if name in by_name
            }

        metrics.read(GPU_LEASED, leased)
        metrics.read(GPU_UTILIZATION, self._each(lambda reading: reading.busy_ratio))
        metrics.read(GPU_MEMORY_USED, self._each(lambda reading: reading.used_bytes))
        metrics.read(GPU_MEMORY, self._each(lambda reading: reading.total_bytes))
        metrics.read(GPU_ENERGY, self._each(lambda reading: reading.energy_joules))

    def _each(self, value: Callable[[Reading], float | None]) -> Callable[[], dict[Labels, float]]:
        return lambda: {_labels(r.device): number for r in self.readings if (number := value(r)) is not None}


def _labels(device: Device) -> Labels:
    return labels(index=device.name, uuid=device.uuid)
