"""What the node of a new cluster offers: the checks of ``init``, of ``Cluster.add_node`` and of ``shoal up``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster import HostOptions


def test_what_is_not_said_is_what_the_machine_has() -> None:
    assert HostOptions.of() == HostOptions()
    assert HostOptions.of(None, None, None, None, None, None) == HostOptions()


def test_what_is_said_is_kept() -> None:
    given = HostOptions.of(0.5, 1, {"licence": 1.5}, {"zone": "a"}, 10**9, 2 * 10**9)
    assert given == HostOptions(0.5, 1, {"licence": 1.5}, {"zone": "a"}, 10**9, 2 * 10**9)


def test_a_whole_float_is_a_number_of_bytes() -> None:
    given = HostOptions.of(object_store_memory=1e9, memory=2e9)  # type: ignore[arg-type]
    assert (given.object_store_memory, given.memory) == (10**9, 2 * 10**9)
    assert isinstance(given.object_store_memory, int)


def test_later_changes_of_what_was_passed_change_nothing() -> None:
    resources, labels = {"licence": 1.0}, {"zone": "a"}
    given = HostOptions.of(resources=resources, labels=labels)
    resources["licence"], labels["zone"] = 2, "b"
    assert given == HostOptions(resources={"licence": 1}, labels={"zone": "a"})


@pytest.mark.parametrize("name", ["num_cpus", "num_gpus", "object_store_memory", "memory"])
@pytest.mark.parametrize("value", ["1", True, [1], b"1"])
def test_a_number_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        HostOptions.of(**{name: value})


@pytest.mark.parametrize("name", ["num_cpus", "num_gpus", "object_store_memory", "memory"])
@pytest.mark.parametrize("value", [-1, -0.5, 0.00001, math.nan, math.inf])
def test_a_number_that_cannot_be_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        HostOptions.of(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["object_store_memory", "memory"])
@pytest.mark.parametrize("value", [0, 1.5])
def test_bytes_are_whole_and_there_are_some(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        HostOptions.of(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("folder", "error"), [(7, TypeError), ("/nowhere", ValueError), (__file__, ValueError)])
def test_a_folder_for_objects_that_is_none_is_named(folder: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="folder of the object store"):
        HostOptions.of(object_store_folder=folder)


def test_the_folder_for_objects_is_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert HostOptions.of(object_store_folder=".").object_store_folder == str(tmp_path)


def test_a_node_has_no_part_of_a_gpu() -> None:
    with pytest.raises(ValueError, match="num_gpus of a node must be a whole number"):
        HostOptions.of(num_gpus=1.5)


@pytest.mark.parametrize(
    ("resource", "parameter"),
    [
        ("CPU", "num_cpus"),
        ("GPU", "num_gpus"),
        ("memory", "memory"),
        ("object_store_memory", "object_store_memory"),
    ],
)
def test_a_resource_with_a_parameter_of_its_own_is_refused_with_its_name(resource: str, parameter: str) -> None:
    with pytest.raises(ValueError, match=f"Use {parameter} instead of '{resource}'"):
        HostOptions.of(resources={resource: 1})


@pytest.mark.parametrize(
    ("resources", "error"),
    [
        (["licence"], TypeError),
        ("licence", TypeError),
        ({1: 1}, TypeError),
        ({"licence": "1"}, TypeError),
        ({"licence": None}, TypeError),
        ({"licence": -1}, ValueError),
        ({"licence": 0.00001}, ValueError),
        ({"\udc80": 1}, ValueError),
        ({"licence": math.nan}, ValueError),
    ],
)
def test_wrong_resources_are_named(resources: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="resources"):
        HostOptions.of(resources=resources)


@pytest.mark.parametrize("labels", [["zone"], "zone", {"zone": 1}, {1: "a"}, {"zone": None}])
def test_wrong_labels_are_named(labels: Any) -> None:
    with pytest.raises(TypeError, match="labels"):
        HostOptions.of(labels=labels)


@pytest.mark.parametrize(
    ("visible", "most"), [("2,3", 2), ("", 0), ("-1", 0), ("NoDevFiles,1", 0), ("GPU-a, GPU-b", 2), (None, 8)]
)
def test_no_more_gpus_are_offered_than_the_environment_shows(
    visible: str | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert HostOptions.of(num_gpus=most).num_gpus == most
    if visible is not None:
        with pytest.raises(ValueError, match=f"num_gpus is {most + 1}, but CUDA_VISIBLE_DEVICES shows {most}: "):
            HostOptions.of(num_gpus=most + 1)
