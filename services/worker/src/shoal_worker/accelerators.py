"""The accelerators of a machine: which there are, how a process is shown some of them, and what they do just now.

Each maker is asked when the node starts: NVIDIA by NVML, AMD by what its driver shows in ``/sys``. A machine without
any is the usual case and nothing to speak of; a driver that is there and fails is told once.

What a lease is given are *names*: what the maker's variable takes to show just these devices to a process. They are the
indices that the driver gives the devices, or, where the service itself was started with that variable, the entries
found there: so that a service that was given some of the machine's devices gives out these and no others, by the names
that it knows them by.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal_core.machine import CUDA_VISIBLE, device_entries
from shoal_worker.gpus import Device

logger = logging.getLogger("shoal.worker")

HIP_VISIBLE = "HIP_VISIBLE_DEVICES"
ROCR_VISIBLE = "ROCR_VISIBLE_DEVICES"
KFD = Path("/sys/class/kfd/kfd/topology/nodes")
DRM = Path("/sys/class/drm")


@dataclass(frozen=True, slots=True)
class Reading:
    """What one device does just now; None where it does not tell. ``energy_joules`` only rises."""

    device: Device
    busy_ratio: float | None
    used_bytes: int | None
    total_bytes: int | None
    energy_joules: float | None


class Accelerators(Protocol):
    """All accelerators of one maker that this node may give out."""

    @property
    def variable(self) -> str:
        """The environment variable that shows a process the devices it names."""

    @property
    def devices(self) -> Sequence[Device]:
        """The devices, in the order in which they are given out."""

    def read(self) -> list[Reading]:
        """Look at all devices (this may take a while: not for an event loop)."""

    def close(self) -> None:
        """Let go of the maker's library."""


class NoAccelerators:
    """A machine without any."""

    variable = CUDA_VISIBLE
    devices: Sequence[Device] = ()

    def read(self) -> list[Reading]:
        """Return nothing."""
        return []

    def close(self) -> None:
        """Do nothing."""


def find(environment: Mapping[str, str] = os.environ) -> Accelerators:
    """Return the accelerators of this machine: NVIDIA's if there are any, else AMD's, else none."""
    nvidia = Nvidia.find(environment)
    if nvidia is not None:
        return nvidia
    amd = Amd(KFD, DRM, environment)
    return amd if amd.devices else NoAccelerators()


# ------------------------------------------------------------------------------- NVIDIA


class Nvidia:
    """NVIDIA's GPUs, and parts of them (MIG) where they are named, by NVML."""

    variable = CUDA_VISIBLE

    def __init__(self, nvml: Any, handles: Sequence[tuple[Device, Any]]) -> None:
        self._nvml = nvml
        self._handles = handles
        self.devices = [device for device, _ in handles]

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> Nvidia | None:
        """Return the GPUs that the service may use, or None where there are none."""
        try:
            import pynvml as nvml
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            if error.value not in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
                logger.warning("this node offers no NVIDIA GPUs: their driver fails: %s", error)
            return None
        try:
            handles = _named(nvml, environment.get(CUDA_VISIBLE))
        except nvml.NVMLError as error:
            logger.warning("this node offers no NVIDIA GPUs: their driver fails: %s", error)
            handles = []
        if not handles:
            nvml.nvmlShutdown()
            return None
        return cls(nvml, handles)

    def read(self) -> list[Reading]:
        """Look at all devices; one that cannot be looked at tells nothing."""
        return [
            Reading(
                device,
                busy_ratio=self._ask(lambda h: self._nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100, handle),
                used_bytes=self._ask(lambda h: self._nvml.nvmlDeviceGetMemoryInfo(h).used, handle),
                total_bytes=self._ask(lambda h: self._nvml.nvmlDeviceGetMemoryInfo(h).total, handle),
                energy_joules=self._ask(lambda h: self._nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1000, handle),
            )
            for device, handle in self._handles
        ]

    def _ask(self, question: Callable[[Any], Any], handle: Any) -> Any:
        try:
            return question(handle)
        except self._nvml.NVMLError:
            return None  # not every device tells everything, and one that fell off the bus tells nothing

    def close(self) -> None:
        """Let go of NVML."""
        self._nvml.nvmlShutdown()


