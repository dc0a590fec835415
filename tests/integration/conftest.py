"""Clusters for the integration tests: real processes, a real broker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import shoal


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """Join an embedded cluster of two CPUs for the whole module."""
    with shoal.init(num_cpus=2):
        yield


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Join an embedded cluster of one CPU."""
    with shoal.init(num_cpus=1):
        yield
