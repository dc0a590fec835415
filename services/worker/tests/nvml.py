"""A library that plays NVIDIA's: C functions made of Python, which the real binding calls as it calls the real ones."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pynvml

SUCCESS: int = pynvml.NVML_SUCCESS
Pointer = ctypes.c_void_p


@dataclass
class Gpu:
    """What the library says of one device."""

    uuid: str
    name: str = "NVIDIA A100-SXM4-40GB"
    busy_percent: int = 0
    used_bytes: int = 0
    total_bytes: int = 40 << 30
    millijoules: int = 0
    lost: bool = False
    tells_energy: bool = True


class Library:
    """The functions that the node uses, over ``gpus`` (by index) and ``parts`` (MIG, by UUID)."""

    def __init__(self, gpus: list[Gpu], parts: list[Gpu] | None = None, failure: int = SUCCESS) -> None:
        self.devices = [*gpus, *(parts or [])]
        self.count = len(gpus)
        self.open = 0
        integer = ctypes.c_uint
        self.nvmlInitWithFlags = self._function(lambda flags: self._opened(failure), integer)
        self.nvmlShutdown = self._function(self._closed)
        self.nvmlDeviceGetCount_v2 = self._function(self._get_count, Pointer)
        self.nvmlDeviceGetHandleByIndex_v2 = self._function(self._by_index, integer, Pointer)
        self.nvmlDeviceGetHandleByUUID = self._function(self._by_uuid, ctypes.c_char_p, Pointer)
        self.nvmlDeviceGetUUID = self._function(self._text("uuid"), Pointer, Pointer, integer)
        self.nvmlDeviceGetName = self._function(self._text("name"), Pointer, Pointer, integer)
        self.nvmlDeviceGetUtilizationRates = self._function(self._get_utilization, Pointer, Pointer)
        self.nvmlDeviceGetMemoryInfo = self._function(self._get_memory, Pointer, Pointer)
        self.nvmlDeviceGetTotalEnergyConsumption = self._function(self._get_energy, Pointer, Pointer)

    @staticmethod
    def _function(python: Callable[..., int], *arguments: Any) -> Any:
        return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(python)

    def _opened(self, failure: int) -> int:
        self.open += failure == SUCCESS
        return failure

    def _closed(self) -> int:
        self.open -= 1
        return SUCCESS

    def _get_count(self, count: int) -> int:
        ctypes.c_uint.from_address(count).value = self.count
        return SUCCESS

    def _by_index(self, index: int, handle: int) -> int:
        if index >= self.count:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        Pointer.from_address(handle).value = index + 1
        return SUCCESS

    def _by_uuid(self, uuid: bytes, handle: int) -> int:
        uuids = [device.uuid for device in self.devices]
        if uuid.decode() not in uuids:
            return int(pynvml.NVML_ERROR_NOT_FOUND)
        Pointer.from_address(handle).value = uuids.index(uuid.decode()) + 1
        return SUCCESS

    def _text(self, attribute: str) -> Callable[[int, int, int], int]:
        def write(handle: int, buffer: int, length: int) -> int:
            text = str(getattr(self.devices[handle - 1], attribute)).encode() + b"\0"
            if len(text) > length:
                return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
            ctypes.memmove(buffer, text, len(text))
            return SUCCESS

        return write

    def _get_utilization(self, handle: int, rates: int) -> int:
        device = self.devices[handle - 1]
        if device.lost:
            return int(pynvml.NVML_ERROR_GPU_IS_LOST)
        pynvml.c_nvmlUtilization_t.from_address(rates).gpu = device.busy_percent
        return SUCCESS

    def _get_memory(self, handle: int, memory: int) -> int:
        device = self.devices[handle - 1]
        if device.lost:
            return int(pynvml.NVML_ERROR_GPU_IS_LOST)
        info = pynvml.c_nvmlMemory_t.from_address(memory)
        info.total, info.used, info.free = device.total_bytes, device.used_bytes, device.total_bytes - device.used_bytes
        return SUCCESS

    def _get_energy(self, handle: int, millijoules: int) -> int:
        device = self.devices[handle - 1]
        if device.lost or not device.tells_energy:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        ctypes.c_uint64.from_address(millijoules).value = device.millijoules
        return SUCCESS


@contextmanager
def installed(library: Any) -> Iterator[None]:
    """Have the binding find this library instead of the machine's; None: there is none."""
    missing = mock.patch.object(pynvml, "CDLL", side_effect=OSError("no such library"))
    with (
        mock.patch.object(pynvml, "nvmlLib", library),
        mock.patch.object(pynvml, "_nvmlGetFunctionPointer_cache", {}),
        mock.patch.object(pynvml, "_nvmlLib_refcount", 0),
        missing,
    ):
        yield
