"""Objects that outlive their owner and its node: put as durable ones, or by a detached actor."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shoal
from shoal import ObjectRef
from shoal.cluster_utils import Cluster
from shoal.exceptions import OwnerDiedError
from tests.integration.waiting import get, is_gone, until

LARGE = 2_000_000


class _Owner:
    """Puts objects, and can be killed."""

    def pid(self) -> int:
        return os.getpid()

    def put(self, durable: bool | None, keep_seconds: float | None = None) -> list[ObjectRef[Any]]:
        options: dict[str, Any] = {} if durable is None else {"durable": durable}
        if keep_seconds is not None:
            options["keep_seconds"] = keep_seconds
        self.kept = [shoal.put({"small": 1}, **options), shoal.put(np.arange(LARGE), **options)]
        return self.kept

    def node(self) -> str:
        return shoal.get_runtime_context().get_node_id()


Owner = shoal.remote(num_cpus=0)(_Owner)


@shoal.remote
def total(value: Any) -> int:
    return int(value.sum())


def kill(owner: Any) -> None:
    pid = get(owner.pid.remote())
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(pid), "the owner is gone")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with shoal.init(num_cpus=2, object_store_memory=256 * 1024 * 1024):
        yield


def test_a_durable_object_is_read_after_its_owners_death(cluster: None) -> None:
    owner = Owner.remote()
    small, large = get(owner.put.remote(True))
    kill(owner)
    assert get(small) == {"small": 1}
    assert get(large).sum() == np.arange(LARGE).sum()
    assert get(total.remote(large)) == np.arange(LARGE).sum()


def test_a_value_that_was_read_before_is_read_again_after_its_owners_death(cluster: None) -> None:
    owner = Owner.remote()
    small, large = get(owner.put.remote(True))
    assert get(large)[1] == 1
    kill(owner)
    until(lambda: reads(large), "the death of the owner took the segment along, and the durable tier has another")
    assert get(small) == {"small": 1}


def reads(ref: ObjectRef[Any]) -> bool:
    return int(get(ref)[-1]) == LARGE - 1


def test_an_object_that_is_not_durable_is_lost_with_its_owner(cluster: None) -> None:
    owner = Owner.remote()
    refs = get(owner.put.remote(False))
    kill(owner)
    for ref in refs:
        with pytest.raises(OwnerDiedError):
            get(ref)


def test_what_a_detached_actor_puts_is_durable_unless_it_says_otherwise(cluster: None) -> None:
    owner = Owner.options(lifetime="detached", name="keeper").remote()
    refs = get(owner.put.remote(None))
    others = get(owner.put.remote(False))
    kill(owner)
    # Its job ends with it: then its objects go too. Until that is known they may still be read.
    for ref in others:
        with pytest.raises(OwnerDiedError):
            get(ref)
    del refs


def test_an_owner_that_lives_reads_its_durable_objects_like_any_other(cluster: None) -> None:
    for keep_seconds in (None, 1000.0):
        small = shoal.put({"a": 1}, durable=True, keep_seconds=keep_seconds)
        large = shoal.put(np.arange(LARGE), durable=True, keep_seconds=keep_seconds)
        raw = shoal.put(b"x" * LARGE, durable=True)
        assert get([small, raw]) == [{"a": 1}, b"x" * LARGE]
        assert get(total.remote(large)) == np.arange(LARGE).sum()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"durable": False, "keep_seconds": 1.0}, "durable=False"),
        ({"durable": True, "keep_seconds": 0}, "above 0"),
        ({"keep_seconds": -1.0}, "above 0"),
    ],
)
def test_a_wrong_time_is_refused(cluster: None, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        shoal.put(1, **options)


def test_a_durable_object_is_read_after_the_death_of_its_owners_node() -> None:
    shoal.shutdown()
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1, resources={"there": 1})
        cluster.wait_for_nodes()
        owner = Owner.options(resources={"there": 1}, num_cpus=0).remote()
        assert get(owner.node.remote()) == node.node_id
        small, large = get(owner.put.remote(True))
        lost, _ = get(owner.put.remote(False))
        cluster.remove_node(node, allow_graceful=False)
        assert get(small) == {"small": 1}
        assert get(large).sum() == np.arange(LARGE).sum()
        with pytest.raises(OwnerDiedError):
            get(lost)
    finally:
        cluster.shutdown()
