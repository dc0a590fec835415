"""How a worker process is shown the GPUs of its lease."""

from __future__ import annotations

import os

import pytest

from shoal_core.machine import CUDA_VISIBLE
from shoal_core.runtime.worker.execution import show_gpus


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CUDA_VISIBLE, "HIP_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)


def test_cuda_sees_those_of_the_lease_in_the_drivers_order() -> None:
    show_gpus(CUDA_VISIBLE, ["2", "GPU-a"])
    assert (os.environ[CUDA_VISIBLE], os.environ["CUDA_DEVICE_ORDER"]) == ("2,GPU-a", "PCI_BUS_ID")
    show_gpus(CUDA_VISIBLE, [])
    assert os.environ[CUDA_VISIBLE] == ""


def test_an_order_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    show_gpus(CUDA_VISIBLE, ["0"])
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_another_makers_variable_is_set_alone() -> None:
    show_gpus("HIP_VISIBLE_DEVICES", ["1"])
    assert os.environ["HIP_VISIBLE_DEVICES"] == "1"
    assert CUDA_VISIBLE not in os.environ
    assert "CUDA_DEVICE_ORDER" not in os.environ