def _named(nvml: Any, visible: str | None) -> list[tuple[Device, Any]]:
    """Return the devices that ``CUDA_VISIBLE_DEVICES`` shows; as in CUDA, what follows an entry that is none is not.

    An entry is an index, the beginning of a GPU's UUID, or a part of a GPU (MIG).
    """
    by_index = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return [(_nvidia(nvml, str(index), handle), handle) for index, handle in enumerate(by_index)]
    named: dict[str, tuple[Device, Any]] = {}
    for entry in device_entries(visible):
        handle = _find_handle(nvml, entry, by_index)
        if handle is None:
            break
        device = _nvidia(nvml, entry, handle)
        if device.uuid in named:
            break  # CUDA shows nothing at all then; whatever comes first is safe
        named[device.uuid] = (device, handle)
    return list(named.values())


def _find_handle(nvml: Any, entry: str, by_index: Sequence[Any]) -> Any | None:
    if entry.isdigit():
        return by_index[int(entry)] if int(entry) < len(by_index) else None
    if entry.startswith("MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(entry)
        except nvml.NVMLError:
            return None
    matching = [handle for handle in by_index if str(nvml.nvmlDeviceGetUUID(handle)).startswith(entry)]
    return matching[0] if len(matching) == 1 and entry.startswith("GPU-") else None


def _nvidia(nvml: Any, name: str, handle: Any) -> Device:
    return Device(name, str(nvml.nvmlDeviceGetUUID(handle)), model_of(str(nvml.nvmlDeviceGetName(handle))))


def model_of(product: str) -> str:
    """Return what programs call a GPU by its product name: ``A100`` for ``NVIDIA A100-SXM4-40GB``.

    The words of the maker and of the line are left out; ``RTX`` alone is no model, so a number that follows stays.
    """
    words = [word for word in re.split(r"[\s/]+", product) if word.lower() not in _LINES]
    if not words:
        return ""
    model = words[0].split("-")[0]
    if model in ("RTX", "GTX") and len(words) > 1:
        model = f"{model}-{words[1].split('-')[0]}"
    return re.sub(r"[^A-Za-z0-9_.-]", "", model)


_LINES = frozenset({"nvidia", "tesla", "geforce", "quadro", "graphics", "device", "amd", "instinct", "radeon"})


# ------------------------------------------------------------------------------- AMD


class Amd:
    """AMD's GPUs, by the topology that their driver (``kfd``) shows, in its order, which is that of HIP's indices.

    ``ROCR_VISIBLE_DEVICES`` filters first, and HIP counts what is left; so its entries, if it is set, only say how many
    there are. Energy is not told.
    """

    variable = HIP_VISIBLE

    def __init__(self, topology: Path, cards: Path, environment: Mapping[str, str]) -> None:
        found = _amd_nodes(topology)
        rocr = environment.get(ROCR_VISIBLE)
        if rocr is not None:
            found = found[: len(device_entries(rocr))]
        indices = [str(index) for index in range(len(found))]
        if (hip := environment.get(HIP_VISIBLE)) is not None:
            indices = [entry for entry in device_entries(hip) if entry in indices]
        self._folders = {index: cards / f"renderD{found[int(index)].minor}" / "device" for index in indices}
        self.devices = [
            Device(index, found[int(index)].uuid, _amd_model(self._folders[index], found[int(index)].target))
            for index in indices
        ]

    def read(self) -> list[Reading]:
        """Look at all devices."""
        return [self._read(device, self._folders[device.name]) for device in self.devices]

    def _read(self, device: Device, folder: Path) -> Reading:
        busy = _number(folder / "gpu_busy_percent")
        return Reading(
            device,
            busy_ratio=None if busy is None else busy / 100,
            used_bytes=_number(folder / "mem_info_vram_used"),
            total_bytes=_number(folder / "mem_info_vram_total"),
            energy_joules=None,
        )

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class _AmdNode:
    uuid: str
    minor: int
    target: int


def _amd_nodes(topology: Path) -> list[_AmdNode]:
    """Return the nodes of the topology that are GPUs (the others are processors), in its order."""
    folders = sorted((path for path in topology.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    nodes = []
    for folder in folders:
        try:
            lines = [line.split() for line in (folder / "properties").read_text().splitlines()]
        except OSError:
            continue  # a container sees the nodes of devices that it may not use, and cannot read them
        properties = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}
        if properties.get("simd_count"):
            uuid = f"GPU-{properties.get('unique_id', 0):016x}"
            nodes.append(_AmdNode(uuid, properties.get("drm_render_minor", 0), properties.get("gfx_target_version", 0)))
    return nodes


def _amd_model(folder: Path, target: int) -> str:
    """Return the product's name if the driver tells it, else its architecture: 90402 is ``gfx942``."""
    try:
        product = (folder / "product_name").read_text().strip()
    except OSError:
        product = ""
    major, rest = divmod(target, 10_000)
    return model_of(product) or f"gfx{major}{rest // 100:x}{rest % 100:x}"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
