"""Which accelerators a node finds, by what names it gives them out, and what it reads of them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pynvml
import pytest

from services.worker.tests.nvml import Gpu, Library, installed
from shoal_core.protocol.resources import UNIT
from shoal_core.service.metrics import Metrics
from shoal_core.testing.buses import until
from shoal_worker import accelerators
from shoal_worker.accelerators import Amd, find, model_of
from shoal_worker.gpus import Device, Gpus, GpuTable
from shoal_worker.meter import metered
from shoal_worker.service import WorkerSettings

A, B, C = (Gpu(f"GPU-{letter}{letter}-1") for letter in "abc")
PART = Gpu("MIG-1", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", tells_energy=False)


def names(visible: str | None, library: Library | None = None) -> list[str]:
    """Return the names under which the GPUs of a machine are given out, and leave nothing open."""
    library = library or Library([A, B, C], [PART])
    with installed(library):
        found = find({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        try:
            assert found.variable == "CUDA_VISIBLE_DEVICES"
            return [device.name for device in found.devices]
        finally:
            found.close()
            assert library.open == 0


@pytest.fixture(autouse=True)
def no_amd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accelerators, "KFD", tmp_path / "none")


# ------------------------------------------------------------------------------- finding


def test_gpus_are_found_in_the_drivers_order() -> None:
    assert names(None) == ["0", "1", "2"]
    with installed(Library([A])):
        assert find({}).devices == [Device("0", "GPU-aa-1", "A100")]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("2,0", ["2", "0"]),
        (" 1 , 2 ", ["1", "2"]),
        ("GPU-bb,0", ["GPU-bb", "0"]),
        ("GPU-cc-1", ["GPU-cc-1"]),
        ("MIG-1", ["MIG-1"]),
        ("0,7,1", ["0"]),
        ("0,nonsense,1", ["0"]),
        ("0,MIG-2", ["0"]),
        ("0,GPU-aa,1", ["0"]),
        ("GPU-", []),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_what_the_service_may_use_is_what_it_gives_out_by_the_same_names(visible: str, expected: list[str]) -> None:
    assert names(visible) == expected


def test_a_machine_without_gpus_is_nothing_to_speak_of(caplog: pytest.LogCaptureFixture) -> None:
    with installed(None):
        assert find({}).devices == ()
    assert names(None, Library([])) == []
    with installed(Library([], failure=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)):
        assert find({}).devices == ()
    assert caplog.records == []


def test_a_driver_that_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with installed(Library([A], failure=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)), caplog.at_level(logging.WARNING):
        assert find({}).devices == ()
    (record,) = caplog.records
    assert "driver fails" in record.getMessage()


@pytest.mark.parametrize(
    ("product", "model"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA", ""),
        ("", ""),
    ],
)
def test_the_model_is_what_programs_call_it(product: str, model: str) -> None:
    assert model_of(product) == model


# ------------------------------------------------------------------------------- offering


def test_a_node_offers_what_it_found_or_as_many_as_it_was_told() -> None:
    found = [Device("2", "GPU-a", "A100"), Device("0", "GPU-b", "H100")]
    assert Gpus.of(found, None) == Gpus(2.0, ("2", "0"), ("A100", "H100"))
    assert Gpus.of(found, 1) == Gpus(1, ("2",), ("A100",))
    assert Gpus.of(found, 0) == Gpus(0, (), ())
    assert Gpus.of([], 2.5) == Gpus(2.5, ("0", "1", "2"), ())
    assert Gpus.of([], None) == Gpus(0.0, (), ())
    assert Gpus.of([], 2, ["7", "GPU-x", "5"]) == Gpus(2, ("7", "GPU-x"), ())
    assert Gpus.of(found, 2, ["2", "0", "9"]) == Gpus(2, ("2", "0"), ("A100", "H100"))
    assert Gpus.of([], None, ["7"]) == Gpus(0.0, (), ())


def test_a_node_is_not_told_to_offer_more_than_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a")
    assert WorkerSettings(num_gpus=2).num_gpus == 2
    with pytest.raises(ValueError, match="num_gpus is 3, but CUDA_VISIBLE_DEVICES shows 2: '4,GPU-a'"):
        WorkerSettings(num_gpus=3)


# ------------------------------------------------------------------------------- reading


def test_readings_are_in_base_units_and_what_a_device_does_not_tell_is_left_out() -> None:
    busy = Gpu("GPU-a", busy_percent=75, used_bytes=1 << 30, total_bytes=2 << 30, millijoules=(1 << 32) + 500)
    mute, lost = Gpu("GPU-b", tells_energy=False), Gpu("GPU-c", lost=True)
    with installed(Library([busy, mute, lost])):
        found = find({})
        first, second, third = found.read()
        assert (first.busy_ratio, first.used_bytes, first.total_bytes) == (0.75, 1 << 30, 2 << 30)
        assert first.energy_joules == ((1 << 32) + 500) / 1000
        assert (second.busy_ratio, second.energy_joules) == (0.0, None)
        assert (third.busy_ratio, third.used_bytes, third.total_bytes, third.energy_joules) == (None, None, None, None)
        found.close()


async def test_gpus_are_metrics_of_the_node() -> None:
    metrics, table = Metrics(), GpuTable(["0", "1"])
    gpus = [
        Gpu("GPU-a", busy_percent=50, used_bytes=1024, total_bytes=4096, millijoules=2500),
        Gpu("GPU-b", lost=True),
    ]
    with installed(Library(gpus)):
        found = find({})
        table.allocate(UNIT // 4)
        async with metered(found, table, metrics):
            await until(lambda: b"shoal_gpu_utilization_ratio{" in metrics.exposition())
            shown = metrics.exposition().decode()
        found.close()
    for line in (
        'shoal_gpu_leased_ratio{index="0",uuid="GPU-a"} 0.25',
        'shoal_gpu_leased_ratio{index="1",uuid="GPU-b"} 0.0',
        'shoal_gpu_utilization_ratio{index="0",uuid="GPU-a"} 0.5',
        'shoal_gpu_memory_used_bytes{index="0",uuid="GPU-a"} 1024.0',
        'shoal_gpu_memory_bytes{index="0",uuid="GPU-a"} 4096.0',
        'shoal_gpu_energy_joules_total{index="0",uuid="GPU-a"} 2.5',
    ):
        assert line in shown.splitlines()
    assert 'shoal_gpu_utilization_ratio{index="1"' not in shown


async def test_without_gpus_there_are_no_metrics_of_them_and_nobody_looks() -> None:
    metrics = Metrics()
    with installed(None):
        async with metered(find({}), GpuTable([]), metrics):
            assert len(asyncio.all_tasks()) == 1
    assert metrics.names() == []


# ------------------------------------------------------------------------------- AMD


@pytest.fixture
def amd(tmp_path: Path) -> tuple[Path, Path]:
    """What the driver shows of a machine with a processor and two GPUs, and of their cards."""
    topology, cards = tmp_path / "nodes", tmp_path / "drm"
    for number, properties in enumerate(
        (
            "cpu_cores_count 64\nsimd_count 0\nunique_id 0\n",
            "simd_count 304\nunique_id 10\ndrm_render_minor 128\ngfx_target_version 90402\n",
            "simd_count 304\nunique_id 11\ndrm_render_minor 129\ngfx_target_version 90010\n",
        )
    ):
        (topology / str(number)).mkdir(parents=True)
        (topology / str(number) / "properties").write_text(properties)
    card = cards / "renderD128" / "device"
    card.mkdir(parents=True)
    for name, text in {
        "product_name": "AMD Instinct MI300X\n",
        "gpu_busy_percent": "25\n",
        "mem_info_vram_used": "1024\n",
        "mem_info_vram_total": "4096\n",
    }.items():
        (card / name).write_text(text)
    (topology / "unrelated").touch()
    return topology, cards


def test_amds_gpus_are_what_their_driver_shows(amd: tuple[Path, Path]) -> None:
    found = Amd(*amd, {})
    assert found.variable == "HIP_VISIBLE_DEVICES"
    assert found.devices == [
        Device("0", "GPU-000000000000000a", "MI300X"),
        Device("1", "GPU-000000000000000b", "gfx90a"),
    ]
    first, second = found.read()
    assert (first.busy_ratio, first.used_bytes, first.total_bytes, first.energy_joules) == (0.25, 1024, 4096, None)
    assert (second.busy_ratio, second.used_bytes) == (None, None)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, ["1"]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "1,0,7"}, ["1", "0"]),
        ({"ROCR_VISIBLE_DEVICES": "1"}, ["0"]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_amds_variables_are_heeded(amd: tuple[Path, Path], environment: dict[str, str], expected: list[str]) -> None:
    assert [device.name for device in Amd(*amd, environment).devices] == expected


def test_amd_is_found_where_nvidia_is_not(amd: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "KFD", amd[0])
    monkeypatch.setattr(accelerators, "DRM", amd[1])
    with installed(None):
        found = find({})
        assert len(found.devices) == 2
        found.close()
    with installed(Library([A])):
        assert len(find({}).devices) == 1
